"""Block-diagonal product in plain PyTorch: the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fit_last(x: Tensor, size: int) -> Tensor:
    """Crop or zero-pad the last dimension to ``size``; no copy where nothing changes."""
    have = x.shape[-1]
    if have == size:
        return x
    return x[..., :size] if have > size else F.pad(x, (0, size - have))


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """Apply blocks to consecutive pieces of the last dimension: ``h[i q + a] = sum_b blocks[i, a, b] x[i p + b]``.

    Args:
        x: shape (*batch, tokens, n) with n <= k p; missing entries count as zeros.
        blocks: shape (*batch, k, q, p), dtype and device of x.

    Returns:
        Shape (*batch, tokens, k, q), not flattened. Cost: 2 k q p operations a token.
    """
    k, _, p = blocks.shape[-3:]
    pieces = fit_last(x, k * p).unflatten(-1, (k, p)).transpose(-3, -2)  # (*batch, k, tokens, p)
    return (pieces @ blocks.mT).transpose(-3, -2)


def blocks_gradient(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    """Gradient of ``sum(grad * block_diagonal(x, blocks).flatten(-2))`` in the blocks, real operands of equal batch."""
    k, q, p = blocks.shape[-3:]
    g = grad.unflatten(-1, (k, q)).transpose(-3, -2)  # (*batch, k, tokens, q)
    return g.mT @ fit_last(x, k * p).unflatten(-1, (k, p)).transpose(-3, -2)
