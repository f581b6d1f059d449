"""Monarch product in plain PyTorch: the definition.

With k q = l r: ``h[i q + a] = sum_b right[i, a, b] x[i p + b]`` and ``y[u l + j] = sum_t left[j, u, t] h[t l + j]``.
Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training".
"""

from __future__ import annotations

from torch import Tensor

from structmat_kernels.block_diagonal.reference import block_diagonal, fit_last


def monarch(x: Tensor, left: Tensor, right: Tensor, nrows: int) -> Tensor:
    """``x @ M.mT`` for the Monarch matrix M of factors ``left`` and ``right``.

    Args:
        x: shape (*batch, tokens, n) with n <= k p; missing entries count as zeros.
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p) with k q = l r.
        nrows: how many of the l s outputs to keep.

    Returns:
        Shape (*batch, tokens, nrows). Cost: 2 (k q p + l s r) operations a token.
    """
    l, _, r = left.shape[-3:]
    h = block_diagonal(x, right).flatten(-2).unflatten(-1, (r, l))  # (*batch, tokens, r, l)
    y = h.movedim(-1, -3) @ left.mT  # (*batch, l, tokens, s)
    return fit_last(y.movedim(-3, -1).flatten(-2), nrows)


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
    l, s, _ = left.shape[-3:]
    pieces = fit_last(y, l * s).unflatten(-1, (s, l)).movedim(-1, -3)  # (*batch, l, tokens, s)
    h = (pieces @ left).movedim(-3, -1).flatten(-2)  # (*batch, tokens, r l)
    return fit_last(block_diagonal(h, right.mT).flatten(-2), ncols)
