"""Which tensors of a checkpoint are weights of linear layers, judged by names and shapes alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structmat.surgery.report import LayerRow
from structmat.surgery.shards import Checkpoint
from structmat.surgery.stream import DTYPES

_DTYPES = ("F64", "F32", "F16", "BF16")
# Last parts of the names of embeddings and output heads: T5's, GPT-2's, and what else has "embed" in it.
_HEADS = {"shared", "wte", "wpe", "lm_head", "relative_attention_bias"}


@dataclass(frozen=True)
class Candidate:
    """A weight that is to be compressed.

    Attributes:
        name: the layer's, without ``.weight``.
        shape: (out, in).
        dtype: of the stored tensor.
        conv1d: whether it is stored as (in, out).
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    conv1d: bool

    @property
    def tensor(self) -> str:
        """The tensor's name."""
        return f"{self.name}.weight"

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """Read the weight as (out, in)."""
        weight = checkpoint.where[self.tensor].read(self.tensor)
        return weight.mT if self.conv1d else weight


def looks_like_embedding(layer: str) -> bool:
    """Whether a layer's name is that of an embedding or an output head."""
    parts = layer.lower().split(".")
    # BERT's and RoBERTa's output heads are called `decoder`, a name that many linear layers have elsewhere.
    tied_decoder = parts[-1] == "decoder" and len(parts) > 1 and parts[-2] in ("predictions", "lm_head")
    return parts[-1] in _HEADS or "embed" in parts[-1] or tied_decoder


def natural(name: str) -> list[Any]:
    """A sorting key that puts ``layer.2`` before ``layer.10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def choose(
    checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str], conv1d: Sequence[str]
) -> tuple[list[Candidate], list[LayerRow]]:
    """The weights to compress, and rows with reasons for the two-dimensional weights that are left alone.

    Args:
        checkpoint: the source.
        include: patterns; empty for every linear layer.
        exclude: patterns.
        conv1d: patterns.

    Raises:
        ValueError: if nothing is left to compress, or a pattern matches no candidate.
    """
    used: set[str] = set()

    def match(layer: str, patterns: Sequence[str]) -> bool:
        hits = [p for p in patterns if fnmatch.fnmatchcase(layer, p) or fnmatch.fnmatchcase(f"{layer}.weight", p)]
        used.update(hits)
        return bool(hits)

    tied: dict[str, list[str]] = {}
    for alias, name in checkpoint.aliases.items():
        tied.setdefault(name, []).append(alias)
    chosen, others = [], []
    for tensor in sorted(checkpoint.where, key=natural):
        entry, layer = checkpoint.entry(tensor), tensor.removesuffix(".weight")
        if layer == tensor or len(entry.shape) != 2 or 0 in entry.shape or not entry.dtype.startswith(("F", "BF")):
            continue
        m, n = entry.shape
        stored_transposed = match(layer, conv1d)
        shape = (n, m) if stored_transposed else (m, n)
        included, excluded = match(layer, include), match(layer, exclude)
        reason = None
        if excluded:
            reason = "--exclude matches its name"
        elif include and not included:
            reason = "no --include matches its name"
        elif tensor in tied:
            reason = f"it is tied to {', '.join(tied[tensor])}"
        elif not include and looks_like_embedding(layer):
            reason = "its name is that of an embedding or output head (--include overrides)"
        elif entry.dtype not in _DTYPES:
            reason = f"its dtype is {entry.dtype}"
        if reason is None:
            chosen.append(Candidate(layer, shape, DTYPES[entry.dtype], stored_transposed))
        else:
            others.append(LayerRow.left_alone(layer, shape, m * n, reason))
    for option, patterns in (("include", include), ("exclude", exclude), ("conv1d", conv1d)):
        if unused := [p for p in patterns if p not in used]:
            raise ValueError(
                f"--{option} {unused[0]!r} matches no two-dimensional floating-point tensor named *.weight among the "
                f"{len(checkpoint.where)} of {checkpoint.path}"
            )
    if not chosen:
        raise ValueError(
            f"{checkpoint.path} has nothing to compress: of its {len(checkpoint.where)} tensors, {len(others)} are "
            "two-dimensional floating-point ones named *.weight"
            + "".join(f"\n  {row.name}: {row.skipped}" for row in others[:5])
            + (f"\n  and {len(others) - 5} more" if len(others) > 5 else "")
        )
    return chosen, others
