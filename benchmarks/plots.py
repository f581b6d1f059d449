"""Make the plots, and with --docs the pages of results in docs.

    python benchmarks/plots.py [--docs]

All from the committed results; the same files make the same pages. A plot names the digest of the rows that it was made
from.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import matplotlib
from harness import conv_page, ldr_page, m2_page, training_page
from harness.cases.linear import FOUR, SQRT
from harness.page import page, runs
from harness.problem import FORWARD, TRAINING

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import ldr_plots, m2_plots, training_plots
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

STYLE = {
    SQRT: ("#1b6ca8", "o"),
    FOUR: ("#d1495b", "s"),
    f"low rank, as large as {SQRT}": ("#8d99ae", "^"),
    f"{SQRT}, PyTorch": ("#1b6ca8", "x"),
    f"{FOUR}, PyTorch": ("#d1495b", "x"),
}
OTHER = {
    "block sparse": ("#1b6ca8", "o"),
    "block sparse + low rank": ("#2a9d8f", "s"),
    "torch BSR": ("#8d99ae", "^"),
    "Hadamard": ("#1b6ca8", "o"),
    "fast-hadamard-transform": ("#8d99ae", "^"),
}
PARAMETERS = {"svg.fonttype": "none", "svg.hashsalt": "structmat", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def digest(rows: list[Row]) -> str:
    """A digest of the rows of a run."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _select(rows: list[Row], **cells: Any) -> list[Row]:
    return [r for r in rows if r["status"] == "ok" and all(r[name] == value for name, value in cells.items())]


def _lines(axes: Axes, rows: list[Row], x: str, y: str, name: str, label: str, dashed: bool = False) -> None:
    points = sorted((r[x], r[y]) for r in rows if r["alternative"] == name and r[y] is not None)
    if points:
        color, marker = (STYLE | OTHER)[name]
        style = ":" if dashed or name.endswith("PyTorch") else "-"
        axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, markersize=4, label=label)


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str, ticks: list[int], legend: bool = True) -> None:
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    if ylabel != "time over a copy":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def linear(rows: list[Row]) -> plt.Figure:
    """Speed-up and floor ratio of square layers by size, in both directions."""
    figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for column, direction in enumerate((FORWARD, TRAINING)):
        for line, (y, words) in enumerate((("speedup", "speed-up over dense"), ("floor_ratio", "time over the floor"))):
            axes = grid[line][column]
            for name in STYLE:
                for tokens in (8192, 32768) if not name.endswith("PyTorch") else (8192,):
                    some = _select(rows, operation="linear", dtype="bf16", direction=direction, tokens=tokens)
                    _lines(axes, some, "inputs", y, name, f"{name}, T = {tokens}", dashed=tokens > 8192)
            _finish(axes, direction, "n", words, [1024, 2048, 4096, 8192], legend=False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=3)
    return figure


