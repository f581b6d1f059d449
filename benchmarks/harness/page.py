"""docs/benchmarks.md, made from the committed result files and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.problem import DTYPES, TRAINING
from harness.report import read_rows
from harness.targets import Verdict, evaluate

Row = dict[str, Any]
START = Path(__file__).with_name("page_start.md")


def runs(results: Path, kind: str) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """(name, facts, rows) of every committed run of a kind: "kernels" or "blocks"."""
    found = []
    for path in sorted(results.glob(f"{kind}-*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        found.append((path.stem, facts, read_rows(path.with_suffix(".csv"))))
    return sorted(found, key=lambda run: (run[1]["device"].startswith("CPU"), run[0]))


def page(results: Path) -> str:
    """The whole page."""
    parts = [START.read_text(encoding="utf-8").rstrip()]
    kernels = runs(results, "kernels")
    for name, facts, rows in kernels:
        parts.append(_kernels(name, facts, rows))
    if not any(name != "kernels-cpu" for name, _, _ in kernels):
        parts.append("## On a GPU\n\nNo results are committed yet.")
    for name, facts, rows in runs(results, "blocks"):
        parts.append(_blocks(name, facts, rows))
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], right_from: int = 1) -> str:
    rule = ["---" if i < right_from else "--:" for i in range(len(header))]
    lines = [header, rule, *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _versions(name: str, facts: dict[str, Any]) -> str:
    known = [
        facts["device"],
        f"driver {facts['driver']}" if facts.get("driver") else "",
        f"CUDA {facts['cuda']}" if facts.get("cuda") else "",
        f"torch {facts['torch']}",
        f"triton {facts['triton']}" if facts.get("triton") else "",
        facts["date"],
        f"commit {facts['commit'][:10]}" if facts.get("commit") else f"sources {facts['sources']}",
    ]
    text = ", ".join(part for part in known if part)
    return f"{text}. All rows: `benchmarks/results/{name}.csv`."


def _kernels(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    cpu = facts["device"].startswith("CPU")
    parts = [f"## {'Reference paths on a CPU' if cpu else 'Kernels on ' + facts['device']}", _versions(name, facts)]
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in facts["tflop_s"].items())
    if not cpu:
        parts.append(f"Measured ceilings: copy {facts['copy_gb_s']:g} GB/s; dense products, TFLOP/s: {rates}.")
        parts += [_targets(evaluate(rows)), _pictures(name), _slow(rows)]
    parts += [
        _operation(operation, [r for r in rows if r["operation"] == operation], cpu) for operation in _names(rows)
    ]
    if bad := [row for row in rows if row["status"] != "ok"]:
        lines = [
            (r["operation"], f"{r['inputs']} × {r['outputs']}", r["tokens"], r["dtype"], r["alternative"], r["status"])
            for r in bad
        ]
        header = ("operation", "size", "T", "dtype", "alternative", "why")
        parts.append("### Not measured\n\n" + _table(header, [[_cell(c) for c in line] for line in lines], 6))
    return "\n\n".join(part for part in parts if part)


def _cell(text: Any) -> str:
    return str("" if text is None else text).replace("|", "\\|")


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["operation"] for row in rows))


def _targets(verdicts: list[Verdict]) -> str:
    known = [v for v in verdicts if v.met is not None]
    met = sum(bool(v.met) for v in known)
    unknown = len(verdicts) - len(known)
    lines = [
        f"### Targets\n\n{met} of {len(known)} are met" + (f", {unknown} were not measured" if unknown else "") + "."
    ]
    topics: dict[str, list[Verdict]] = {}
    for v in verdicts:
        if not v.topic.startswith("Error"):
            topics.setdefault(v.topic, []).append(v)
    for topic, some in topics.items():
        tokens = sorted({v.tokens for v in some})
        rows: dict[tuple, dict[int, str]] = {}
        for v in some:
            rows.setdefault((v.case, v.quantity, _wanted(v)), {})[v.tokens] = _said(v)
        cells = [(*key, *(found.get(t, "") for t in tokens)) for key, found in rows.items()]
        header = ("case", "quantity", "target", *(f"T = {t}" for t in tokens))
        lines.append(f"**{topic}**\n\n" + _table(header, cells, 2))
    errors = [
        (v.topic, f"{v.case}, T = {v.tokens}", _wanted(v), _said(v)) for v in verdicts if v.topic.startswith("Error")
    ]
    lines.append("**Errors**\n\n" + _table(("operation", "worst case", "error over dense's", "measured"), errors, 2))
    return "\n\n".join(lines)


def _wanted(v: Verdict) -> str:
    return f"{'≥' if v.at_least else '≤'} {v.wanted:g}"


def _said(v: Verdict) -> str:
    """A measured figure: bold and marked where the target is not met."""
    if v.measured is None:
        return "not measured"
    return f"{v.measured:.2f}" if v.met else f"**{v.measured:.2f}**, not met"


def _pictures(name: str) -> str:
    short = name.removeprefix("kernels-")
    words = {
        "linear": "Speed-up over dense and time over the floor of square layers, bf16.",
        "other": "Speed-up over dense of block-sparse layers and of decoding, and the Hadamard transform over a copy.",
    }
    return "\n\n".join(f"![{text}](_static/benchmarks-{short}-{key}.svg)\n\n{text}" for key, text in words.items())


def _slow(rows: list[Row]) -> str:
    slow = [r for r in rows if r["kind"] == "ours" and r["status"] == "ok" and r["speedup"] and r["speedup"] < 1]
    if not slow:
        return "### Where not to use them\n\nNo row of this run is slower than dense."
    table = [
        [r["operation"], r["alternative"], f"{r['inputs']} × {r['outputs']}"]
        + [r[name] for name in ("tokens", "dtype", "direction", "speedup")]
        for r in sorted(slow, key=lambda r: r["speedup"])
    ]
    header = ("operation", "structure", "size", "T", "dtype", "direction", "× dense")
    return "### Where not to use them\n\nThese are slower than the dense layer that they would replace:\n\n" + _table(
        header, table, 6
    )


def _operation(operation: str, rows: list[Row], cpu: bool) -> str:
    """A table with a row for each structure of this library in each problem, the competition beside it."""
    shown = "reference" if cpu else "ours"
    lines = []
    problems: dict[tuple, list[Row]] = {}
    for r in rows:
        if r["status"] == "ok":
            key = r["dtype"], r["direction"], r["inputs"], r["outputs"], r["tokens"]
            problems.setdefault(key, []).append(r)
    eager = any(r["eager_us"] for r in rows)
    order = [*DTYPES]
    for key, group in sorted(problems.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])):
        dtype, direction, n, m, tokens = key
        dense = next((r for r in group if r["kind"] == "dense"), None)
        for r in group:
            if r["kind"] != shown:
                continue
            others = ", ".join(text for o in group if (text := _other(o, r, shown)))
            use = "**do not use here**" if r["speedup"] and r["speedup"] < 1 else ""
            lines.append(
                [n if n == m else f"{n} → {m}", tokens, dtype, "both" if direction == TRAINING else "forward"]
                + [r["alternative"].removesuffix(", PyTorch"), _time(r), dense and _short(dense["p50_us"]), others]
                + ([] if cpu else [r["floor_ratio"]])
                + [r["speedup"], _errors(r)]
                + ([] if cpu else [r["peak_mb"]])
                + ([_short(r["eager_us"])] if eager and not cpu else [])
                + [use]
            )
    if not lines:
        return ""
    header = ["n", "T", "dtype", "pass", "structure", "µs (p20–p80)", "dense µs", "others µs"]
    header += ([] if cpu else ["× floor"]) + ["× dense", "error (dense's)"] + ([] if cpu else ["peak MB"])
    header += (["eager µs"] if eager and not cpu else []) + [""]
    return f"### {operation[0].upper()}{operation[1:]}\n\n" + _table(header, lines, 0)


def _other(other: Row, row: Row, shown: str) -> str | None:
    """A competitor of a row, in words."""
    if other["kind"] in ("dense", shown):
        return None
    name = other["alternative"]
    if name.startswith(f"{row['alternative']}, "):
        name = name.removeprefix(f"{row['alternative']}, ")
    elif other["kind"] == "low rank":
        structure = name.removeprefix("low rank, as large as ")
        if structure != row["alternative"].removesuffix(", PyTorch"):
            return None
        name = "low rank"
    elif other["kind"] in ("reference", "compile"):
        return None
    return f"{name} {_short(other['p50_us'])}"


def _short(us: float | None) -> str:
    if not us:
        return ""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _time(row: Row) -> str:
    return f"{_short(row['p50_us'])} ({_short(row['p20_us'])}–{_short(row['p80_us'])})"


def _errors(row: Row) -> str:
    if row["error"] is None:
        return ""
    return f"{row['error']:.1e}" + (f" ({row['error_dense']:.1e})" if row["error_dense"] is not None else "")


def _blocks(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    lines = []
    for r in rows:
        mode = f"{r['mode']}, torch.compile ({r['compiled']})" if r["compiled"] else r["mode"]
        if r["status"] != "ok":
            lines.append([r["model"], mode, r["variant"], *[""] * 6, _cell(r["status"])])
            continue
        use = "**do not use here**" if r["speedup"] and r["speedup"] < 1 else ""
        times = f"{r['p50_ms']:.2f} ({r['p20_ms']:.2f}–{r['p80_ms']:.2f})"
        lines.append(
            [
                *(
                    r["model"],
                    mode,
                    r["variant"],
                    f"{r['params'] / 1e6:.1f} M",
                    f"{r['throughput']} {r['unit']}",
                    times,
                ),
                *(*(r[name] for name in ("speedup", "peak_mb", "layers")), use),
            ]
        )
    header = ("blocks", "mode", "linear layers", "parameters", "throughput", "step ms (p20–p80)", "× dense", "peak MB")
    text = (
        "Whole transformer blocks, every linear layer replaced by `structmat.surgery.replace_`: a training step in "
        "bfloat16 autocast (forward, backward, AdamW) and inference in bfloat16. Attention, norms and the optimizer "
        "stay what they are, so that the layers' speed-up is diluted as it is for a user."
    )
    title = f"## Transformer blocks on {facts['device']}"
    return "\n\n".join([title, _versions(name, facts), text, _table((*header, "layers", ""), lines, 3)])
