"""train_m2.py and m2_bert.py in small on the CPU: their results, failures, a budget; the page and plots of M2."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from harness import m2_cases, m2_page, m2_plots, pool, report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(script, prose, tmp_path_factory):
    """Runs of both scripts: their folder and their exit statuses."""
    out = tmp_path_factory.mktemp("m2")
    given = ["--smoke", "--device", "cpu", "--out", str(out), "--seconds", "0"]
    trained = script("train_m2").main([*given, "--text", str(prose), "--jobs", "0"])
    return out, (trained, script("m2_bert").main(given))


def read(out, name):
    return report.read_rows(out / f"{name}.csv"), json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_both_models_of_every_task_are_trained_and_timed(run):
    out, status = run
    assert status == (0, 0)
    rows, facts = read(out, "train-m2-cpu")
    assert {(r["task"], r["model"]) for r in rows} == {
        (task, model) for task in ("text, tiny, 32", "recall, 64") for model in ("attention", "M2")
    }
    assert len(rows) == 2 + 2 * len(facts["rates"]["recall"])
    for row, trained in zip(rows, facts["runs"], strict=True):
        assert row["status"] == "ok"
        assert math.isfinite(row["train_loss"])
        assert trained["curve"]["score"][-1] == trained["score"] == row["score"]
        assert trained["curve"]["steps"] == [1, 2, 3, 4]
    times, _ = read(out, "step-times-m2-cpu")
    assert len(times) == 8
    for row in times:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["speedup"] == 1 or row["model"] == "M2"


def test_bert_rows_compare_with_both_kinds_of_attention(run):
    rows, _ = read(run[0], "m2-bert-cpu")
    assert len(rows) == 2 * (4 + 3)
    for row in rows:
        base = next(
            r for r in rows if r["model"] == "BERT, sdpa" and (r["length"], r["mode"]) == (row["length"], row["mode"])
        )
        assert row["status"] == "ok"
        assert row["speedup"] == pytest.approx(base["p50_ms"] / row["p50_ms"], abs=2e-3)
        assert row["speedup_eager"] > 0


def test_the_page_tells_of_every_task(run):
    text = m2_page.page(run[0])
    for words in (
        "text, tiny, 32",
        "recall, 64",
        "M2-BERT",
        "Forward and backward",
        "M2 ends better than attention in",
    ):
        assert words in text
    assert m2_page.page(RESULTS / "none") is None


def test_the_best_rate_of_a_model_is_shown():
    def trained(task, model, lr, score, status="ok"):
        return {"task": task, "model": model, "lr": lr, "score": score, "status": status}

    runs = [trained("recall, 64", "M2", 0.1, 40), trained("recall, 64", "M2", 0.2, 50)]
    runs += [trained("text, 5M, 512", "M2", 0.1, 1.5), trained("text, 5M, 512", "M2", 0.2, 1.7)]
    runs.append(trained("recall, 64", "M2", 0.3, 99, "error"))
    assert m2_page.best(runs) == [runs[1], runs[2]]


def test_failures_and_a_budget_are_told(script, prose, tmp_path, monkeypatch):
    def broken(self, device, seed):
        raise RuntimeError("no luck")

    monkeypatch.setattr(m2_cases.Case, "make", broken)
    given = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0", "--jobs", "0"]
    given += ["--text", str(prose), "--tasks", "text"]
    assert script("train_m2").main(given) == 1
    rows, _ = read(tmp_path, "train-m2-cpu")
    assert {r["status"] for r in rows} == {"error: RuntimeError: no luck"}
    assert script("train_m2").main([*given, "--budget", "0"]) == 0
    rows, facts = read(tmp_path, "train-m2-cpu")
    assert {r["status"] for r in rows} == {pool.LEFT_OUT}
    assert len(facts["left_out"]) == 2


def test_resuming_trains_what_is_missing(run, script, prose, tmp_path, monkeypatch):
    """And says of which run the others are; other rows stay as they were, to the last digit."""
    for end in ("csv", "json"):
        shutil.copy(run[0] / f"train-m2-cpu.{end}", tmp_path)
    rows, facts = read(tmp_path, "train-m2-cpu")
    lost = next(r for r in rows if (r["task"], r["model"]) == ("recall, 64", "M2"))
    report.write_csv(tmp_path / "train-m2-cpu.csv", [r for r in rows if r is not lost], rows[0])
    facts["runs"] = [r for r in facts["runs"] if not all(r[k] == lost[k] for k in ("task", "model", "seed", "lr"))]
    report.write_json(tmp_path / "train-m2-cpu.json", facts | {"commit": "abc"})
    module = script("train_m2")
    trained, real = [], module.train
    monkeypatch.setattr(module, "train", lambda task: trained.append(task.case) or real(task))
    given = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0", "--jobs", "0"]
    assert module.main([*given, "--text", str(prose), "--phases", "train", "--resume"]) == 0
    assert [(c.name, c.model) for c in trained] == [("recall, 64", "M2")]
    again, facts = read(tmp_path, "train-m2-cpu")
    assert [r for r in again if r["score"] != lost["score"]] == [r for r in rows if r["score"] != lost["score"]]
    assert len(again) == len(rows) == len(facts["runs"])
    assert [(b["commit"], b["trainings"]) for b in facts["before"]] == [("abc", len(rows) - 1)]
    assert f"{len(rows) - 1} of the trainings are of an earlier run" in m2_page.page(tmp_path)


def test_pairs_have_nearly_as_many_parameters():
    found = {}
    for case in m2_cases.cases():
        if case.task != "recall":
            with torch.device("meta"):
                count = sum(p.numel() for p in case.make("meta", 0).parameters())
            found.setdefault(case.name, {})[case.model] = count
    for counts in found.values():
        assert counts["M2"] == pytest.approx(counts["attention"], rel=0.06)


def test_recall_is_scored_by_its_queries():
    plan = m2_cases.RecallPlan(6, 32, 3, 0, CPU)
    plan.draw()
    first = plan.tokens.clone()
    right = torch.nn.functional.one_hot(plan.labels.clamp_min(0), m2_cases.RECALL_VOCABULARY).float()
    rows = iter(right)
    assert plan.accuracy(lambda tokens: next(rows)) == 100
    assert plan.loss(lambda tokens: 100 * right[1], torch.tensor([1])).item() == pytest.approx(0, abs=1e-6)
    plan.draw()
    assert not torch.equal(first, plan.tokens)


def test_committed_page_and_plots_are_made_from_the_committed_results(script):
    pytest.importorskip("matplotlib")
    text, path = m2_page.page(RESULTS), ROOT / "docs" / m2_page.NAME
    hint = "run python benchmarks/plots.py --docs"
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text, hint
    plots = script("plots")
    for name, (trained, times) in plots.m2_rows(RESULTS).items():
        words = f"rows {plots.digest([*trained, *times])}"
        assert words in (ROOT / "docs" / "_static" / f"{name}.svg").read_text(encoding="utf-8"), hint


def test_the_figure_has_a_row_for_every_size(run):
    pytest.importorskip("matplotlib")
    _, facts = read(run[0], "train-m2-cpu")
    figure = m2_plots.trainings(facts["runs"], read(run[0], "step-times-m2-cpu")[0])
    assert [axes.get_title() for axes in figure.axes] == ["tiny parameters"] * 2
    assert all(len(axes.lines) == 2 for axes in figure.axes)