def other(rows: list[Row]) -> plt.Figure:
    """Block-sparse layers by block size, decoding by tokens, Hadamard by size."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    sparse = [
        r | {"block": int(str(r["operation"]).split()[-1])}
        for r in _select(rows, tokens=8192, inputs=4096, dtype="bf16")
        if str(r["operation"]).startswith("block sparse")
    ]
    for direction, dashed in ((FORWARD, False), (TRAINING, True)):
        some = [r for r in sparse if r["direction"] == direction]
        for name in OTHER:
            _lines(grid[0], some, "block", "speedup", name, f"{name}, {direction}", dashed)
    _finish(grid[0], "block sparse, 1/8, n = 4096, T = 8192", "block", "speed-up over dense", [32, 64, 128])
    for name in (SQRT, FOUR):
        for n in (1024, 4096, 8192):
            some = _select(rows, operation="decode", inputs=n, dtype="bf16")
            points = sorted((r["tokens"], r["speedup"]) for r in some if r["alternative"] == name)
            if points:
                color, marker = STYLE[name]
                shade = {1024: 0.35, 4096: 0.65, 8192: 1.0}[n]
                grid[1].plot(
                    *zip(*points, strict=True),
                    color=color,
                    alpha=shade,
                    marker=marker,
                    markersize=4,
                    label=f"{name}, {n}",
                )
    _finish(grid[1], "decoding", "T", "speed-up over dense", [1, 4, 16, 64])
    for tokens in (8192, 32768):
        some = _select(rows, operation="hadamard", direction=FORWARD, dtype="bf16", tokens=tokens)
        copies = {r["inputs"]: r["p50_us"] for r in some if r["kind"] == "copy"}
        some = [r | {"share": r["p50_us"] / copies[r["inputs"]]} for r in some if r["inputs"] in copies]
        for name in OTHER:
            _lines(grid[2], some, "inputs", "share", name, f"{name}, T = {tokens}", tokens > 8192)
    _finish(grid[2], "Hadamard transform", "n", "time over a copy", [1024, 2048, 4096, 8192])
    return figure


def draw(results: Path, folder: Path) -> list[Path]:
    """Write the plots of every GPU run."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(PARAMETERS):
        for name, facts, rows in runs(results, "kernels"):
            if facts["device"].startswith("CPU"):
                continue
            for key, figure in (("linear", linear(rows)), ("other", other(rows))):
                path = folder / f"benchmarks-{name.removeprefix('kernels-')}-{key}.svg"
                metadata = {"Date": None, "Creator": None, "Description": f"rows {digest(rows)}"}
                figure.savefig(path, metadata=metadata)
                plt.close(figure)
                written.append(path)
    return written


def draw_trainings(results: Path, folder: Path) -> list[Path]:
    """Write the plots of every committed training."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(PARAMETERS):
        for kind, figure_of in (("images", training_plots.images), ("text", training_plots.text)):
            for name, facts, times in training_page.trainings(results, kind):
                if facts.get("runs"):
                    path, figure = folder / f"training-{kind}-{name}.svg", figure_of(facts, times)
                    words = f"rows {digest([*facts['runs'], *times])}"
                    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": words})
                    plt.close(figure)
                    written.append(path)
    return written


def displacement_rows(results: Path) -> dict[str, list[Row]]:
    """The rows that the plots of displacement structure are made from, by the plots' names."""
    found = {
        f"displacement-{name.removeprefix('train-')}": rows
        for name, _, rows in ldr_page.committed(results, "train-ldr-*")
    }
    for kind in (ldr_page.PRODUCTS, ldr_page.SOLVES):
        found |= {name: rows for name, _, rows in ldr_page.committed(results, kind)}
    return found


def draw_displacement(results: Path, folder: Path) -> list[Path]:
    """Write the plots of trainings, products and solves with displacement structure."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    kinds = {ldr_page.PRODUCTS: "products", ldr_page.SOLVES: "solves"}
    with plt.rc_context(PARAMETERS):
        for name, rows in displacement_rows(results).items():
            figure = ldr_plots.against_n(rows, kinds[name]) if name in kinds else ldr_plots.trainings(rows)
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": f"rows {digest(rows)}"})
            plt.close(figure)
            written.append(path)
    return written


def m2_rows(results: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    """The trainings and the quiet times that the plots of M2 are made from, by the plots' names."""
    return {
        name.removeprefix("train-"): (facts["runs"], ldr_page.step_times(results, name))
        for name, facts, _ in ldr_page.committed(results, "train-m2-*")
    }


def draw_m2(results: Path, folder: Path) -> list[Path]:
    """Write the plots of the M2 trainings."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(PARAMETERS):
        for name, (trained, times) in m2_rows(results).items():
            figure, path = m2_plots.trainings(trained, times), folder / f"{name}.svg"
            words = f"rows {digest([*trained, *times])}"
            figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": words})
            plt.close(figure)
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="also write the pages")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "_static", help="folder of the plots")
    args = parser.parse_args()
    for make in (draw, draw_trainings, draw_displacement, draw_m2):
        for path in make(args.results, args.out):
            print(path)
    if args.docs:
        target = ROOT / "docs" / "benchmarks.md"
        target.write_text(page(args.results), encoding="utf-8")
        print(target)
        for module in (training_page, ldr_page, m2_page, conv_page):
            if text := module.page(args.results):
                target = ROOT / "docs" / module.NAME
                target.write_text(text, encoding="utf-8")
                print(target)


if __name__ == "__main__":
    main()
