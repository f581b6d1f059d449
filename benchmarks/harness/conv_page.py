"""docs/convolution_results.md, made from the committed result files of the convolutions alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.ldr_page import committed
from harness.page import _cell, _table, _versions
from harness.training_page import _digits, _number

Row = dict[str, Any]
NAME = "convolution_results.md"
START = """# Convolutions: measured

Long and short convolutions by the kernels beside what there is otherwise, and a layer of M2-BERT made of them beside
one of BERT. This page is made by `python benchmarks/plots.py --docs` from the files in `benchmarks/results/`;
`benchmarks/README.md` says how to make those.

Alternatives take turns in one run, in CUDA graphs; microseconds are medians. Above 1 is faster than the first row of a
case. "× floor" is the time over that of reading all operands and writing all results once at the bandwidth of a copy
in the same run. Errors are relative, of the output against float64; "rounding" is the error of the exact output
rounded."""
KINDS = {
    "long": (
        "Long convolutions",
        "Causal, filters in float32 as long as the input. torch.fft: real FFTs of twice the length in float32. dense "
        "Toeplitz: a product with a dense matrix for each channel, made before.",
    ),
    "short": (
        "Short convolutions",
        "Depthwise, causal, three taps. channels last: channels lie next to each other, as a linear layer writes them.",
    ),
    "layer": (
        "A layer of M2-BERT beside one of BERT",
        "768 channels, 32,768 tokens: two long convolutions in both directions, a short one and a block-diagonal MLP "
        "against scaled_dot_product_attention and a dense MLP. Forward: bfloat16 weights; forward and backward: "
        "float32 weights under bfloat16 autocast. M2 in PyTorch alone, with its MLP's kernels, and with all kernels.",
    ),
}


def page(results: Path) -> str | None:
    """The whole page; None while no results are committed."""
    found = [_section(*run) for run in committed(results, "convolutions-*")]
    return "\n\n".join([START, *found]) + "\n" if found else None


def _section(name: str, facts: dict[str, Any], rows: list[Row]) -> str:
    parts = [f"## On {facts['device']}", _versions(name, facts)]
    for operation, (title, words) in KINDS.items():
        for direction in dict.fromkeys(r["direction"] for r in rows):
            some = [r for r in rows if (r["operation"], r["direction"]) == (operation, direction)]
            if some:
                lines = [_line(r) for r in sorted(some, key=_size)]
                header = ("batch × channels × length", "", "by", "µs", "× first", "× floor", "error", "rounding")
                header = (*header, "peak MB", "kept MB")
                parts.append(f"### {title}, {direction}\n\n{words}\n\n" + _table(header, lines, 3))
    return "\n\n".join(parts)


def _size(row: Row) -> tuple[Any, ...]:
    """Of one case the rows stay as they are: sorting is stable."""
    return row["dtype"], row["variant"] or "", row["length"], -row["batch"]


def _line(row: Row) -> list[Any]:
    what = ", ".join(part for part in (row["dtype"], row["variant"]) if part)
    cells = [f"{row['batch']} × {row['channels']} × {row['length']}", what, row["alternative"]]
    if row["status"] != "ok":
        return [*cells, _cell(row["status"]), *[""] * 6]
    cells += [_number(round(row["p50_us"])), _digits(row["speedup"], 2), _digits(row["bytes_ratio"], 1)]
    return [*cells, *(row[k] for k in ("error", "rounding")), *(_number(row[k]) for k in ("peak_mb", "saved_mb"))]
