"""Figures of the trainings: accuracy by parameters and by time, bits per byte by steps and by time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.results import mean_curve, quiet, seconds_at, summarise_images

Row = dict[str, Any]
COLORS = {"dense": "black", "pixelfly": "#2a9d8f", "monarch": "#1b6ca8", "butterfly": "#d1495b", "lowrank": "#8d99ae"}
LINES = {1.0: "-", 0.5: "-", 0.25: "--", 0.125: ":"}
EXCHANGED = "#7b2cbf"


def images(facts: dict[str, Any], times: Sequence[Row]) -> Figure:
    """For each model the accuracy by the share of parameters, and by quiet seconds."""
    rows = [r for r in summarise_images(facts, times) if r["accuracy"] is not None]
    models, known = list(dict.fromkeys(r["model"] for r in rows)), quiet(times)
    height = 3.6 * max(1, len(models)) + 0.8
    figure, grid = plt.subplots(max(1, len(models)), 2, figsize=(9, height), layout="constrained", squeeze=False)
    for (left, right), model in zip(grid, models, strict=False):
        mine = [r for r in rows if r["model"] == model]
        for structure in dict.fromkeys(r["structure"] for r in mine):
            some = [r for r in mine if r["structure"] == structure]
            x, y, spread = ([r[name] or 0 for r in some] for name in ("share", "accuracy", "std"))
            left.errorbar(x, y, spread, color=COLORS[structure], marker="o", markersize=4, capsize=2, label=structure)
        left.set(title=model, xlabel="share of the layers' parameters", ylabel="test accuracy, %", xscale="log")
        left.set_xticks([0.125, 0.25, 0.5, 1], ["1/8", "1/4", "1/2", "1"])
        left.minorticks_off()
        seen: list[float] = []
        for r in mine:
            key = model, r["structure"], float(r["ratio"])
            runs = [q for q in facts["runs"] if (q["model"], q["structure"], float(q["ratio"])) == key]
            good = [q for q in runs if q["status"] == "ok"]
            if key in known:
                epoch = good[0]["steps_per_epoch"] * known[key]["p50_ms"] / 1e3
                curve = [statistics.mean(c) for c in zip(*(q["curve"]["accuracy"] for q in good), strict=True)]
                label = r["structure"] if r["ratio"] == 1 else f"{r['structure']}, {r['ratio']:g}"
                style = LINES.get(r["ratio"], "-.")
                x = [epoch * i for i in range(1, len(curve) + 1)]
                seen += curve
                right.plot(x, curve, style, color=COLORS[r["structure"]], linewidth=1.2, label=label)
        right.set(title=model, xlabel="quiet seconds", ylabel="test accuracy, %")
        _upper_part(right, seen)
    if models:
        figure.legend(*grid[0][1].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=5)
        grid[0][0].legend(fontsize=7)
    return figure


def text(facts: dict[str, Any], times: Sequence[Row]) -> Figure:
    """Held-out bits per byte by steps, and by quiet seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    lowest: list[float] = []
    for variant in dict.fromkeys(r["variant"] for r in facts["runs"]):
        runs = [r for r in facts["runs"] if r["variant"] == variant and r["status"] == "ok"]
        if not runs:
            continue
        steps, bits = mean_curve(runs)
        color = EXCHANGED if runs[0]["half"] is not None else COLORS[runs[0]["structure"]]
        left.plot(steps[1:], bits[1:], color=color, label=variant)
        if seconds := seconds_at(runs[0], steps, facts, times):
            right.plot(seconds[1:], bits[1:], color=color, label=variant)
        lowest += bits[1:]
    for axes, words in ((left, "steps"), (right, "quiet seconds")):
        axes.set(xlabel=words, ylabel="held-out bits per byte")
        if lowest:
            ordered = sorted(lowest)
            axes.set_ylim(ordered[0] - 0.05, ordered[round(0.85 * (len(ordered) - 1))] + 0.05)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=7)
    return figure


def _upper_part(axes: Axes, seen: list[float]) -> None:
    """The first epochs would press the last ones together."""
    values = sorted(seen)
    if values:
        axes.set_ylim(values[len(values) // 5] - 0.2, values[-1] + 0.2)
