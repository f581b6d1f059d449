"""Projection on a chain of Kronecker-sparse patterns: truncated decompositions of all blocks of a split at once.

The product of two neighbours falls into independent blocks of bounded rank, so that the two-factor problem is solved by
truncated singular value decompositions, and a chain by splitting it again and again. Between two splits the factor that
is already known is made orthonormal, block by block: what is then lost in the rest of the matrix is exactly what is
lost in the matrix, and no more than the split would lose in W itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_tensor
from structmat.chain import Chain
from structmat.projection.bases import apply_adjoint, by_chunks, norm_over, rotation, row_basis
from structmat.projection.splitting import (
    left_blocks,
    left_values,
    merge_all,
    on_support,
    orthonormalise,
    right_values,
    split_blocks,
)
from structmat.projection.tails import error_bounds2, split_error2
from structmat.projection.truncated import work_dtype


# ---------------------------------------------------------------- the hierarchy
class _Splitter:
    """One run: the chain, the order, and the losses of the splits made, each a lower bound of its E_l."""

    def __init__(self, chain: Chain, order: str) -> None:
        self.chain, self.halves = chain, order == "balanced"
        self.steps: dict[int, Tensor] = {}

    def split(self, start: int, stop: int) -> int:
        """Where factors start to stop - 1 are split."""
        return (start + stop) // 2 if self.halves else start + 1

    def solve(self, values: Tensor, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
        """Factors start to stop - 1 of (B, a, b, c, d), all but the last orthonormal, and the square of the error."""
        if stop - start == 1:
            return [values], values.new_zeros(values.shape[0], dtype=values.dtype.to_real())
        split = self.split(start, stop)
        left, right = self.chain.merged(start, split), self.chain.merged(split, stop)
        rank = left.rank(right) or 1
        blocks = split_blocks(values, left, right)
        if split == start + 1:
            if rank == 1 and left.b == 2 and right.c > 1:
                u, lost = rotation(blocks[..., 0, :], blocks[..., 1, :])
                core = blocks[..., 0, :] * u[..., :1].conj()
                core = core.addcmul_(blocks[..., 1, :], u[..., 1:].conj()).unsqueeze(-2)
                basis = u.unsqueeze(-1)
            else:
                basis, lost = row_basis(blocks.mT, rank)
                basis = basis.mT
                core = apply_adjoint(basis, blocks)
            lost = lost.flatten(1).sum(-1)
            factors, error = [left_values(basis, left)], lost
        else:
            rows, lost = row_basis(blocks, rank)
            (inner,) = by_chunks(lambda m, v: (m @ v.mH,), blocks, rows, inner=2)
            factors, error = self.solve(left_values(inner, left), start, split)
            factors[-1] = orthonormalise(factors[-1], self.chain[split - 1], right)[0]
            core = apply_adjoint(left_blocks(merge_all(factors), left, right), blocks)
            lost = lost.flatten(1).sum(-1)
            error = error + lost
        self.steps[split] = lost
        rest, missed = self.solve(right_values(core, right), split, stop)
        return factors + rest, error + missed


# ---------------------------------------------------------------- the projection
def balance(factors: list[Tensor]) -> list[Tensor]:
    """The same product with factors (*batch, a, b, c, d) of equal Frobenius norms; all are zero where one is."""
    norms = torch.stack([norm_over(f, (-4, -3, -2, -1)) for f in factors])
    mean = norms.log().mean(0).exp()  # of a zero norm: exp(-inf) = 0
    scales = torch.where(norms > 0, mean / norms.masked_fill(norms == 0, 1), 0)
    others = scales[:-1].prod(0)  # the product of all is 1 to rounding, whatever that of the logarithm
    scales[-1] = torch.where(others > 0, 1 / others.masked_fill(others == 0, 1), scales[-1])
    return [f * s[..., None, None, None, None] for f, s in zip(factors, scales, strict=True)]


def check_chain(W: Tensor, chain: Chain) -> None:
    """Raise unless W is a floating-point or complex tensor (*batch, *chain.shape) and chain a chain."""
    check_tensor("W", W, 2)
    check_inexact("W", W)
    if not isinstance(chain, Chain):
        raise TypeError(f"chain must be a structmat.Chain, got {type(chain).__name__}; make one with Chain(patterns)")
    if tuple(W.shape[-2:]) != chain.shape:
        raise ValueError(f"W must have shape (*batch, {chain.shape[0]}, {chain.shape[1]}), got {tuple(W.shape)}")


def prepare(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (B, m, n) in double precision and near 1, the powers of two it was divided by, and its norms then."""
    double = W.to(work_dtype(W)).reshape(-1, *W.shape[-2:])
    norm = norm_over(double, (-2, -1))
    scale = torch.ones_like(norm)
    if not ((norm > 1e-100) & (norm < 1e100)).all():
        parts = torch.view_as_real(double) if double.is_complex() else double
        largest = parts.abs().flatten(1).amax(-1) if parts.numel() else norm
        if not torch.isfinite(largest).all():
            raise ValueError("W has NaN or infinite entries")
        scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest)[1].clamp(-1020, 1020).to(norm.dtype)), 1)
        double = double / scale[:, None, None]
        norm = norm_over(double, (-2, -1))
    return double, scale, norm


