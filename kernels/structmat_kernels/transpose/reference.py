"""The transposing copy in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def transpose(x: Tensor, other: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The transposed matrices of ``x + other``, contiguous, in a dtype; without other the memory may be that of x.

    Args:
        x: shape (*batch, rows, columns).
        other: shape and dtype of x, or None for nothing to add.
        dtype: of the result, None for that of x.

    Returns:
        Shape (*batch, columns, rows).
    """
    total = x if other is None else x + other
    return total.mT.to(dtype or x.dtype).contiguous()
