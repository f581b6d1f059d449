"""The scripts that train, in small on the CPU: their results, runs that fail, a budget, the page and the plots."""

import argparse
import contextlib
import dataclasses
import gzip
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import image_task, pool, report, results, structures, training, training_page
from harness.images import ImagePlan, load, made_up
from harness.models import Size, build
from harness.text import Text, TextPlan, loss_of, read_bytes

import structmat

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """Idx files of images in ten classes that are easy to tell apart, one of them gzipped."""
    folder, generator = tmp_path_factory.mktemp("idx"), torch.Generator().manual_seed(0)
    for part, count in (("train", 96), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for i, label in enumerate(labels.tolist()):
            images[i, 2 * label + 4 : 2 * label + 6] += 150
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            data = head + values.to(torch.uint8).numpy().tobytes()
            if kind == "images-idx3" and part == "train":
                (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
            else:
                (folder / f"{part}-{kind}-ubyte").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt.gz"
    path.write_bytes(gzip.compress(b"the quick brown fox jumps over the lazy dog. " * 200))
    return path


@pytest.fixture(scope="module")
def images_run(script, idx, tmp_path_factory):
    """A run of train_images.py: its folder and its exit status."""
    out = tmp_path_factory.mktemp("images")
    given = ["--data", str(idx), "--smoke", "--device", "cpu", "--out", str(out), "--jobs", "0", "--seconds", "0"]
    given += [
        "--structures",
        "dense",
        "monarch",
        "pixelfly",
        "--ratios",
        "0.5",
        "0.125",
        "--seeds",
        "2",
        "--batch",
        "8",
    ]
    return out, script("train_images").main(given)


@pytest.fixture(scope="module")
def text_run(script, prose, tmp_path_factory):
    out = tmp_path_factory.mktemp("text-run")
    given = ["--text", str(prose), "--smoke", "--device", "cpu", "--out", str(out), "--jobs", "0", "--seconds", "0"]
    return out, script("train_text").main([*given, "--ratio", "0.5"])


def read(out, name):
    facts = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return report.read_rows(out / f"{name}.csv"), facts


# ---------------------------------------------------------------- whole runs
def test_images_have_a_row_for_every_training(images_run):
    out, status = images_run
    rows, facts = read(out, "train-images-cpu")
    assert status == 0
    assert facts["complete"] is True
    assert facts["torch"] == torch.__version__
    assert facts["arguments"]["seeds"] == 2
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        over = row["ratio"] == 0.125
        assert row["status"].startswith("error: BudgetError" if over else "ok")
        if not over:
            assert 0 <= row["accuracy"] <= 100
            assert row["share"] <= row["ratio"] * (1 + 1e-3)  # of Pixelfly gamma is not counted
    dense, monarch = (next(r for r in rows if r["structure"] == s) for s in ("dense", "monarch"))
    assert dense["layer_params"] * monarch["share"] == pytest.approx(monarch["layer_params"], rel=1e-3)
    assert dense["params"] - dense["layer_params"] == monarch["params"] - monarch["layer_params"]
    runs = [r for r in facts["runs"] if r["status"] == "ok"]
    for run in runs:
        assert len(run["curve"]["accuracy"]) == len(run["curve"]["train_loss"]) == facts["epochs"] == 2
        assert all(map(math.isfinite, run["curve"]["train_loss"]))
        assert run["graph"] is False
    assert len({tuple(r["curve"]["train_loss"]) for r in runs}) == len(runs)  # seeds and structures differ


def test_images_have_times(images_run):
    rows, facts = read(images_run[0], "step-times-images-cpu")
    assert facts["left_out"] == []
    assert {r["model"] for r in rows} == {"Mixer", "ViT", "Mixer 128"}
    assert {r["mode"] for r in rows} == {"training", "inference"}
    for row in rows:
        if row["status"] == "ok":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["throughput"] > 0
            assert row["speedup"] == 1 or row["structure"] != "dense"
        else:
            assert row["ratio"] == 0.125
    assert any(r["structure"] == "monarch" and r["status"] == "ok" for r in rows)


def test_text_goes_over_to_dense_without_a_change_of_the_loss(text_run):
    out, status = text_run
    rows, facts = read(out, "train-text-cpu")
    assert status == 0
    assert [r["status"] for r in rows] == ["ok"] * 5
    by_name = {r["variant"]: r for r in rows}
    exchanged = by_name["monarch, then dense"]
    assert abs(exchanged["loss_after"] - exchanged["loss_before"]) < 1e-5
    assert exchanged["final_params"] == by_name["dense"]["params"] > exchanged["params"]
    assert by_name["monarch"]["final_params"] == by_name["monarch"]["params"] == exchanged["params"]
    runs = {r["variant"]: r["curve"] for r in facts["runs"]}
    for curve in runs.values():
        assert curve["steps"] == [0, 2, 4, 6, 8]
        assert len(curve["train_bits"]) == 4
        assert 0 < curve["bits_per_byte"][-1] < curve["bits_per_byte"][0] < 9
    first = slice(0, 3)
    assert runs["monarch"]["bits_per_byte"][first] == runs["monarch, then dense"]["bits_per_byte"][first]
    assert runs["monarch"]["bits_per_byte"][3:] != runs["monarch, then dense"]["bits_per_byte"][3:]
    times, _ = read(out, "step-times-text-cpu")
    assert {r["structure"] for r in times} == {"dense", "monarch", "pixelfly", "lowrank"}


def test_failures_are_recorded(script, idx, tmp_path, monkeypatch, capsys):
    images, good = script("train_images"), image_task.build

    def broken(size, structure, *rest):
        if structure == "lowrank":
            raise RuntimeError("no\n luck")
        return good(size, structure, *rest)

    monkeypatch.setattr(image_task, "build", broken)
    given = ["--data", str(idx), "--smoke", "--device", "cpu", "--out", str(tmp_path), "--jobs", "0"]
    given += ["--phases", "train", "--models", "Mixer", "--structures", "dense", "lowrank", "--ratios", "0.5"]
    given += ["--seeds", "1"]
    assert images.main(given) == 1
    rows, _ = read(tmp_path, "train-images-cpu")
    assert [r["status"] for r in rows] == ["ok", "error: RuntimeError: no luck"]
    assert "lowrank 0.5 seed 0: error: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_images", "train_text"])
