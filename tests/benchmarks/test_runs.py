"""The cases of the benchmarks, runs of them on the CPU, and runs that go wrong."""

import json
import math
import sys
import time

import pytest
import torch
from harness import cases, measure, problem, report, supervise
from harness.cases import find, sparse, transforms
from harness.device import Roofs

CPU = torch.device("cpu")
ROOFS = Roofs(3000.0, dict.fromkeys(problem.DTYPES, 800.0), 50 * 2**20)


# ---------------------------------------------------------------- cases
def test_every_problem_has_a_key_of_its_own():
    for problems in (cases.gpu_problems(), cases.quick_problems(), cases.cpu_problems()):
        assert cases.check_keys(problems) == problems
    twice = cases.cpu_problems()[:1] * 2
    with pytest.raises(ValueError, match="same key"):
        cases.check_keys(twice)


def test_walsh_hadamard_and_butterflies_against_dense():
    import scipy.linalg

    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.from_numpy(scipy.linalg.hadamard(16)).double()
    torch.testing.assert_close(transforms.walsh_hadamard(x, 0.25), 0.25 * x @ H.T)
    # The Hadamard matrix is the butterfly all of whose blocks are [[1, 1], [1, -1]].
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    factors = [block.expand(a, d, 2, 2) for a, _, d in transforms.levels(16, 2)]
    torch.testing.assert_close(transforms.butterfly_product(x, *factors), x @ H.T)
    assert transforms.levels(16, 8) == [(2, 8, 1), (1, 2, 8)]


