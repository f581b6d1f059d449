"""train_ldr.py in small on the CPU: its results, failures, a budget; its data; the page and plots of displacement."""

import json
import math
from pathlib import Path

import pytest
import torch
from harness import ldr_data, ldr_page, ldr_results, ldr_task, pool, report

import structmat

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """Idx files of images in ten classes that are easy to tell apart."""
    folder, generator = tmp_path_factory.mktemp("idx"), torch.Generator().manual_seed(0)
    for part, count in (("train", 96), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for i, label in enumerate(labels.tolist()):
            images[i, 2 * label + 4 : 2 * label + 6] += 150
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + values.to(torch.uint8).numpy().tobytes())
    return folder


def arguments(idx, out, *more):
    return ["--data", str(idx), "--smoke", "--device", "cpu", "--out", str(out), "--seconds", "0", *more]


@pytest.fixture(scope="module")
def run(script, idx, tmp_path_factory):
    """A run: its folder and its exit status."""
    out = tmp_path_factory.mktemp("ldr")
    return out, script("train_ldr").main(arguments(idx, out, "--seeds", "2", "--variants", ldr_data.TURNED))


def read(out, name):
    return report.read_rows(out / f"{name}.csv"), json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- whole runs
def test_every_structure_is_tuned_trained_and_timed(run):
    out, status = run
    rows, facts = read(out, "train-ldr-cpu")
    assert status == 0
    assert facts["complete"] is True
    assert len(rows) == 2 * len(ldr_task.STRUCTURES)
    assert len(facts["tuning"]) == 2 * len(ldr_task.STRUCTURES)
    for row in rows:
        assert row["status"] == "ok"
        assert 0 <= row["accuracy"] <= 100
        assert math.isfinite(row["train_loss"])
        tried = {r["rate"]: r["accuracy"] for r in facts["tuning"] if r["structure"] == row["structure"]}
        assert tried[row["rate"]] == max(tried.values())
    assert {r["seed"] for r in rows} == {1, 2}
    assert len({r["train_loss"] for r in rows}) == len(rows)  # structures and seeds differ
    times, _ = read(out, "step-times-ldr-cpu")
    assert [r["structure"] for r in times] == list(ldr_task.STRUCTURES)
    assert all(0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] for r in times)


def test_failures_are_recorded(script, idx, tmp_path, monkeypatch):
    good = ldr_task.build

    def broken(structure, *rest):
        if structure == "toeplitz":
            raise RuntimeError("no\n luck")
        return good(structure, *rest)

    monkeypatch.setattr(ldr_task, "build", broken)
    more = ["--structures", "circulant", "toeplitz", "--seeds", "1", "--variants", ldr_data.PLAIN]
    assert script("train_ldr").main(arguments(idx, tmp_path, *more)) == 1
    rows, facts = read(tmp_path, "train-ldr-cpu")
    assert [r["status"] for r in rows] == ["ok", "error: RuntimeError: no luck"]
    assert facts["complete"] is True
    assert "| Toeplitz |  |  |  | not trained |" in ldr_page.page(tmp_path)


def test_a_run_without_time_says_what_it_left_out(script, idx, tmp_path):
    more = ["--budget", "0", "--phases", "train", "--structures", "dense", "ldr-td"]
    assert script("train_ldr").main(arguments(idx, tmp_path, *more)) == 0
    rows, facts = read(tmp_path, "train-ldr-cpu")
    assert not facts["complete"]
    assert {r["status"] for r in rows} == {pool.LEFT_OUT}
    assert len(facts["left_out"]) == len(rows) == 12


def test_fewer_epochs_where_the_times_say_more(script, idx, tmp_path):
    ldr = script("train_ldr")
    more = ["--structures", "dense", "--fit", "10"]
    fit = ldr.LdrRun(ldr.arguments([*arguments(idx, tmp_path, *more)]))
    fit.args.count, fit.args.batch, fit.args.epochs = None, 500, 8
    assert fit.epochs() == 8
    report.write_csv(fit.file("step-times", ".csv"), [{"structure": "dense", "p50_ms": 4.0}], ("structure", "p50_ms"))
    # 2 data sets, 3 seeds of 120 steps and 2 rates of 100 for half of the epochs, 4 ms: 3.68 s an epoch
    assert fit.epochs() == 2


# ---------------------------------------------------------------- parts
def test_learned_parameters_are_equal():
    counts = {name: ldr_task.build(name, 28, 0, CPU)[1]["layer_params"] for name in ldr_task.STRUCTURES}
    n = 784
    few = {"dense": n * n, "circulant": n, "toeplitz": 2 * n - 1, "fastfood": 2 * n + 1024}
    assert counts == dict.fromkeys(ldr_task.STRUCTURES, 8 * n) | few


def test_a_network_is_the_same_for_a_seed():
    first, again, other = (ldr_task.build("ldr-td", 4, seed, CPU)[0] for seed in (1, 1, 2))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first[0].weight().to_dense(), other[0].weight().to_dense())
    assert isinstance(first[0].weight(), structmat.LDRTridiagonal)


