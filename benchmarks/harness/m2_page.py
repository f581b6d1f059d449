"""docs/m2_results.md, made from the committed result files of the M2 benchmarks alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.ldr_page import committed, step_times
from harness.page import _cell, _table, _versions
from harness.training_page import _digits, _number

Row = dict[str, Any]
NAME = "m2_results.md"
START = """# M2 against attention: measured

What models without attention learn and cost beside transformers of as many parameters. The long convolutions run the
kernels of [their own page](convolution_results.md). This page is made by `python benchmarks/plots.py --docs` from the
files in `benchmarks/results/`; `benchmarks/README.md` says how to make those."""


def page(results: Path) -> str | None:
    """The whole page; None while no results are committed."""
    parts = [
        _trainings(*run, step_times(results, run[0]), _timed(results, run[0]))
        for run in committed(results, "train-m2-*")
    ]
    parts += [_bert(*run) for run in committed(results, "m2-bert-*")]
    return "\n\n".join([START, *parts]) + "\n" if parts else None


def best(runs: Sequence[Row]) -> list[Row]:
    """The good trainings, of each task and model only those at its best rate: least bits per byte, most per cent."""
    found: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for run in runs:
        if run["status"] == "ok":
            found.setdefault((run["task"], run["model"]), {}).setdefault(run["lr"], []).append(run)
    kept = []
    for (task, _), rates in found.items():
        sign = -1 if task.startswith("text") else 1
        kept += max(rates.values(), key=lambda some: sign * sum(r["score"] for r in some) / len(some))
    return kept


def _timed(results: Path, name: str) -> str:
    """Of what code the steps' times are."""
    path = results / f"step-times-{name.removeprefix('train-')}.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return f", timed at commit {facts['commit'][:10]}" if facts.get("commit") else ""


def _trainings(name: str, facts: dict[str, Any], rows: list[Row], times: list[Row], timed: str) -> str:
    parts = [
        f"## Trainings, on {facts['device']}",
        "\n\n".join([_versions(name, facts), *map(_earlier, facts.get("before", []))]),
        "Byte-level language models on English prose, windows of 512 or 4096 bytes, 32,768 bytes a step, the last 5 % "
        "of the text held out: **bits per byte**, lower is better. Multi-query associative recall (8 pairs in 64 "
        "tokens out of 512, two layers of 64 channels) and Fashion-MNIST: **accuracy** in per cent. Transformers: "
        "`structmat.models.GPT` and `VisionTransformer` (scaled_dot_product_attention); M2 has dense projections and "
        "block-diagonal MLPs in 4 blocks. AdamW, warm-up and cosine, bfloat16 autocast, the same "
        f"rate for both; for recall the best of {', '.join(f'{lr:g}' for lr in facts['rates']['recall'])} for each. "
        "Trainings share the GPU; times of steps are measured apart, both models in turn, and are those of CUDA "
        f"graphs{timed}. One seed: small differences mean nothing.",
        f"![trainings](_static/m2-{name.removeprefix('train-m2-')}.svg)\n\nHeld-out bits per byte by steps and by time "
        "of quiet steps.",
    ]
    runs = best(facts["runs"])
    quiet = {(r["task"], r["model"], r["mode"]): r for r in times if r["status"] == "ok"}
    lines = []
    for run in sorted(runs, key=lambda r: (r["task"].split(",")[0] != "text", r["task"], r["model"])):
        step, infer = (quiet.get((run["task"], run["model"], mode), {}) for mode in ("training", "inference"))
        what = "bits per byte" if run["task"].startswith("text") else "%"
        cells = [run["task"], run["model"], _number(run["params"]), f"{run['lr']:g}", run["steps"]]
        cells += [f"{run['score']:.{3 if what != '%' else 2}f} {what}", _digits(step.get("p50_ms"), 2)]
        cells += [_digits(step.get("speedup"), 2), _digits(infer.get("p50_ms"), 2), _digits(infer.get("speedup"), 2)]
        lines.append([*cells, _number(step.get("peak_mb"))])
    header = ("task", "model", "parameters", "rate", "steps", "held out", "step ms", "× attention", "forward ms")
    parts.append(_table((*header, "× attention", "peak MB"), lines, 2))
    parts.append(_words(runs, quiet))
    bad = [[r["task"], r["model"], f"{r['lr']:g}", _cell(r["status"])] for r in rows if r["status"] != "ok"]
    if bad:
        parts.append("### Not trained\n\n" + _table(("task", "model", "rate", "why"), bad, 99))
    return "\n\n".join(part for part in parts if part)


def _earlier(facts: dict[str, Any]) -> str:
    return (
        f"{facts['trainings']} of the trainings are of an earlier run: {facts['date']}, torch {facts['torch']}, "
        f"{facts['device']}, "
        + (f"commit {facts['commit'][:10]}." if facts["commit"] else f"sources {facts['sources']}.")
    )


def _words(runs: Sequence[Row], quiet: dict[tuple[str, str, str], Row]) -> str:
    """Where M2 loses and wins, in words."""
    scores: dict[str, dict[str, float]] = {}
    for run in runs:
        scores.setdefault(run["task"], {})[run["model"]] = run["score"]
    worse, better = [], []
    for task, found in scores.items():
        if len(found) == 2:
            ahead = (found["M2"] - found["attention"]) * (-1 if task.startswith("text") else 1) > 0
            (better if ahead else worse).append(task)
    slow = [task for task, model, mode in quiet if (model, mode) == ("M2", "training")]
    slow = [task for task in slow if quiet[task, "M2", "training"]["speedup"] < 1]
    named = [
        f"M2 ends better than attention in: {'; '.join(better) or 'none'}",
        f"worse in: {'; '.join(worse) or 'none'}",
        f"its training steps are slower in: {'; '.join(slow) or 'none'}",
    ]
    return "\n".join(f"- {words[0].upper()}{words[1:]}." for words in named)


def _bert(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    parts = [
        f"## M2-BERT-80M beside BERT-base, on {facts['device']}",
        _versions(name, facts),
        f"Encoders without heads, batches of {facts['arguments']['tokens']:,} tokens without padding. Forward: "
        "bfloat16 weights; forward and backward: float32 weights under bfloat16 autocast. BERT is transformers' own, "
        "once with torch's scaled_dot_product_attention (sdpa) and once with the attention it had before. Taps kept: "
        "under `structmat.nn.cache_taps`, which makes the filters once. Above 1 is faster.",
    ]
    header = ("tokens", "model", "tokens/s", "ms", "× sdpa", "× eager attention", "peak MB")
    for mode in dict.fromkeys(r["mode"] for r in rows):
        lines = []
        for r in rows:
            if r["mode"] == mode:
                good = r["status"] == "ok"
                cells = [_number(r["tokens_per_second"]), _digits(r["p50_ms"], 1), _digits(r["speedup"], 2)]
                cells += [_digits(r["speedup_eager"], 2), _number(r["peak_mb"])]
                lines.append([r["length"], r["model"], *(cells if good else [_cell(r["status"]), "", "", "", ""])])
        parts.append(f"### {mode[0].upper()}{mode[1:]}\n\n" + _table(header, lines, 2))
    return "\n\n".join(parts)
