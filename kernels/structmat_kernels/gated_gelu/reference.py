"""The definition of the gated unit, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_gelu(x: Tensor) -> Tensor:
    """``gelu(a) * b`` for x = (a, b) of shape (*batch, 2 h); each of the two is rounded to the dtype of x."""
    a, b = x.chunk(2, -1)
    return F.gelu(a) * b
