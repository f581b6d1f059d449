"""convolutions.py in small on the CPU, kernels in Triton's interpreter: rows, failures, a budget, sweeps."""

import csv
import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from harness import conv_cases, conv_layers, conv_measure, conv_page, pool
from harness.device import Roofs
from harness.problem import FORWARD, TRAINING

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROOFS = Roofs(3000.0, {"fp16": 780.0, "tf32": 390.0}, 50 * 2**20)


@pytest.fixture(scope="module")
def convolutions(script):
    return script("convolutions")


def run(convolutions, out, *more):
    """The exit status, rows as text, and facts."""
    given = ["--smoke", "--device", "cpu", "--seconds", "0", "--least", "2", "--out", str(out)]
    status = convolutions.main([*given, *more])
    name = "convolutions-sweep-cpu" if "--sweep" in more else "convolutions-cpu"
    with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return status, rows, json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_every_case_has_a_key_of_its_own():
    for smoke in (False, True):
        keys = [c.key for c in conv_cases.cases(smoke)]
        assert len(set(keys)) == len(keys)


def test_the_page_is_made_from_the_committed_results():
    text, path = conv_page.page(RESULTS), ROOT / "docs" / conv_page.NAME
    hint = "run python benchmarks/plots.py --docs"
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text, hint
    assert conv_page.page(RESULTS / "none") is None


