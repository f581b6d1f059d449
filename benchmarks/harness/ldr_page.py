"""docs/displacement_results.md, made from the committed result files of trainings, products and solves alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.ldr_data import NOISE
from harness.ldr_results import curves, fitted, slope, summarise
from harness.ldr_task import STRUCTURES
from harness.page import _cell, _table, _versions
from harness.report import read_rows
from harness.training_page import _digits, _number

Row = dict[str, Any]
NAME = "displacement_results.md"
PRODUCTS, SOLVES = "displacement-products", "toeplitz-solve"
START = """# Displacement structure: measured

What matrices of low displacement rank cost and do: as hidden layers, in products and in solves. This page is made by
`python benchmarks/plots.py --docs` from the files in `benchmarks/results/`; `benchmarks/README.md` says how to make
those."""


def committed(results: Path, name: str) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """(name, facts, rows) of the runs of this name, which may be a pattern."""
    found = []
    for path in sorted(results.glob(f"{name}.json")):
        rows = path.with_suffix(".csv")
        if rows.exists():
            found.append((path.stem, json.loads(path.read_text(encoding="utf-8")), read_rows(rows)))
    return found


def step_times(results: Path, name: str) -> list[Row]:
    """The quiet times of steps beside the trainings ``name``; none if they were not measured."""
    path = results / f"{name.replace('train-', 'step-times-', 1)}.csv"
    return read_rows(path) if path.exists() else []


def page(results: Path) -> str | None:
    """The whole page; None while no results are committed."""
    parts = [_trainings(*run, step_times(results, run[0])) for run in committed(results, "train-ldr-*")]
    parts += [_products(*run) for run in committed(results, PRODUCTS)]
    parts += [_solves(*run) for run in committed(results, SOLVES)]
    return "\n\n".join([START, *parts]) + "\n" if parts else None


# -------------------------------------------------------------------- trainings
def _trainings(name: str, facts: dict[str, Any], rows: list[Row], times: list[Row]) -> str:
    asked, summary = facts["arguments"], summarise(rows, times)
    n, grid = facts["side"] ** 2, " or ".join(f"{rate:g}" for rate in asked["rates"])
    parts = [
        f"## One hidden layer, on {facts['device']}",
        _versions(name, facts),
        "The comparison of Thomas, Gu, Dao, Rudra and Ré 2018, *Learning compressed transforms with low displacement "
        f"rank*: {n} → {n} → ReLU → 10, the hidden layer dense, or structured with {8 * n:,} learned numbers where the "
        "structure can have as many, which LDR-TD has at rank 1; beside them a dense layer of that size, which has 8 "
        "units. The nodes of Vandermonde-like matrices are fixed; all operators of LDR-SD and LDR-TD are learned, "
        "corners included. Fastfood pads its inputs to a power of two.",
        "Fashion-MNIST as it is, and with each image rotated by an angle from the full circle and noise added, uniform "
        f"from 0 to {NOISE:g} of the brightest pixel. AdamW (dense weights decay by {facts['decay']:g}), batches of "
        f"{asked['batch']}, {facts['epochs']} epochs, warm-up and cosine, gradients clipped at norm 1, float32 without "
        f"TF32. The learning rate is {grid}: for each structure and data set the one that is better on a sixth of the "
        "training images, held out, after half as many epochs. Test images are seen once, after the last epoch; mean "
        "and standard deviation over seeds. Trainings share the GPU; a step is timed apart, in a quiet process.",
        f"![accuracy](_static/displacement-{name.removeprefix('train-')}.svg)\n\nTest accuracy; bars are standard "
        "deviations.",
    ]
    header = ("hidden layer", "its weights", "parameters", "rate", "accuracy, %", "seeds", "step ms")
    for data in dict.fromkeys(r["data"] for r in summary):
        mine = [r for r in summary if r["data"] == data]
        parts.append(f"### {data[0].upper()}{data[1:]}\n\n" + _table(header, map(_training_cells, mine)))
        parts.append(_order(mine))
    counts: dict[tuple[str, str, str], int] = {}
    for r in rows:
        if r["status"] != "ok":
            key = r["data"], label(r["structure"]), _cell(r["status"])
            counts[key] = counts.get(key, 0) + 1
    if counts:
        lines = [[*key[:2], count, key[2]] for key, count in counts.items()]
        parts.append("### Not trained\n\n" + _table(("data", "hidden layer", "seeds", "why"), lines, 99))
    return "\n\n".join(part for part in parts if part)


def label(structure: str) -> str:
    """A structure in words."""
    return STRUCTURES[structure][0] if structure in STRUCTURES else structure


def _short(structure: str) -> str:
    """Without the rank."""
    return label(structure).split(",")[0]


def _training_cells(r: Row) -> list[Any]:
    if r["accuracy"] is None:
        return [label(r["structure"]), "", "", "", "not trained", r["runs"], _digits(r["step_ms"], 2)]
    spread = f" ± {r['std']:.2f}" if r["std"] is not None else ""
    cells = [label(r["structure"]), _number(r["layer_params"]), _number(r["params"]), f"{r['rate']:g}"]
    return [*cells, f"{r['accuracy']:.2f}{spread}", r["runs"], _digits(r["step_ms"], 2)]


def _order(rows: Sequence[Row]) -> str:
    """In words, what is best and what is not better than its simple rivals."""
    scored = {r["structure"]: r["accuracy"] for r in rows if r["accuracy"] is not None}
    parts = []
    others = {s: value for s, value in scored.items() if s not in ("dense", "small")}
    if others:
        best = max(others, key=others.__getitem__)
        parts.append(f"Of the structured layers {_short(best)} is best")
        for rival, words in (("dense", "dense"), ("small", "the small dense layer"), ("lowrank", "low rank")):
            if rival in scored:
                rest = [s for s in others if s != rival]
                above = [s for s in rest if others[s] > scored[rival]]
                named = f" ({', '.join(map(_short, above))})" if 0 < len(above) < 6 else ""
                parts.append(f"{len(above)} of {len(rest)} beat {words}{named}")
    return "; ".join(parts) + "." if parts else ""


# -------------------------------------------------------------------- times against n
def _products(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    parts = [
        "## Toeplitz products",
        _machine(name, facts),
        "Time of a product of a Toeplitz matrix with one vector and with 16, beside torch's dense product, SciPy's "
        "`matmul_toeplitz`, and three bare FFTs of the padded size. All methods run in one process, in turns.",
        f"![products](_static/{PRODUCTS}.svg)\n\nMedian times; lines are fitted, with their slopes.",
    ]
    for vectors in sorted({r["vectors"] for r in rows}):
        title = "### One vector" if vectors == 1 else f"### {vectors} vectors"
        parts.append(f"{title}\n\n" + _against_n("products", curves(rows, "vectors", vectors), "structmat.Toeplitz"))
    return "\n\n".join(parts)


def _solves(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    parts = [
        "## Toeplitz solves",
        _machine(name, facts),
        "Time of a solve with one right-hand side, beside dense LU and SciPy's Levinson recursion. Decaying and "
        "exponential entries suit a circulant preconditioner; random ones do not, and are eliminated. All methods run "
        "in one process, in turns.",
        f"![solves](_static/{SOLVES}.svg)\n\nMedian times; lines are fitted, with their slopes.",
    ]
    for kind in dict.fromkeys(r["matrix"] for r in rows):
        worst: dict[str, float] = {}
        for r in rows:
            if r["matrix"] == kind and r["residual"] is not None:
                worst[r["method"]] = max(worst.get(r["method"], 0.0), float(r["residual"]))
        shown = _against_n("solves", curves(rows, "matrix", kind), "structmat.Toeplitz.solve", worst)
        parts.append(f"### {kind[0].upper()}{kind[1:]} entries\n\n{shown}")
    tiny = facts.get("residuals with t_0 = 1e-10")
    if tiny:
        lines = [
            [n, f"{r['condition']:g}", f"{r['structmat']:g}", f"{r['scipy']:g}"]
            for n, r in sorted(tiny.items(), key=lambda item: int(item[0]))
        ]
        title = "### A first minor of 1e-10\n\nResiduals of random Toeplitz matrices whose diagonal is 1e-10.\n\n"
        parts.append(title + _table(("n", "condition number", "structmat", "SciPy"), lines, 0))
    return "\n\n".join(parts)


def _machine(name: str, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if k != "structmat")
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    before, after = (load[0] for load in facts["load_before_and_after"])
    return (
        f"CPU ({facts['machine']}), {threads}, {facts['dtype']}, {versions}; load of the machine {before:.1f} before "
        f"and {after:.1f} after. All rows: `benchmarks/results/{name}.csv`."
    )


def _against_n(
    what: str, found: dict[str, list[tuple[int, float]]], ours: str, residuals: dict[str, float] | None = None
) -> str:
    """Times at some n, the slope, where structmat is faster, and the largest residual."""
    every = sorted({n for points in found.values() for n, _ in points})
    shown = sorted({*every[::3], every[-1]})
    header = ["method", *(f"n = {_power(n)}" for n in shown), "slope", "of n", "structmat is faster"]
    lines = []
    for name, points in found.items():
        times, used = dict(points), fitted(what, name, points)
        steep = slope(used)
        words = ["", ""] if steep is None else [f"{steep:.2f}", f"{_power(used[0][0])} to {_power(used[-1][0])}"]
        line = [name, *(_seconds(times.get(n)) for n in shown), *words]
        line.append("" if name == ours else _faster(dict(found.get(ours, [])), times))
        lines.append([*line, f"{residuals[name]:.1e}"] if residuals and name in residuals else line)
    return _table([*header, *(["largest residual"] if residuals else [])], lines)


def _faster(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """At which of the common sizes."""
    common = sorted(ours.keys() & theirs.keys())
    won = [n for n in common if ours[n] < theirs[n]]
    if not won or len(won) == len(common):
        return "never" if not won else "always"
    if won == common[-len(won) :]:
        return f"from {_power(won[0])} on"
    return f"at {', '.join(map(_power, won))}"


def _power(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms")) if value * f >= 1), (1e6, "µs"))
    return f"{value * factor:.3g} {unit}"
