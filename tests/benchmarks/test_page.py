"""The targets, the page and the plots that are made from result files."""

from pathlib import Path

import pytest
import torch
from harness import cases, measure, page, report, targets

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def gpu_rows():
    """A row for every alternative of every problem of a GPU run; the times are made up."""
    rows = []
    for p in cases.gpu_problems():
        made = p.alternatives(p, torch.device("cuda"))
        slow = p.key == "linear/1024x1024/T8192/bf16/forward"
        for a in made:
            row = measure.row_of(p, a, "ok")
            floor = a.cost.floor_us(p.direction, p.torch_dtype.itemsize, 3000, 800)[0]
            factor = {"dense": 4.0, "ours": 20.0 if slow else 1.3}.get(a.kind, 2.0)
            dense = 4.0 * made[0].cost.floor_us(p.direction, p.torch_dtype.itemsize, 3000, 800)[0]
            row |= {f"p{q}_us": round(factor * floor * (1 + q / 1000), 2) for q in (20, 50, 80)}
            row |= {"repeats": 20, "calls": 4, "sets": 2, "timer": "graph", "floor_us": round(floor, 2)}
            row |= {"floor_ratio": factor, "speedup": round(dense / row["p50_us"], 3), "peak_mb": 1.0}
            row |= {"error": 2e-3, "error_dense": 1.7e-3} if a.exact else {}
            rows.append(row)
    return rows


def test_every_target_finds_its_row(gpu_rows):
    verdicts = targets.evaluate(gpu_rows)
    assert len(verdicts) > 120
    assert [v for v in verdicts if v.met is None] == []
    assert {v.topic for v in verdicts if v.quantity == "error over dense's"} >= {"Error, linear", "Error, block sparse"}
    missed = [
        v for v in verdicts if (v.case, v.tokens) == ("n = 1024, forward", 8192) and v.topic.startswith("Monarch")
    ]
    assert {v.quantity: v.met for v in missed}["time over the floor"] is False
    assert "not met" in targets.summary(verdicts)
    assert all(v.met is None for v in targets.evaluate([]))


def write_run(folder, rows):
    report.write_csv(folder / "kernels-h100-all.csv", rows, measure.COLUMNS)
    facts = {"device": "NVIDIA H100", "torch": "2.11", "date": "2026-01-01", "commit": "0" * 40, "sources": "1"}
    report.write_json(folder / "kernels-h100-all.json", facts | {"copy_gb_s": 3000, "tflop_s": {"bf16": 800}})


def test_page_of_a_run(tmp_path, gpu_rows):
    bad = measure.row_of(cases.gpu_problems()[0], "some | kernel", "error: broken")
    write_run(tmp_path, [*gpu_rows, bad])
    text = page.page(tmp_path)
    assert text == page.page(tmp_path)
    assert "## Kernels on NVIDIA H100" in text
    assert "**, not met" in text
    layers = text.split("\n### Linear\n")[1].split("\n### ")[0].splitlines()
    slow = [line.split(" | ")[:5] for line in layers if line.rstrip(" |").endswith("**do not use here**")]
    assert slow == [
        ["| 1024", "8192", "bf16", "forward", name] for name in ("Monarch sqrt(n) blocks", "Monarch 4 blocks")
    ]
    assert "| some \\| kernel | error: broken |" in text
    for operation in {r["operation"] for r in gpu_rows}:
        assert f"### {operation[0].upper()}{operation[1:]}" in text


def test_plots_of_a_run(script, tmp_path, gpu_rows):
    pytest.importorskip("matplotlib")
    plots = script("plots")
    write_run(tmp_path, gpu_rows)
    first, second = (plots.draw(tmp_path, tmp_path / name) for name in ("a", "b"))
    assert [p.name for p in first] == ["benchmarks-h100-all-linear.svg", "benchmarks-h100-all-other.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert plots.digest(report.read_rows(tmp_path / "kernels-h100-all.csv")) in a.read_text()
    assert sum(p.stat().st_size for p in first) < 200_000


def test_committed_page_is_made_from_the_committed_results():
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page.page(RESULTS), (
        "run python benchmarks/plots.py --docs"
    )


def test_committed_plots_are_made_from_the_committed_results(script):
    plots = script("plots")
    for name, facts, rows in page.runs(RESULTS, "kernels"):
        if not facts["device"].startswith("CPU"):
            for key in ("linear", "other"):
                path = ROOT / "docs" / "_static" / f"benchmarks-{name.removeprefix('kernels-')}-{key}.svg"
                assert f"rows {plots.digest(rows)}" in path.read_text(encoding="utf-8"), f"{path} is of other results"