# ---------------------------------------------------------------- cases
def test_the_ways_agree_in_float64():
    generator = torch.Generator().manual_seed(0)
    u, pre, post = torch.randn(3, 3, 2, 9, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    matrix = conv_cases.toeplitz(k)
    for t in range(9):
        for s in range(9):
            assert torch.equal(matrix[:, t, s], k[:, t - s] if t >= s else torch.zeros(2).double())
    for gates in ((), (pre, post)):
        torch.testing.assert_close(conv_cases.by_fft(u, k, *gates), conv_cases.by_matrix(u, matrix, *gates))
    short = conv_cases.by_conv1d(u, k[:, :3].flip(-1), torch.zeros(2).double())
    torch.testing.assert_close(short, conv_cases.by_fft(u, torch.nn.functional.pad(k[:, :3], (0, 6))))


def test_floors_by_hand():
    """1024 points are 32 x 32 and 8192 are 32 x 16 x 16; two sequences of three are one pair and a half-empty one."""
    from structmat_kernels.fft_conv import chain
    from structmat_kernels.fft_conv.transforms import RADICES

    assert chain.RADICES[1024] == RADICES[1024] == (32, 32, 1)
    assert RADICES[8192] == (32, 16, 16)
    case = conv_cases.Case("long", 3, 5, 512)
    half, whole = 8 * 1024 * (16 + 32), 8 * 1024 * (32 + 32)
    assert case.operations == 5 * (2 * (half + whole) + whole)
    assert case.bytes_moved == 2 * 2 * 3 * 5 * 512 + 4 * 5 * 512
    gated = conv_cases.Case("long", 3, 5, 512, direction=TRAINING, variant=conv_cases.GATES)
    assert gated.operations == 5 * (2 * (5 * half + 3 * whole) + 4 * whole)
    assert dataclasses.replace(gated, dtype="fp32").operations == 5 * (2 * 6 * half + 3 * whole)
    assert gated.bytes_moved == (4 + 7) * 2 * 3 * 5 * 512 + 3 * 4 * 5 * 512
    long = conv_cases.Case("long", 64, 768, 4096, "fp32")
    operations = 768 * (32 * 16 * 8192 * (16 + 16 + 16) + 8 * 8192 * 64)
    assert long.operations == operations
    row = conv_measure.row_of(long, "ours") | {"p50_us": 1000.0}
    conv_measure.floors(row, long, ROOFS, True)
    assert row["arithmetic_floor_us"] == pytest.approx(operations / 130e6, abs=0.01)
    assert row["bytes_floor_us"] == pytest.approx(4 * 768 * 4096 * (2 * 64 + 1) / 3e6, abs=0.01)
    assert row["bytes_ratio"] == pytest.approx(1000 / row["bytes_floor_us"], abs=1e-3)
    blocked, whole = conv_cases.Case("long", 3, 5, 20_000), 8 * 16384 * (64 + 16 + 16)  # three blocks of 64 x 16 x 16
    half = 8 * 16384 * (32 + 16 + 16)
    assert blocked.operations == 5 * 3 * (2 * (half + whole) + whole)
    gated = dataclasses.replace(blocked, direction=TRAINING, variant=conv_cases.GATES)
    assert gated.operations == 5 * 3 * (2 * (3 * half + 3 * whole) + 3 * whole)
    assert conv_cases.Case("long", 1, 768, 2**20).operations is None
    assert conv_cases.Case("layer", 4, 768, 512).bytes_moved is None


def test_errors_are_found():
    """A wrong value, a wrong gradient and a NaN show."""
    made = conv_cases.Operands(conv_cases.Case("long", 2, 3, 20, "fp32", TRAINING), CPU)
    operands, grad = made[0]
    y = conv_cases.by_fft(*operands.values())
    gu, gk = torch.autograd.grad(y, list(operands.values()), grad)
    good = {"y": y, "u": gu, "k": gk}
    cells = made.check(good)
    assert float(cells["error"]) < 1e-6 and float(cells["error_grads"]) < 1e-6
    assert float(made.check(good | {"y": 1.25 * y})["error"]) == pytest.approx(0.25, abs=1e-4)
    assert float(made.check(good | {"k": 0.5 * gk})["error_grads"]) == pytest.approx(0.5, abs=1e-4)
    assert float(made.check(good | {"u": gu * float("nan")})["error_grads"]) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        made.check(good | {"y": y[..., :-1]})


def test_layers_run_the_kernels_where_they_say_so(monkeypatch):
    """As on a GPU: "auto" takes kernels wherever they are."""
    from structmat_kernels import backend
    from structmat_kernels.fft_conv import kernel as long_kernel
    from structmat_kernels.short_conv import kernel as short_kernel

    calls = []
    for module, name in ((long_kernel, "forward_conv"), (short_kernel, "forward")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    monkeypatch.setattr(backend, "use_triton", lambda given, *_: (given or backend._DEFAULT) != "torch")
    case = conv_cases.Case("layer", 2, 32, 12, "fp16")
    found = {}
    for alternative in conv_layers.layers(case, CPU):
        calls.clear()
        leaves, _, function = alternative.build(0)
        with torch.no_grad():
            y = function(*leaves.values())
        assert float(alternative.check({"y": y})["error"]) < 1e-2
        found[alternative.name] = sorted(calls)
    assert found.pop("M2, all kernels") == ["forward", "forward_conv", "forward_conv"]
    assert list(found.values()) == [[], [], []]
    assert (backend._DEFAULT, conv_layers.long_op.MEASURED, conv_layers.short_op.MEASURED) == ("auto", True, True)


# ---------------------------------------------------------------- runs
def test_rows_of_a_run(convolutions, tmp_path, capsys):
    status, rows, facts = run(convolutions, tmp_path)
    assert status == 0
    assert facts["complete"] and facts["left_out"] == []
    assert [r["status"] for r in rows if r["alternative"] == "ours" and r["length"] == "262145"] == [
        "left out: longer than the kernels take"
    ] * 2
    assert {r["operation"] for r in rows} == {"long", "short", "layer"}
    timed = [r for r in rows if r["status"] == "ok"]
    assert {r["status"] for r in rows if r not in timed} == {
        "left out: longer than the kernels take",
        conv_cases.NEED_CUDA,
    }
    assert {r["alternative"] for r in timed} >= {"torch.fft", "dense Toeplitz", "F.conv1d", "ours", "M2, PyTorch"}
    for row in timed:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["speedup"]) > 0
        assert float(row["error"]) < (5e-6 if row["dtype"] == "fp32" else 1e-2)
        gradients = row["direction"] == TRAINING and row["operation"] != "layer"
        assert bool(row["error_grads"]) == gradients
        assert not gradients or float(row["error_grads"]) < (5e-6 if row["dtype"] == "fp32" else 1e-2)
    assert "F.conv1d" in capsys.readouterr().out


def test_a_kernel_that_fails_costs_its_rows(convolutions, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no\n  luck")

    monkeypatch.setattr(conv_cases, "by_kernel", fail)
    status, rows, _ = run(convolutions, tmp_path, "--only", "long/3x2x16")
    assert status == 1
    assert {(r["alternative"], r["status"]) for r in rows} == {
        ("torch.fft", "ok"),
        ("dense Toeplitz", "ok"),
        ("ours", "error: RuntimeError: no luck"),
    }


def test_a_lost_device_costs_the_kernels_rows(convolutions, tmp_path, monkeypatch):
    """What a worker says of it; the case is then tried without the kernels."""
    real = conv_measure.work

    def work(task):
        if task.ours:
            raise RuntimeError("CUDA error: the device was lost by ours: illegal memory access")
        return real(task)

    monkeypatch.setattr(convolutions, "work", work)
    status, rows, facts = run(convolutions, tmp_path, "--only", "long/2x3x37/fp32/forward", "short/2x6x33/fp32/forward")
    assert status == 1
    assert facts["left_out"] == []
    by_case = {}
    for row in rows:
        by_case.setdefault((row["operation"], row["direction"], row["variant"]), {})[row["alternative"]] = row["status"]
    assert len(by_case) == 6
    for found in by_case.values():
        assert found.pop("ours").startswith("error: RuntimeError: CUDA error: the device was lost")
        assert list(found.values()) == ["ok"]
    assert any(word in "error: RuntimeError: CUDA error: lost" for word in pool.FATAL)


def test_a_run_ends_in_time(convolutions, tmp_path):
    status, rows, facts = run(convolutions, tmp_path, "--budget", "-1")
    assert status == 0
    assert facts["left_out"] == [c.key for c in conv_cases.cases(smoke=True)]
    assert {r["status"] for r in rows} == {pool.LEFT_OUT}


def test_a_worker_process(convolutions, monkeypatch):
    """Tasks, cases and results pass between processes."""
    monkeypatch.syspath_prepend(str(convolutions.HERE))
    case = conv_cases.Case("long", 2, 2, 30, "fp32", FORWARD)
    task = conv_measure.Task("cpu", case, seconds=0.0, least=2, ours=False)
    ((same, result),) = pool.run_tasks(conv_measure.work, [task], 1, time.time() + 60)
    assert same == task
    assert [r["alternative"] for r in result["rows"]] == ["torch.fft"]
    assert result["rows"][0]["status"] == "ok"


def test_a_sweep_finds_the_best(convolutions, tmp_path, monkeypatch):
    from structmat_kernels.fft_conv import kernel

    real = kernel.forward_conv

    def forward_conv(*args, config=None):
        if config["P"] == 2:
            raise ValueError("out of resource: shared memory")
        return real(*args, config=config)

    monkeypatch.setattr(kernel, "forward_conv", forward_conv)
    status, rows, _ = run(convolutions, tmp_path, "--sweep", "--only", "long/2x3x37/fp32")
    assert status == 0
    assert [(r["kernel"], r["P"], r["status"]) for r in rows] == [
        ("forward", "1", "ok"),
        ("forward", "2", "error: ValueError: out of resource: shared memory"),
        ("backward", "1", "ok"),
        ("backward", "2", "ok"),
    ]
    assert [r["default"] for r in rows] == ["True", "False"] * 2
    for row in rows:
        assert (row["p50_us"] != "") == (row["status"] == "ok")
        assert row["status"] != "ok" or float(row["error"]) < 5e-6
