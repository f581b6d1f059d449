"""The figure of the M2 trainings: held-out bits per byte by steps, and by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness.m2_page import best

Row = dict[str, Any]
COLORS = {"attention": "black", "M2": "#1b6ca8"}


def trainings(runs: Sequence[Row], times: Sequence[Row]) -> Figure:
    """A row of panels for each size of the language models, of which each length has its style of line."""
    runs = [r for r in best(runs) if r["task"].startswith("text")]
    steps = {
        (r["task"], r["model"]): r["p50_ms"] / 1e3 for r in times if (r["mode"], r["status"]) == ("training", "ok")
    }
    sizes = list(dict.fromkeys(r["task"].split(", ")[1] for r in runs))
    height = 3.4 * max(1, len(sizes)) + 0.5
    figure, grid = plt.subplots(max(1, len(sizes)), 2, figsize=(9, height), layout="constrained", squeeze=False)
    for (left, right), size in zip(grid, sizes, strict=False):
        mine = sorted(
            (r for r in runs if r["task"].split(", ")[1] == size), key=lambda r: int(r["task"].split(", ")[2])
        )
        lengths = list(dict.fromkeys(r["task"].split(", ")[2] for r in mine))
        for r in mine:
            length = r["task"].split(", ")[2]
            style = {"color": COLORS[r["model"]], "linestyle": "-" if length == lengths[0] else "--", "linewidth": 1.2}
            label = f"{r['model']}, {length} bytes"
            x, y = r["curve"]["steps"], r["curve"]["score"]
            left.plot(x, y, label=label, **style)
            if (r["task"], r["model"]) in steps:
                right.plot([steps[r["task"], r["model"]] * i for i in x], y, label=label, **style)
        for axes, words in ((left, "steps"), (right, "seconds of quiet steps")):
            axes.set(title=f"{size} parameters", xlabel=words, ylabel="held-out bits per byte", yscale="log")
            axes.minorticks_off()
            axes.set_yticks([1.5, 2, 3, 4], ["1.5", "2", "3", "4"])
        left.legend(fontsize=7)
    return figure
