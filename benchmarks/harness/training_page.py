"""docs/sparse_training_results.md, made from the committed result files of the trainings and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.page import _cell, _table, _versions, runs
from harness.report import read_rows
from harness.results import quiet, summarise_images, summarise_text

Row = dict[str, Any]
NAME = "sparse_training_results.md"
START = Path(__file__).with_name("training_start.md")


def trainings(results: Path, kind: str) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """(device's short name, facts, rows of the quiet times) of every committed run: of "images" or "text".

    A run of times alone counts too; its facts have no runs.
    """
    names = {path.stem.split(f"-{kind}-", 1)[1] for path in results.glob(f"*-{kind}-*.json")}
    found = []
    for name in sorted(names):
        files = [results / f"{what}-{kind}-{name}.json" for what in ("train", "step-times")]
        facts = next(json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists())
        times = files[1].with_suffix(".csv")
        found.append((name, facts, read_rows(times) if times.exists() else []))
    return found


def page(results: Path) -> str | None:
    """The whole page; None while no results are committed."""
    parts = [_images(results, *run) for run in trainings(results, "images")]
    parts += [_text(results, *run) for run in trainings(results, "text")]
    return "\n\n".join([START.read_text(encoding="utf-8").rstrip(), *parts]) + "\n" if parts else None


def _about(results: Path, kind: str, name: str) -> str:
    """What the machine was, of the trainings and of the times."""
    lines = []
    for what, words in (("train", "Trainings"), ("step-times", "Times")):
        for run, facts, _ in runs(results, f"{what}-{kind}"):
            if run == f"{what}-{kind}-{name}":
                lines.append(f"{words}: {_versions(run, facts)}")
    return "\n\n".join(lines)


# -------------------------------------------------------------------- images
def _images(results: Path, name: str, facts: dict[str, Any], times: list[Row]) -> str:
    parts = [f"## Fashion-MNIST on {facts['device']}", _about(results, "images", name)]
    rows = summarise_images(facts, times)
    if facts.get("runs"):
        rates = ", ".join(f"{facts['rates'][model]:g} ({model})" for model in facts["sizes"])
        size = next(iter(facts["sizes"].values()))
        parts += [
            f"Dimension {size['dim']}, {size['depth']} blocks, patches of {size['patch']}, batches of {size['batch']}; "
            f"{facts['epochs']} epochs; learning rate {rates}.",
            _pilot(facts),
            f"![accuracy](_static/training-images-{name}.svg)\n\nAccuracy after the last epoch by parameters, and "
            "after every epoch by time.",
        ]
    for model in dict.fromkeys(r["model"] for r in rows):
        parts.append(f"### {model}\n\n" + _image_table([r for r in rows if r["model"] == model]))
        parts.append(_losses([r for r in rows if r["model"] == model]))
    parts.append(_wide(facts, times))
    parts.append(_missing(facts, ("model", "structure", "ratio")))
    return "\n\n".join(part for part in parts if part)


def _pilot(facts: dict[str, Any]) -> str:
    """What the dense models did at every rate, on training images that they were not trained on."""
    rows = facts.get("pilot")
    if not rows:
        return ""
    table = _table(
        ("model", "learning rate", "accuracy, %"), [[r["model"], f"{r['lr']:g}", r["accuracy"]] for r in rows]
    )
    return (
        f"Pilots: dense models, {rows[0]['epochs']} epochs of half of the training images, tested on the other half; "
        f"all structures take the best rate.\n\n{table}"
    )


def _image_table(rows: Sequence[Row]) -> str:
    header = ("layers", "parameters", "share", "accuracy, %", "step ms", "images/s", "× dense", "× compiled dense")
    header += ("inference/s", "peak MB", "epochs to dense", "seconds to dense")
    lines = []
    for r in rows:
        if r["accuracy"] is None:
            lines.append([_layers(r), "", "", "not trained"])
            continue
        spread = f" ± {r['std']:.2f}" if r["std"] is not None else ""
        cells = [_layers(r), _number(r["params"]), _digits(r["share"], 3), f"{r['accuracy']:.2f}{spread}"]
        cells += [_digits(r["step_ms"], 2), _number(r["per_second"]), _digits(r["speedup"], 2)]
        cells += [_digits(r["speedup_compiled"], 2), _number(r["infer_per_second"]), _number(r["peak_mb"])]
        lines.append([*cells, r["epochs_to_dense"] or "never", _digits(r["seconds_to_dense"], 1)])
    lines = [[*line, *[""] * (len(header) - len(line))] for line in lines]
    return _table(header, lines)


def _layers(row: Row) -> str:
    words = {"lowrank": "low rank", "monarch": "Monarch", "pixelfly": "Pixelfly"}.get(
        row["structure"], row["structure"]
    )
    return words if row["structure"] == "dense" else f"{words}, {row['ratio']:g}"


def _losses(rows: Sequence[Row]) -> str:
    """In words, what is worse than dense."""
    dense = next((r for r in rows if r["structure"] == "dense"), None)
    if dense is None:
        return ""
    others = [r for r in rows if r is not dense]
    slow = [r for r in others if r["speedup"] and r["speedup"] < 1]
    timed = [r for r in others if r["speedup"]]
    compiled = [r for r in others if r["speedup_compiled"] and r["speedup_compiled"] < 1]
    scored = [r for r in others if r["accuracy"] is not None]
    parts = []
    if timed:
        parts.append(f"{len(slow)} of {len(timed)} take longer for a step than dense" + _named(slow))
        if dense["speedup_compiled"]:
            parts.append(f"{len(compiled)} longer than dense with `torch.compile`")
    if scored and dense["accuracy"] is not None:
        worse = [r for r in scored if r["accuracy"] < dense["accuracy"]]
        parts.append(f"{len(worse)} of {len(scored)} end below dense's accuracy" + _named(worse))
    return "; ".join(parts) + "." if parts else ""


def _named(rows: Sequence[Row]) -> str:
    return f" ({', '.join(_layers(r) for r in rows)})" if 0 < len(rows) < 6 else ""


def _wide(facts: dict[str, Any], times: Sequence[Row]) -> str:
    """Times of models that were not trained."""
    trained = {run["model"] for run in facts.get("runs", [])}
    training, inference = quiet(times), quiet(times, "inference")
    lines = []
    for key, r in training.items():
        if r["model"] in trained:
            continue
        other = inference.get(key, {})
        cells = [r["model"], _layers(r), _number(r["params"]), _digits(r["share"], 3), _digits(r["p50_ms"], 2)]
        cells += [_digits(r[name], 2) for name in ("speedup", "speedup_compiled")]
        cells += [_digits(other.get(name), 2) for name in ("p50_ms", "speedup", "speedup_compiled")]
        lines.append([*cells, _number(r["peak_mb"])])
    if not lines:
        return ""
    header = ("model", "layers", "parameters", "share", "step ms", "× dense", "× compiled dense", "inference ms")
    title = "### Times of other sizes\n\nNot trained: times only.\n\n"
    return title + _table((*header, "× dense", "× compiled dense", "peak MB"), lines, 2)


# -------------------------------------------------------------------- text
def _text(results: Path, name: str, facts: dict[str, Any], times: list[Row]) -> str:
    parts = [f"## A byte-level GPT on {facts['device']}", _about(results, "text", name)]
    size, rows = facts["size"], summarise_text(facts, times)
    if rows:
        total = facts["steps"] * size["batch"] * size["context"]
        parts += [
            f"Dimension {size['dim']}, {size['depth']} blocks, {size['heads']} heads, context {size['context']}; "
            f"{facts['steps']} steps of {size['batch']} windows, {total / 1e6:.1f} million bytes; structured layers "
            f"have at most {facts['arguments']['ratio']:g} of the parameters; learning rate "
            f"{facts['arguments']['lr']:g}.",
            f"![bits per byte](_static/training-text-{name}.svg)\n\nHeld-out bits per byte by steps and by time.",
        ]
        header = ("layers", "parameters", "share", "bits per byte", "step ms", "seconds of all steps")
        header += ("seconds to dense", "change of the loss at the exchange")
        lines = []
        for r in rows:
            cells = [r["variant"], _number(r["params"]), _digits(r["share"], 3)]
            cells += [
                _digits(r["bits_per_byte"], 4) or "not trained",
                _digits(r["step_ms"], 2),
                _digits(r["seconds"], 1),
            ]
            reached = _digits(r["seconds_to_dense"], 1) or ("never" if r["seconds"] else "")
            lines.append([*cells, reached, "" if r["exchange"] is None else f"{r['exchange']:.1e}"])
        parts.append(_table(header, lines))
    training, inference = quiet(times), quiet(times, "inference")
    header = ("layers", "step ms", "× dense", "× compiled dense", "bytes/s", "peak MB", "inference ms", "× dense")
    lines = [
        [
            *(_layers(r), *(_digits(r[name], 2) for name in ("p50_ms", "speedup", "speedup_compiled"))),
            *(_number(r["throughput"]), _number(r["peak_mb"])),
            *(_digits(inference.get(key, {}).get(name), 2) for name in ("p50_ms", "speedup")),
        ]
        for key, r in training.items()
    ]
    if lines:
        parts.append("### Times of steps\n\n" + _table(header, lines))
    parts.append(_missing(facts, ("variant",)))
    return "\n\n".join(part for part in parts if part)


# -------------------------------------------------------------------- cells
def _missing(facts: dict[str, Any], names: Sequence[str]) -> str:
    """Runs that failed or were left out, with how many seeds it were."""
    counts: dict[tuple[str, ...], int] = {}
    for r in facts.get("runs", []):
        if r["status"] != "ok":
            key = (*(str(r[name]) for name in names), _cell(r["status"]))
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return ""
    lines = [[*key[:-1], count, key[-1]] for key, count in counts.items()]
    return "### Not trained\n\n" + _table((*names, "seeds", "why"), lines, 99)


def _digits(value: Any, digits: int) -> str:
    return "" if value in (None, "") else f"{value:.{digits}f}"


def _number(value: Any) -> str:
    return "" if value in (None, "") else f"{value:,.0f}"
