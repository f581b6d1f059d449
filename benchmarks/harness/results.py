"""What follows from the trainings' curves and the quiet times of their steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from harness.training import first_reaching

Row = dict[str, Any]
IMAGES = (
    *("model", "structure", "ratio", "share", "params", "accuracy", "std", "runs", "step_ms", "per_second"),
    *("infer_per_second", "speedup", "speedup_compiled", "peak_mb", "epochs_to_dense", "seconds_to_dense", "status"),
)
TEXT = (
    *("variant", "share", "params", "bits_per_byte", "runs", "step_ms", "seconds", "seconds_to_dense", "exchange"),
    "status",
)


def quiet(rows: Sequence[Row], mode: str = "training", compiled: bool = False) -> dict[tuple[str, str, float], Row]:
    """The good rows of the quiet times by model, structure and ratio."""
    return {
        (r["model"], r["structure"], float(r["ratio"])): r
        for r in rows
        if r["status"] == "ok" and r["mode"] == mode and (str(r["compiled"]) == "True") == compiled
    }


def summarise_images(facts: dict[str, Any], times: Sequence[Row]) -> list[Row]:
    """A row for each model and structure, with the keys of ``IMAGES``; None where there is nothing to say.

    ``accuracy`` is that after the last epoch, the mean over the seeds. ``epochs_to_dense`` is the first epoch after
    which the mean over the seeds is at least the dense model's ``accuracy``; ``seconds_to_dense`` is as many epochs of
    quiet steps.
    """
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for run in facts.get("runs", []):
        groups.setdefault((run["model"], run["structure"], float(run["ratio"])), []).append(run)
    training, inference = quiet(times), quiet(times, "inference")
    means = {key: [statistics.mean(c) for c in zip(*_curves(runs), strict=True)] for key, runs in groups.items()}
    found = []
    for key, runs in groups.items():
        row: Row = dict.fromkeys(IMAGES) | dict(zip(("model", "structure", "ratio"), key, strict=True))
        good = [r for r in runs if r["status"] == "ok"]
        row |= {"runs": len(good), "status": "ok" if good else runs[0]["status"]}
        if good:
            last = [c[-1] for c in _curves(runs)]
            row |= {"share": good[0]["share"], "params": good[0]["params"], "accuracy": statistics.mean(last)}
            row["std"] = statistics.stdev(last) if len(last) > 1 else None
            dense = means.get((key[0], "dense", 1.0))
            row["epochs_to_dense"] = first_reaching(means[key], dense[-1]) if dense else None
        if time := training.get(key):
            row |= {"step_ms": time["p50_ms"], "per_second": time["throughput"], "peak_mb": time["peak_mb"] or None}
            row |= {name: time[name] or None for name in ("speedup", "speedup_compiled")}
            if row["epochs_to_dense"]:
                row["seconds_to_dense"] = row["epochs_to_dense"] * good[0]["steps_per_epoch"] * time["p50_ms"] / 1e3
        if time := inference.get(key):
            row["infer_per_second"] = time["throughput"]
        found.append(row)
    return found


def _curves(runs: Sequence[Row]) -> list[list[float]]:
    return [r["curve"]["accuracy"] for r in runs if r["status"] == "ok"]


def summarise_text(facts: dict[str, Any], times: Sequence[Row]) -> list[Row]:
    """A row for each variant, with the keys of ``TEXT``; None where there is nothing to say.

    Means over the seeds. ``seconds`` is all steps at their quiet times; ``seconds_to_dense`` those until the held-out
    bits per byte are first at most those of the dense model after its last step.
    """
    groups: dict[str, list[Row]] = {}
    for run in facts.get("runs", []):
        groups.setdefault(run["variant"], []).append(run)
    target = mean_curve(groups.get("dense", []))[1][-1:]
    found = []
    for variant, runs in groups.items():
        good = [r for r in runs if r["status"] == "ok"]
        row: Row = dict.fromkeys(TEXT) | {"variant": variant, "runs": len(good)}
        row["status"] = "ok" if good else runs[0]["status"]
        if good:
            steps, bits = mean_curve(good)
            row |= {"share": good[0]["share"], "params": good[0]["params"], "bits_per_byte": bits[-1]}
            if "loss_before" in good[0]:
                row["exchange"] = max(abs(r["loss_after"] - r["loss_before"]) for r in good)
            clock = seconds_at(good[0], steps, facts, times)
            if clock:
                row["seconds"], row["step_ms"] = clock[-1], 1e3 * clock[-1] / steps[-1]
                at = first_reaching([-b for b in bits], -target[0]) if target else None
                row["seconds_to_dense"] = clock[at - 1] if at else None
        found.append(row)
    return found


def mean_curve(runs: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Steps, and the mean held-out bits per byte after them."""
    good = [r["curve"] for r in runs if r["status"] == "ok"]
    if not good:
        return [], []
    return good[0]["steps"], [
        statistics.mean(values) for values in zip(*(c["bits_per_byte"] for c in good), strict=True)
    ]


def seconds_at(run: Row, steps: Sequence[int], facts: dict[str, Any], times: Sequence[Row]) -> list[float] | None:
    """Quiet seconds after so many steps of a run, dense ones after its exchange; None if a time is missing."""
    known = {
        structure: r["p50_ms"] / 1e3 for (model, structure, _), r in quiet(times).items() if model == facts["model"]
    }
    first, then = run["structure"], "dense" if run["half"] is not None else run["structure"]
    if first not in known or then not in known:
        return None
    half = steps[-1] if run["half"] is None else run["half"]
    return [min(s, half) * known[first] + max(0, s - half) * known[then] for s in steps]


def cells(rows: Sequence[Row], names: Sequence[str]) -> list[list[Any]]:
    """Rows as the cells of a table, numbers short."""
    return [[_short(row[name]) for name in names] for row in rows]


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value[:60]
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else value
