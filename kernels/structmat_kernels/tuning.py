"""Measured kernel configurations: a table beside this file, none of which ships yet, and a file of the user's own.

Nothing is measured at import or at a call. ``python -m structmat_kernels.tune`` measures the shapes that it is given
and writes the user's file: ``$STRUCTMAT_TUNING``, by default ``structmat/tuning.json`` in the user's cache directory.

A table maps ``"op capability dtype sizes"`` to ``{tokens: configuration}``.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]
SHIPPED = Path(__file__).with_name("tuned.json")
#: A measurement serves token counts up to this many times smaller or larger than its own.
REACH = 8


def user_file() -> Path:
    """Where the user's measurements are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("STRUCTMAT_TUNING") or cache / "structmat" / "tuning.json")


def entry_key(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """The table's key of an operation of these sizes on this device."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{op} {capability} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"


def read_table(path: Path) -> dict[str, dict[str, Config]]:
    """The table in a file; empty where there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not a table of kernel configurations: {error}; delete it or measure again"
        ) from None


@functools.cache
def _table() -> dict[str, dict[str, Config]]:
    merged = read_table(SHIPPED)
    for key, entries in read_table(user_file()).items():
        merged[key] = merged.get(key, {}) | entries
    return merged


@functools.cache
def _nearest(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], tokens: int) -> Config | None:
    entries = _table().get(entry_key(op, device, dtype, sizes), {})
    distance = {known: abs(math.log2(int(known) / tokens)) for known in entries}
    best = min(distance, key=distance.__getitem__, default=None)
    return entries[best] if best is not None and distance[best] <= math.log2(REACH) else None


def lookup(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], tokens: int) -> Config | None:
    """The measured configuration nearest to ``tokens`` on this device, or None."""
    return _nearest(op, device, dtype, sizes, tokens) if device.type == "cuda" and tokens > 0 else None
