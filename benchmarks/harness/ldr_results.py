"""What follows from the trainings of hidden layers, and from times against n."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
SUMMARY = ("data", "structure", "layer_params", "params", "rate", "accuracy", "std", "runs", "step_ms", "status")


def summarise(rows: Sequence[Row], times: Sequence[Row]) -> list[Row]:
    """A row for each data set and structure, in the order of the rows: means over the seeds; None where unknown."""
    steps = {r["structure"]: r["p50_ms"] for r in times if r["status"] == "ok"}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["structure"]), []).append(row)
    found = []
    for (data, structure), runs in groups.items():
        good = [r for r in runs if r["status"] == "ok"]
        row: Row = dict.fromkeys(SUMMARY) | {"data": data, "structure": structure, "runs": len(good)}
        row |= {"rate": runs[0]["rate"], "step_ms": steps.get(structure)}
        row["status"] = "ok" if good else runs[0]["status"]
        if good:
            scores = [float(r["accuracy"]) for r in good]
            row |= {"accuracy": statistics.mean(scores), "std": statistics.stdev(scores) if len(good) > 1 else None}
            row |= {name: good[0][name] for name in ("layer_params", "params")}
        found.append(row)
    return found


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """That of log time over log n, by least squares; None for fewer than three points."""
    if len(points) < 3:
        return None
    x, y = zip(*((math.log(n), math.log(t)) for n, t in points), strict=True)
    return statistics.linear_regression(x, y).slope


def curves(rows: Sequence[Row], group: str, value: Any) -> dict[str, list[tuple[int, float]]]:
    """(n, median seconds) by method, of the rows with this value in the column ``group``."""
    found: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        if r[group] == value and r["p50_s"]:
            found.setdefault(r["method"], []).append((int(r["n"]), float(r["p50_s"])))
    return {name: sorted(points) for name, points in found.items()}


def fitted(what: str, method: str, points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that a slope is fitted to: large ones, where calls cost nothing beside the work."""
    least = 2**11 if what == "solves" else 2**10 if method == "torch dense" else 2**13
    return [p for p in points if p[0] >= least]