@torch.no_grad()
def project_butterfly(W: Tensor, chain: Chain, order: str = "balanced") -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Factors on the patterns of a chain whose product is near to W, with a proof of how near any could come.

    With E_l the error of the best product of two factors, the chain merged left and right of split l, and o the norm
    of what W has outside the support of the product (zero where the support is full)::

        sqrt(o^2 + max_l E_l^2)  <=  the best product  <=  this product  <=  sqrt(o^2 + sum_l E_l^2)

    The outer ones are returned: of matrices of up to 2^14 entries exactly, of others bounds of them, the lower one at
    most a thousandth below and the upper one at most a thousandth above. Where W is such a product to rounding, 1e-13
    of its norm (1e-7 if W is not double), E_l is replaced by what brackets it: from below by what this split lost, from
    above by what all splits lost.

    All blocks of a split are decomposed in one call, in double precision, and the factors are rounded at the end. They
    have equal Frobenius norms. No gradient.

    Args:
        W: shape (*batch, m, n) with ``chain.shape == (m, n)``, floating point or complex.
        chain: the patterns of the factors, from left to right.
        order: ``"balanced"`` splits every run of factors in the middle; ``"left-to-right"`` splits off one factor at a
            time: some 15 m n flops for factors of 2 x 2 blocks and rank 1, the faster of the two where W is not exact.
            Of such W the bounds take longer than the factors: some 12 k m n flops in single precision, with k the root
            of the smaller of m and n, for powers of the blocks' Gram matrices.

    Returns:
        The factors, shapes (*batch, a, b, c, d) in W's dtype, and ``lower`` and ``upper``, shape (*batch) in double
        precision: Frobenius norms, not relative ones. ``lower`` bounds the error of every product on the chain.

    Raises:
        TypeError: if W is neither floating point nor complex, or ``chain`` is no Chain.
        ValueError: if W has another shape, NaN or infinite entries, or the order is unknown.

    Source: Le, Zheng, Riccietti, Gribonval 2022, "Fast learning of fast transforms, with guarantees"; Le, Riccietti,
    Gribonval 2024, "Butterfly factorization with error guarantees".

    Example:
        >>> import torch
        >>> from structmat import Chain
        >>> from structmat.projection.butterfly import project_butterfly
        >>> W = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> factors, lower, upper = project_butterfly(torch.kron(W, torch.kron(W, W)), Chain.dyadic(8))
        >>> [tuple(f.shape) for f in factors], upper.item() < 1e-12
        ([(1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)], True)
    """
    check_chain(W, chain)
    if order not in ("balanced", "left-to-right"):
        raise ValueError(f'order must be "balanced" or "left-to-right", got {order!r}')
    double, scale, norm = prepare(W)
    values, outside = on_support(double, chain.merged(0, len(chain)))
    splitter = _Splitter(chain, order)
    solved, error2 = splitter.solve(values, 0, len(chain))
    first = splitter.split(0, len(chain))  # made on W itself: what it lost is its E_l
    lower2, upper2 = _bounds(values, chain, splitter.steps, first, error2, tolerance(W) * norm)
    root = scale.pow(1 / len(chain))
    factors = tuple(
        (f * root[:, None, None, None, None]).to(W.dtype).reshape(*W.shape[:-2], *p).contiguous()
        for f, p in zip(balance(solved), chain, strict=True)
    )
    lower, upper = (torch.hypot(outside, bound.sqrt()) * scale for bound in (lower2, upper2))
    return factors, lower.reshape(W.shape[:-2]), upper.reshape(W.shape[:-2])


def tolerance(W: Tensor) -> float:
    """The share of W's norm that counts as rounding."""
    return 1e-13 if torch.finfo(W.dtype).bits == 64 else 2.0**-23


def lower_bound(W: Tensor, chain: Chain, limit: Tensor | None) -> Tensor | None:
    """The lower bound of the errors (B) of a prepared W; None once its norm over the batch exceeds a limit."""
    values, outside = on_support(W, chain.merged(0, len(chain)))
    splitter = _Splitter(chain, "left-to-right")
    _, error2 = splitter.solve(values, 0, len(chain))
    lower2 = torch.stack([torch.zeros_like(error2), *splitter.steps.values()]).amax(0)
    if (error2.sqrt() <= 1e-13 * norm_over(W, (-2, -1))).all():
        return torch.hypot(outside, lower2.sqrt())
    for split in sorted(range(1, len(chain)), key=lambda s: min(s, len(chain) - s)):  # the small blocks first
        if limit is not None and (lower2 + outside.square()).sum().sqrt() > limit:
            return None
        lower2 = torch.maximum(lower2, split_error2(values, chain, split))
    return torch.hypot(outside, lower2.sqrt())


def _bounds(
    values: Tensor, chain: Chain, steps: dict[int, Tensor], first: int, error2: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest E_l^2 and their sum, for every matrix of the batch."""
    if not steps:
        return error2, error2
    inexact = error2.sqrt() > rounding
    if len(values) and inexact.all():  # without a copy
        return error_bounds2(values, chain, {first: steps[first]})
    lower2, upper2 = torch.stack(list(steps.values())).amax(0), error2 * len(steps)
    if inexact.any():
        lower2[inexact], upper2[inexact] = error_bounds2(values[inexact], chain, {first: steps[first][inexact]})
    return lower2, upper2
