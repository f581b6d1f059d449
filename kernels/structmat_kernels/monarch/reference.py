"""Monarch product in plain PyTorch: the definition.

With k q = l r: ``h[i q + a] = sum_b right[i, a, b] x[i p + b]`` and ``y[u l + j] = sum_t left[j, u, t] h[t l + j]``.
Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat_kernels.block_diagonal.reference import block_diagonal, fit_last

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def monarch(
    x: Tensor, left: Tensor, right: Tensor, nrows: int, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``activation(x @ M.mT + bias)`` for the Monarch matrix M of factors ``left`` and ``right``.

    Args:
        x: shape (*batch, tokens, n) with n <= k p; missing entries count as zeros.
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p) with k q = l r.
        nrows: how many of the l s outputs to keep.
        bias: shape (nrows,) or None.
        activation: None, "relu", "gelu" (by the error function) or "silu".

    Returns:
        Shape (*batch, tokens, nrows). Cost: 2 (k q p + l s r) operations a token.
    """
    y = _left(_right(x, left, right), left, nrows)
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation](y) if activation else y


def monarch_transposed(y: Tensor, left: Tensor, right: Tensor, ncols: int) -> Tensor:
    """``y @ M``: the transposed product, at the same cost and with the same factors.

    Args:
        y: shape (*batch, tokens, m) with m <= l s; missing entries count as zeros.
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p) with k q = l r.
        ncols: how many of the k p outputs to keep.

    Returns:
        Shape (*batch, tokens, ncols).
    """
    h = (_pieces(y, left) @ left).movedim(-3, -1).flatten(-2)  # (*batch, tokens, r l)
    return fit_last(block_diagonal(h, right.mT).flatten(-2), ncols)


def monarch_backward(gy: Tensor, x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(gy * monarch(x, left, right, nrows))`` for real operands of equal batch.

    Args:
        gy: shape (*batch, tokens, nrows).
        x: shape (*batch, tokens, n).
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p).

    Returns:
        The gradients of x, left and right.
    """
    k, q, p = right.shape[-3:]
    gyj = _pieces(gy, left)  # (*batch, l, tokens, s)
    gleft = gyj.mT @ _right(x, left, right)
    gh = (gyj @ left).movedim(-3, -1).flatten(-2).unflatten(-1, (k, q)).transpose(-3, -2)  # (*batch, k, tokens, q)
    gright = gh.mT @ fit_last(x, k * p).unflatten(-1, (k, p)).transpose(-3, -2)
    gx = fit_last((gh @ right).transpose(-3, -2).flatten(-2), x.shape[-1])
    return gx, gleft, gright


def _right(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The hidden entries that each left block reads, shape (*batch, l, tokens, r)."""
    l, _, r = left.shape[-3:]
    # Contiguous, for of single tokens bmm would multiply block by block on a CPU; of many it copies anyway.
    return block_diagonal(x, right).flatten(-2).unflatten(-1, (r, l)).movedim(-1, -3).contiguous()


def _left(h: Tensor, left: Tensor, nrows: int) -> Tensor:
    return fit_last((h @ left.mT).movedim(-3, -1).flatten(-2), nrows)


def _pieces(y: Tensor, left: Tensor) -> Tensor:
    """The outputs of each left block, shape (*batch, l, tokens, s)."""
    l, s, _ = left.shape[-3:]
    return fit_last(y, l * s).unflatten(-1, (s, l)).movedim(-1, -3)


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """``grad * activation'(z)``; a closed relu passes nothing on, be the gradient infinite."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    return torch.ops.aten.silu_backward(grad, z)
