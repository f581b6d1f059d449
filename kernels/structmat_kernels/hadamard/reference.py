"""Walsh-Hadamard transform in plain PyTorch: the definition.

``H_1 = (1)`` and ``H_2n = [[H_n, H_n], [H_n, -H_n]]`` (Sylvester's order), so ``H[i, j] = (-1)^popcount(i & j)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * H x`` over the last dimension, by log2(n) levels of additions and subtractions.

    Args:
        x: shape (..., n), n a power of two; any dtype (half precisions are accumulated in float32).
        scale: factor of the result; 1 / sqrt(n) makes the transform orthogonal and its own inverse.

    Returns:
        The shape and dtype of x. Cost: n log2(n) operations a row.
    """
    h = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    step = 1
    while step < x.shape[-1]:
        even, odd = h.unflatten(-1, (-1, 2, step)).unbind(-2)
        h = torch.stack((even + odd, even - odd), -2).flatten(-3)
        step *= 2
    return (h if scale == 1 else h * scale).to(x.dtype)
