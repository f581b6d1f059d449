"""Result files: a CSV file of rows and a JSON file about the run; and short tables for the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write rows; the file is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write what there is to say of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, numbers as numbers and empty cells as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _typed(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _typed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of text, the first one to the left, the others to the right."""
    lines = [[("" if cell is None else str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def short_table(rows: Sequence[Row]) -> str:
    """The rows of one problem as text."""
    first = rows[0]
    size = f"{first['inputs']} x {first['outputs']}, T = {first['tokens']}"
    title = f"\n{first['operation']}, {size}, {first['dtype']}, {first['direction']}"
    names = ("p50_us", "floor_ratio", "speedup", "eager_us", "error", "peak_mb")
    lines = [(row["alternative"], *(row[name] for name in names)) for row in rows if row["status"] == "ok"]
    text = table(("alternative", "us", "x floor", "x dense", "eager us", "error", "peak MB"), lines)
    bad = [f"  {row['alternative']}: {row['status']}" for row in rows if row["status"] != "ok"]
    odd = [f"  {row['alternative']}: {row['timer']}" for row in rows if "failed" in str(row["timer"])]
    return "\n".join([title, *(["  " + text.replace("\n", "\n  ")] if lines else []), *bad, *odd])