def test_images_are_turned_and_noisy(monkeypatch):
    images = torch.zeros(400, 1, 9, 9)
    images[:, :, 4, 6:] = 0.25
    noisy = ldr_data.turn(images, 0)
    assert torch.equal(noisy, ldr_data.turn(images, 0))
    assert not torch.equal(noisy, ldr_data.turn(images, 1))
    assert 0 <= noisy.min() < 0.01
    assert 0.5 < noisy.max() <= 1
    monkeypatch.setattr(ldr_data, "NOISE", 0.0)
    turned = ldr_data.turn(images, 0)
    mass = turned.sum((1, 2, 3))  # that the bars keep, where they point to and at what angle
    assert mass.std() < 0.1 * mass.mean()
    i = torch.arange(9.0) - 4
    x, y = (turned[:, 0] * i).sum((1, 2)) / mass, (turned[:, 0] * i[:, None]).sum((1, 2)) / mass
    torch.testing.assert_close(x.hypot(y), torch.full((400,), 3.0), atol=0.3, rtol=0)
    quarters = torch.histc(torch.atan2(y, x), 4, -math.pi, math.pi)
    assert quarters.min() > 60


def test_data_are_standardised_and_held_out(idx):
    train, test = ldr_data.load(idx, ldr_data.PLAIN, CPU, None, 28)
    assert (train.x.shape, test.x.shape) == ((96, 784), (40, 784))
    assert abs(train.x.mean()) < 1e-5
    assert train.x.std() == pytest.approx(1, abs=1e-5)
    rest, held = ldr_data.held_out(train)
    assert (len(rest), len(held)) == (80, 16)
    assert torch.equal(torch.cat([rest.x, held.x]).sort(0).values, train.x.sort(0).values)
    assert torch.equal(ldr_data.held_out(train)[1].x, held.x)
    plan = ldr_data.Plan(rest, 32, 0)
    plan.draw()
    assert plan.steps == 2
    assert len(plan.order.unique()) == 64


# ---------------------------------------------------------------- page and plots
def write_times(folder, name, group, values, ours):
    """Times of exactly n^2 of a rival and 5 n of ours, in microseconds."""
    rows = [
        {group: value, "n": 2**k, "method": method, "p50_s": t(2**k), "residual": 1e-9}
        for value in values
        for k in range(3, 16)
        for method, t in ((ours, lambda n: 5e-6 * n), ("rival", lambda n: 1e-6 * n * n / 1000))
    ]
    report.write_csv(folder / f"{name}.csv", rows, list(rows[0]))
    facts = {"versions": {"torch": "2.13"}, "threads": 2, "dtype": "float32", "machine": "m"}
    report.write_json(folder / f"{name}.json", facts | {"load_before_and_after": [[1.0, 0, 0], [2.0, 0, 0]]})


def test_page_and_plots_of_a_run(script, run, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    assert ldr_page.page(tmp_path) is None
    assert plots.draw_displacement(tmp_path, tmp_path / "none") == []
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "## Toeplitz" not in ldr_page.page(tmp_path)
    write_times(tmp_path, ldr_page.PRODUCTS, "vectors", (1, 16), "structmat.Toeplitz")
    write_times(tmp_path, ldr_page.SOLVES, "matrix", ("random",), "structmat.Toeplitz.solve")
    text = ldr_page.page(tmp_path)
    assert text == ldr_page.page(tmp_path)
    for words in (
        "### Rotated and noisy",
        "| LDR-TD, r = 1 |",
        "### One vector",
        "### 16 vectors",
        "### Random entries",
    ):
        assert words in text
    rival = next(line for line in text.split("### Random entries")[1].splitlines() if line.startswith("| rival"))
    assert "| 2.00 | 2^11 to 2^15 | from 2^13 on | 1.0e-09 |" in rival  # n^2 / 1000 = 5 n at n = 5000
    for part in text.split("\n\n"):
        if part.startswith("| "):
            assert len({line.count(" | ") for line in part.splitlines()}) == 1
    first, second = (plots.draw_displacement(tmp_path, tmp_path / folder) for folder in "ab")
    assert [p.name for p in first] == ["displacement-ldr-cpu.svg", "displacement-products.svg", "toeplitz-solve.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert "rival: slope 2.00" in first[2].read_text(encoding="utf-8")


def test_committed_page_and_plots_are_made_from_the_committed_results(script):
    pytest.importorskip("matplotlib")
    text, path = ldr_page.page(RESULTS), ROOT / "docs" / ldr_page.NAME
    hint = "run python benchmarks/plots.py --docs"
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text, hint
    plots = script("plots")
    static = ROOT / "docs" / "_static"
    for name, rows in plots.displacement_rows(RESULTS).items():
        assert f"rows {plots.digest(rows)}" in (static / f"{name}.svg").read_text(encoding="utf-8"), hint


def test_means_and_slopes():
    rows = [
        {"data": "d", "structure": s, "status": "ok", "accuracy": a, "rate": 0.1, "layer_params": 5, "params": 6}
        for s, a in (("x", 50), ("x", 60), ("y", 70))
    ]
    rows.append(rows[-1] | {"structure": "z", "status": "error: no", "accuracy": None})
    x, y, z = ldr_results.summarise(rows, [{"structure": "x", "status": "ok", "p50_ms": 2.0}])
    assert (x["accuracy"], x["runs"], x["step_ms"]) == (55, 2, 2.0)
    assert x["std"] == pytest.approx(50**0.5)
    assert (y["std"], y["step_ms"]) == (None, None)
    assert (z["accuracy"], z["runs"], z["status"]) == (None, 0, "error: no")
    assert ldr_results.slope([(n, 3e-6 * n**1.5) for n in (4, 8, 64)]) == pytest.approx(1.5)
    assert ldr_results.slope([(4, 1.0), (8, 2.0)]) is None
