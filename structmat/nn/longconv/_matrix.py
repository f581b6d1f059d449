"""Convolutions as structured matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.matrices import CausalToeplitz, Circulant, Toeplitz
from structmat.nn.longconv.functional import wrapped


def toeplitz_of(
    taps: Tensor, skip: Tensor | None, mode: str, length: int, channel: int | None = None
) -> StructuredMatrix:
    """What taps (directions, channels, number) do to inputs of a length, plus skip (channels,); or to one channel."""
    entries = wrapped(taps[0], length) if mode == "circular" else _fitted(taps[0], length)
    if skip is not None:
        entries = torch.cat([entries[..., :1] + skip.to(entries.dtype).unsqueeze(-1), entries[..., 1:]], -1)
    if mode == "bidirectional":
        entries = torch.cat([_fitted(taps[1], length - 1).flip(-1), entries], -1)
    if channel is not None:
        if check_int("channel", channel, 0) >= len(entries):
            raise ValueError(f"channel must be less than {len(entries)}, got {channel}")
        entries = entries[channel]
    if mode == "bidirectional":
        return Toeplitz.from_diagonals(entries, length)
    return CausalToeplitz(entries) if mode == "causal" else Circulant(entries)


def _fitted(k: Tensor, count: int) -> Tensor:
    """So many taps: the first ones, and zeros behind them."""
    return F.pad(k[..., :count], (0, max(count - k.shape[-1], 0)))