@pytest.mark.parametrize("blocks", [8, 32, 64, 128])
def test_sparse_pattern_is_an_eighth_everywhere(blocks):
    mask = sparse.pattern(blocks)
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == [blocks // 8] * blocks
    assert mask.diagonal().all()


def test_sparse_entries_are_where_the_mask_is():
    mask = sparse.pattern(8) | (torch.arange(64).reshape(8, 8) % 5 == 0)
    values = torch.arange(1.0, 1 + int(mask.sum()) * 4).reshape(-1, 2, 2)
    dense = sparse.entries(values, mask, 2)
    for value, (i, j) in zip(values, mask.nonzero().tolist(), strict=True):
        assert dense[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].equal(value)
    assert dense.count_nonzero() == values.numel()


def test_a_missing_operation_is_said_to_be_missing(monkeypatch):
    assert "no attribute" in find.operation("monarch", "nothing")
    assert "No module" in find.operation("nothing", "nothing")
    assert "takes no backend" in find.operation("monarch.reference", "monarch")
    monkeypatch.setattr("harness.cases.linear.ways", lambda *_: [("", "ours", "it is not written")])
    rows = list(measure.measure(cases.cpu_problems()[0], CPU, ROOFS, 0.0))
    missing = [r for r in rows if r["status"] == "missing: it is not written"]
    assert {r["kind"] for r in missing} == {"ours"}
    assert len(missing) == 2
    assert any(r["kind"] == "dense" and r["status"] == "ok" for r in rows)


# ---------------------------------------------------------------- a run
def small(alternatives=None, direction="forward+backward"):
    square = cases.linear.square(64, 33, "fp32", direction)
    return problem.Problem("linear", 64, 64, 33, "fp32", direction, alternatives or square.alternatives, eager=True)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_rows_of_a_problem(direction):
    rows = list(measure.measure(small(direction=direction), CPU, ROOFS, 0.0))
    assert [r["status"] for r in rows] == ["ok"] * len(rows)
    assert rows[0]["alternative"] == "dense"
    assert rows[0]["speedup"] == 1
    for row in rows:
        assert list(row) == list(measure.COLUMNS)
        assert row["speedup"] == pytest.approx(rows[0]["p50_us"] / row["p50_us"], abs=0.1)
        assert 0 < float(row["error"]) < 1e-6
        assert row["error_dense"] == rows[0]["error"]
        assert row["repeats"] >= 20


def test_errors_are_found():
    """A wrong value, a wrong gradient and a NaN show in the row; a call that raises makes a row of its own."""
    dense = small().alternatives(small(), CPU)[0]

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.5 * grad

    def altered(name, change):
        def build(seed):
            factors, function = dense.build(seed)
            return factors, lambda x: change(function(x))

        return problem.Alternative(name, "ours", dense.cost, build, dense.exact)

    def fail(y):
        raise RuntimeError("no\n  luck")

    changes = {
        "value": lambda y: 1.25 * y,
        "gradient": WrongGradient.apply,
        "nan": lambda y: y * math.nan,
        "fails": fail,
    }
    made = [dense, *(altered(name, change) for name, change in changes.items())]
    rows = {r["alternative"]: r for r in measure.measure(small(lambda *_: made), CPU, ROOFS, 0.0)}
    assert float(rows["value"]["error"]) == pytest.approx(0.25, abs=1e-3)
    assert float(rows["gradient"]["error"]) == pytest.approx(0.5, abs=1e-3)
    assert float(rows["nan"]["error"]) == math.inf
    assert rows["fails"]["status"] == "error: RuntimeError: no luck"
    assert rows["dense"]["status"] == "ok"
    left = [r["alternative"] for r in measure.measure(small(lambda *_: made), CPU, ROOFS, 0.0, skip={"fails", "nan"})]
    assert left == ["dense", "value", "gradient"]


def test_a_run_writes_its_files(script, tmp_path, monkeypatch, capsys):
    """The command on the CPU, measured in this process."""
    kernels = script("kernels")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--only", "256x256", "--out", str(tmp_path)])
    monkeypatch.setattr(kernels, "cpu_problems", lambda: cases.cpu_problems()[:1])

    def in_process(command, problems, path, patience, stop, save):
        progress = supervise.Progress(path)
        supervise.work(problems, CPU, progress, time.time() + 60, 0.0)
        assert supervise.Progress(path).ordered(problems) == progress.ordered(problems)
        save(progress)
        return progress

    monkeypatch.setattr(kernels, "supervise", in_process)
    assert kernels.main() == 0
    rows = report.read_rows(tmp_path / "kernels-cpu.csv")
    facts = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert [r["status"] for r in rows] == ["ok"] * 5
    assert facts["complete"]
    assert facts["left_out"] == []
    assert facts["torch"] == torch.__version__
    assert facts["copy_gb_s"] > 0
    assert "Monarch sqrt(n) blocks" in capsys.readouterr().out


WORKER = """
import json, os, sys, time
path, how, key = sys.argv[sys.argv.index("--worker") + 1], sys.argv[1], sys.argv[2]
old = open(path).read() if os.path.exists(path) else ""
def write(**event):
    with open(path, "a") as file:
        file.write("\\n" + json.dumps(event))
if "error" not in old:
    write(key=key, trying="bad kernel")
    os.abort() if how == "dies" else time.sleep(60)
write(key=key, row={"alternative": "dense", "status": "ok"}, done=key)
write(finished=True)
"""


@pytest.mark.parametrize(("how", "words"), [("dies", "ended with code"), ("hangs", "silent")])
def test_a_kernel_that_kills_or_hangs_the_process_costs_one_row(tmp_path, how, words):
    problems, saved = cases.cpu_problems()[:1], []
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), how, problems[0].key]
    path = tmp_path / "x.progress"
    progress = supervise.supervise(command, problems, path, 1.0, time.time() + 30, saved.append)
    assert progress.finished
    assert {r["alternative"]: r["status"].split(":")[0] for r in progress.ordered(problems)} == {
        "bad kernel": "error",
        "dense": "ok",
    }
    assert words in progress.rows[problems[0].key, "bad kernel"]["status"]
    assert saved


def test_a_run_ends_in_time(tmp_path):
    progress = supervise.Progress(tmp_path / "x.progress")
    progress.write(facts={"copy_gb_s": 1.0, "tflop_s": {"fp32": 1.0}, "cache": 0, "device": "CPU"})
    supervise.work(cases.cpu_problems(), CPU, progress, time.time() - 1, 0.0)
    assert progress.facts["left_out"] == [p.key for p in cases.cpu_problems()]
    assert not progress.rows
