"""Figures of displacement structure: accuracy of hidden layers, time against n of products and solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness.ldr_page import label
from harness.ldr_results import curves, fitted, slope, summarise

Row = dict[str, Any]
OURS, DENSE, SMALL, OTHER = "#1b6ca8", "black", "#8d99ae", "#2a9d8f"
COLORS = {"dense": DENSE, "small": SMALL, "lowrank": SMALL, "ldr-sd": "#d1495b", "ldr-td": "#d1495b"}
METHODS = {
    "structmat.Toeplitz": (OURS, "o"),
    "structmat.Toeplitz.solve": (OURS, "o"),
    "elimination": ("#7b2cbf", "v"),
    "levinson": (OTHER, "D"),
    "torch dense": (DENSE, "s"),
    "torch dense LU": (DENSE, "s"),
    "three FFTs, scipy": (SMALL, "+"),
    "three FFTs, numpy": (SMALL, "x"),
}


def trainings(rows: Sequence[Row]) -> Figure:
    """Test accuracy of every structure, a panel for each data set."""
    summary = [r for r in summarise(rows, []) if r["accuracy"] is not None]
    data = list(dict.fromkeys(r["data"] for r in summary))
    figure, grid = plt.subplots(1, max(1, len(data)), figsize=(9, 3.8), layout="constrained", squeeze=False)
    for axes, name in zip(grid[0], data, strict=False):
        mine = [r for r in summary if r["data"] == name]
        for y, r in enumerate(mine):
            color = COLORS.get(r["structure"], OURS)
            axes.errorbar(r["accuracy"], y, xerr=r["std"] or 0, color=color, marker="o", markersize=5, capsize=3)
        names = [f"{label(r['structure'])} ({r['layer_params']:,})" for r in mine]
        axes.set_yticks(range(len(mine)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(title=name, xlabel="test accuracy, %")
    return figure


def against_n(rows: Sequence[Row], what: str) -> Figure:
    """Time against n of "products" or "solves", with fitted lines and their slopes, a panel for each kind."""
    group = "vectors" if what == "products" else "matrix"
    values = list(dict.fromkeys(r[group] for r in rows))
    figure, grid = plt.subplots(1, len(values), figsize=(5 * len(values), 4.8), layout="constrained", squeeze=False)
    for axes, value in zip(grid[0], values, strict=True):
        for name, points in curves(rows, group, value).items():
            color, marker = METHODS.get(name, ("#d1495b", "^"))
            used = fitted(what, name, points)
            steep = slope(used)
            words = name if steep is None else f"{name}: slope {steep:.2f}"
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=4, label=words)
            if steep is not None:
                start = sum(math.log(t) - steep * math.log(n) for n, t in used) / len(used)
                ends = [used[0][0], used[-1][0]]
                axes.plot(ends, [math.exp(start) * n**steep for n in ends], color=color, linewidth=1)
        axes.set(title=_title(group, value), xlabel="n", ylabel="seconds", yscale="log")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def _title(group: str, value: Any) -> str:
    if group == "matrix":
        return f"{value} entries"
    return "one vector" if value == 1 else f"{value} vectors"
