"""The decayed product in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def decay(times: Tensor, rates: Tensor, shift: float) -> Tensor:
    """``exp(-rates[c] times[i]) + shift``, shape (channels, length)."""
    found = torch.exp(-rates.unsqueeze(-1) * times)
    return found + shift if shift else found


def decayed_product(weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float) -> Tensor:
    """``(weight @ h) * (exp(-rates[c] times[i]) + shift)``.

    Args:
        weight: shape (directions, channels, width).
        h: shape (directions, width, length).
        times: shape (length,).
        rates: shape (channels,).
        shift: what the decay tends to.

    Returns:
        Shape (directions, channels, length).
    """
    return torch.bmm(weight, h) * decay(times, rates, shift)