def test_a_run_without_time_says_what_it_left_out(script, idx, prose, tmp_path, name):
    kind = name.removeprefix("train_")
    data = ["--data", str(idx)] if kind == "images" else ["--text", str(prose)]
    given = [*data, "--smoke", "--device", "cpu", "--out", str(tmp_path), "--jobs", "0", "--budget", "0"]
    assert script(name).main(given) == 0
    rows, facts = read(tmp_path, f"train-{kind}-cpu")
    assert not facts["complete"]
    assert {r["status"] for r in rows} == {pool.LEFT_OUT}
    assert len(facts["left_out"]) == len(rows) > 0
    assert read(tmp_path, f"step-times-{kind}-cpu")[1]["left_out"]


# ---------------------------------------------------------------- page and plots
def test_page_and_plots_of_a_run(script, images_run, text_run, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    for out, _ in (images_run, text_run):
        for path in out.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = training_page.page(tmp_path)
    assert text == training_page.page(tmp_path)
    for words in (
        "### Mixer",
        "### ViT",
        "| Monarch, 0.5 |",
        "### Times of other sizes",
        "monarch, then dense",
        "not trained",
    ):
        assert words in text
    widths = [line.count(" | ") for line in text.split("### Mixer\n")[1].split("\n\n")[1].splitlines()]
    assert len(set(widths)) == 1
    first, second = (plots.draw_trainings(tmp_path, tmp_path / folder) for folder in "ab")
    assert [p.name for p in first] == ["training-images-cpu.svg", "training-text-cpu.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_committed_page_and_plots_are_made_from_the_committed_results(script, tmp_path):
    pytest.importorskip("matplotlib")
    text, path = training_page.page(ROOT / "benchmarks" / "results"), ROOT / "docs" / training_page.NAME
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text, (
        "run python benchmarks/plots.py --docs"
    )
    plots = script("plots")
    for kind in ("images", "text"):
        for name, facts, times in training_page.trainings(ROOT / "benchmarks" / "results", kind):
            if facts.get("runs"):
                plot = (ROOT / "docs" / "_static" / f"training-{kind}-{name}.svg").read_text(encoding="utf-8")
                assert f"rows {plots.digest([*facts['runs'], *times])}" in plot


def test_what_follows_from_curves_and_times():
    def run(structure, ratio, seed, *accuracy):
        curve = {"accuracy": list(accuracy)}
        facts = {"model": "M", "structure": structure, "ratio": ratio, "seed": seed, "curve": curve, "status": "ok"}
        return facts | {"share": ratio, "params": 10, "steps_per_epoch": 100}

    runs = [run("dense", 1.0, 0, 50, 60, 70), run("dense", 1.0, 1, 50, 60, 72)]
    runs += [run("monarch", 0.5, 0, 60, 70, 71), run("monarch", 0.5, 1, 60, 72, 60), run("lowrank", 0.5, 0, 1, 2, 3)]
    runs.append({"model": "M", "structure": "lowrank", "ratio": 0.25, "seed": 0, "status": "error: no"})
    time_of = {"mode": "training", "compiled": "False", "status": "ok", "throughput": 1, "peak_mb": None}
    time_of |= {"speedup": 2.0, "speedup_compiled": None, "model": "M", "structure": "monarch", "ratio": 0.5}
    rows = results.summarise_images({"runs": runs}, [time_of | {"p50_ms": 5.0}])
    dense, monarch, low, bad = rows
    assert (dense["accuracy"], dense["epochs_to_dense"], dense["seconds_to_dense"]) == (71, 3, None)
    assert dense["std"] == pytest.approx(2**0.5)
    assert (monarch["accuracy"], monarch["epochs_to_dense"]) == (65.5, 2)
    assert monarch["seconds_to_dense"] == pytest.approx(1.0)
    assert low["epochs_to_dense"] is None
    assert (bad["accuracy"], bad["status"]) == (None, "error: no")
    exchange = {"structure": "monarch", "half": 10}
    times = [time_of | {"p50_ms": 5.0}, time_of | {"structure": "dense", "ratio": 1.0, "p50_ms": 20.0}]
    assert results.seconds_at(exchange, [0, 10, 20], {"model": "M"}, times) == pytest.approx([0, 0.05, 0.25])


# ---------------------------------------------------------------- parts
@pytest.mark.parametrize("structure", structures.STRUCTURES)
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
def test_structures_keep_to_their_budget_and_use_it(structure, ratio):
    shapes = {"a": (256, 256), "b": (768, 256), "c": (1024, 256), "d": (256, 1024)}
    found = structures.configs(structure, ratio, shapes)
    for name, (m, n) in shapes.items():
        share = structures.parameters(found, {name: (m, n)}) / (m * n)
        assert share == 1 if structure == "dense" else 0.8 * ratio <= share <= ratio + 1 / (m * n)
    if structure == "pixelfly":
        assert all(config.rank >= 4 for config in found.values())
        assert all(config.max_stride == (1 if ratio == 0.125 else 4) for config in found.values())
    if structure == "butterfly":
        assert found["a"].terms == 8 * ratio
        assert all(len(config.radices) == 3 for config in found.values())


def test_structures_that_do_not_fit_say_so():
    for structure in ("pixelfly", "monarch", "butterfly", "lowrank"):
        with pytest.raises(structmat.BudgetError):
            structures.configs(structure, 0.01, {"a": (32, 32)})
    with pytest.raises(ValueError, match="structure must be one of"):
        structures.configs("toeplitz", 0.5, {"a": (32, 32)})


def test_rates():
    recipe = training.Recipe(1.0, 100, 10, final=0.1, restart=50, restart_warmup=5)
    rates = recipe.rates()
    assert rates[:2] == pytest.approx([0.1, 0.2])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    plain = dataclasses.replace(recipe, restart=None).rates()
    assert rates[:50] == plain[:50]
    assert rates[50:54] == pytest.approx([plain[50 + i] * (i + 1) / 5 for i in range(4)])
    assert rates[54:] == plain[54:]


def test_steps_are_those_of_a_plain_loop():
    """Schedule, clipping and groups, against the same written out; and a restored training begins anew."""
    size = Size("mixer", dim=32, depth=1, batch=8)
    model, _ = build(size, "monarch", 0.5, 0, CPU)
    other, _ = build(size, "monarch", 0.5, 0, CPU)
    plan = ImagePlan(made_up(28, 24, CPU), 8, 0)
    plan.draw()
    recipe = training.Recipe(0.01, 6, 2)
    model.double(), other.double()

    def loss_of_step(run, step):
        x, y = plan.batch_of(step)
        return torch.nn.functional.cross_entropy(run(x.double()), y)

    trained = training.Training(model, loss_of_step, plan.steps, recipe, CPU)
    saved = trained._save()
    for _ in range(6):
        trained()
    optimizer = torch.optim.AdamW(structmat.nn.parameter_groups(other, recipe.decay), betas=recipe.betas)
    losses = []
    for i, rate in enumerate(recipe.rates()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of_step(other, torch.tensor([i % plan.steps]))
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), training.CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert trained.mean_loss() == pytest.approx(sum(losses) / 6, rel=1e-6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    trained._restore(saved)
    fresh, _ = build(size, "monarch", 0.5, 0, CPU)
    assert all(map(torch.equal, model.parameters(), fresh.double().parameters()))
    assert all(v.count_nonzero() == 0 for s in trained.optimizer.state.values() for v in s.values())
    assert trained.done.item() == 0


class FakeCuda:
    """Stands in for torch.cuda: a graph does at a replay what ran under its capture."""

    fails = False

    class Stream:
        def wait_stream(self, other):
            pass

    class CUDAGraph:
        pass

    @staticmethod
    @contextlib.contextmanager
    def graph(graph, stream):
        yield
        if FakeCuda.fails:
            raise RuntimeError("operation not permitted")


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_no_trace(monkeypatch, fails):
    """Weights, the optimizer's state and counters are those of before, at the start and in the middle."""
    for name in ("Stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda, name))
    monkeypatch.setattr(FakeCuda, "fails", fails)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeCuda.Stream)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    size = Size("mixer", dim=32, depth=1, batch=8)
    model, _ = build(size, "lowrank", 0.5, 0, CPU)
    plan = ImagePlan(made_up(28, 24, CPU), 8, 0)
    plan.draw()
    trained = training.Training(model, plan.loss, plan.steps, training.Recipe(0.01, 20, 2), CPU)
    for steps in (0, 4):
        trained.gpu = False
        for _ in range(steps):
            trained.step()
        before = [t.clone() for t in trained._tensors()]
        state = [v.clone() for s in trained.optimizer.state.values() for v in s.values()]
        trained.gpu = True
        trained.capture()
        assert trained.done.item() == steps
        assert all(map(torch.equal, trained._tensors(), before))
        after = [v for s in trained.optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, after, state or [torch.zeros_like(v) for v in after]))
        assert all(p.grad is None for p in model.parameters())
        assert (trained.graph is None) is fails
        assert (trained.why_no_graph == "RuntimeError: operation not permitted") is fails


def test_images_are_shifted_and_flipped(idx):
    images, test = load(idx, CPU)
    assert (len(images), len(test)) == (96, 40)
    plain, labels = images.take(torch.arange(3))
    assert plain.shape == (3, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2]
    shift = torch.tensor([[0, 4]] * 3)
    moved, _ = images.take(torch.arange(3), shift)
    assert torch.equal(moved[..., 2:, :26], plain[..., :26, 2:])
    flipped, _ = images.take(torch.arange(3), flip=torch.tensor([True, False, True]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])
    pilot = load(idx, CPU, 30, pilot=True)
    assert [len(part) for part in pilot] == [15, 15]
    assert torch.equal(pilot[1].labels, images.labels[15:30])
    with pytest.raises(FileNotFoundError, match="no train-images"):
        load(idx / "nothing", CPU)


def test_text_is_split(prose):
    data = read_bytes(prose)
    assert bytes(data[:9].tolist()) == b"the quick"
    text = Text(data, 32, 4, CPU)
    assert text.held.min() == text.split == int(0.95 * len(data))
    assert text.held.max() + 33 == len(data)
    plan = TextPlan(text, 16, 2, 0)
    plan.draw()
    assert plan.starts.max() + 33 <= text.split
    assert torch.equal(plan.windows(torch.tensor([1]))[3], data[plan.starts[1, 3] :][:33].long())
    uniform = torch.nn.Module()
    uniform.forward = lambda x: torch.zeros(*x.shape, 256)
    assert text.bits_per_byte(uniform, 3) == pytest.approx(8)
    assert loss_of(uniform, text.windows(text.held)).item() == pytest.approx(math.log(256))
    with pytest.raises(ValueError, match="must have more than"):
        Text(data[:100], 32, 4, CPU)


ACT = """
import os, time
def act(task):
    if task == "fails":
        raise RuntimeError("no")
    if task == "fatal":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if task == "dies":
        os._exit(3)
    if task == "hangs":
        time.sleep(60)
    return {"status": "ok", "process": os.getpid()}
"""


@pytest.fixture
def act(tmp_path, monkeypatch):
    """What workers do: a function that they can import, as the harness has to be."""
    (tmp_path / "acts_of_workers.py").write_text(ACT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("acts_of_workers").act
    del sys.modules["acts_of_workers"]


def test_tasks_in_this_process(act):
    found = dict(pool.run_tasks(act, ["a", "fails", "b"], 0, time.time() + 60))
    assert [r["status"] for r in found.values()] == ["ok", "error: RuntimeError: no", "ok"]
    assert found["a"]["process"] == os.getpid()


def test_workers_that_fail_die_or_hang_cost_one_task(act):
    tasks = ["a", "fails", "b", "fatal", "c", "dies", "d", "hangs", "e"]
    found = dict(pool.run_tasks(act, tasks, 1, time.time() + 60, patience=3))
    assert list(found) == tasks
    assert {found[name]["status"] for name in "abcde"} == {"ok"}
    assert found["fails"]["status"] == "error: RuntimeError: no"
    assert found["fatal"]["status"].startswith("error: RuntimeError: CUDA error")
    assert found["dies"]["status"] == "error: the process ended with code 3"
    assert found["hangs"]["status"] == "error: the process was ended after 3 s"
    processes = [found[name]["process"] for name in "abcde"]
    assert processes[0] == processes[1]  # an ordinary exception leaves the process as it is
    assert len(set(processes)) == 4
    assert os.getpid() not in processes


def test_workers_share_the_tasks_and_end_in_time(act):
    found = dict(pool.run_tasks(act, ["hangs", "a", "b", "c"], 2, time.time() + 2, patience=60))
    assert found["a"]["process"] == found["b"]["process"] == found["c"]["process"]
    assert found["hangs"]["status"].startswith(f"{pool.LEFT_OUT}, ended after")
    found = dict(pool.run_tasks(act, ["a", "b"], 1, time.time() - 1))
    assert [r["status"] for r in found.values()] == [pool.LEFT_OUT] * 2


def test_rates_of_models(script):
    images = script("train_images")
    parser = argparse.ArgumentParser()
    assert images.rates(["0.1", "ViT=0.2"], parser) == {"Mixer": 0.1, "ViT": 0.2}
    with pytest.raises(SystemExit):
        images.rates(["toeplitz=1"], parser)


def test_the_pilots_best_rate_is_every_structures(images_run):
    rows, facts = read(images_run[0], "train-images-cpu")
    pilot = facts["pilot"]
    assert [(r["model"], r["status"]) for r in pilot] == [("Mixer", "ok")] * 4 + [("ViT", "ok")] * 4
    for model in ("Mixer", "ViT"):
        best = max(r["accuracy"] for r in pilot if r["model"] == model)
        lr = facts["rates"][model]
        assert (best, lr) in {(r["accuracy"], r["lr"]) for r in pilot if r["model"] == model}
        assert {r["lr"] for r in rows if r["model"] == model} == {lr}
