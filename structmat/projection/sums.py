"""Sums of products on one chain: greedy projections of what is left, then one term after the other again."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.chain import Chain
from structmat.projection.bases import norm_over
from structmat.projection.butterfly import check_chain, prepare, project_butterfly, tolerance
from structmat.projection.refine import refine, search_permutation
from structmat.projection.splitting import from_support, merge_all, on_support
from structmat.projection.tails import split_error2

Factors = tuple[Tensor, ...]


def _norm(W: Tensor) -> Tensor:
    return norm_over(W, (-2, -1))


@torch.no_grad()
def project_butterfly_sum(
    W: Tensor,
    chain: Chain,
    terms: int,
    permutation: str | None = None,
    order: str = "balanced",
    sweeps: int = 0,
) -> tuple[list[tuple[Factors, Tensor | None]], Tensor | None, Tensor]:
    """A sum of products on a chain near to W: every term is the projection of what those before it leave.

    No term makes the error larger. Greedy is optimal for chains of two factors, where the terms are the leading parts
    of the blocks' singular value decompositions; of longer chains it is a heuristic, and a sweep improves it: each
    term is projected again on what all others leave, refined, and kept where that is nearer.

    Args:
        W: shape (*batch, m, n) with ``chain.shape == (m, n)``, floating point or complex.
        chain: the patterns of every term's factors.
        terms: how many.
        permutation: "search" for a permutation of W's columns for every term, or None; see :func:`search_permutation`.
        order: of the splits, as for :func:`project_butterfly`.
        sweeps: over all terms.

    Returns:
        For every term its factors in W's dtype, shapes (*batch, a, b, c, d), and its permutation (None without one):
        the term is ``product[..., permutation.argsort()]``. Then a norm (*batch) that the error of every such sum
        reaches: blocks of a split have at most the rank of all terms together, and the best two factors of that rank
        are known; None with permutations. Last, one that the error of this sum does not exceed but for rounding.

    Raises:
        TypeError: if W is neither floating point nor complex.
        ValueError: if W has another shape, NaN or infinite entries, or an argument is out of range.

    Cost: that of a projection for every term, and as much again for every term of a sweep.

    Example:
        >>> import torch
        >>> from structmat import Chain
        >>> from structmat.projection import project_butterfly_sum
        >>> W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> [round((project_butterfly_sum(W, Chain.dyadic(8), k)[2] / W.norm()).item(), 1) for k in (1, 2, 4)]
        [0.7, 0.3, 0.0]
    """
    check_chain(W, chain)
    check_int("terms", terms)
    check_int("sweeps", sweeps, 0)
    if permutation not in (None, "search"):
        raise ValueError(f'permutation must be None or "search", got {permutation!r}')
    rest, scale, upper = prepare(W)
    found = []
    for _ in range(terms):
        perm = search_permutation(rest, chain)[0] if permutation else None
        part = rest if perm is None else rest[..., perm]
        factors, _, above = project_butterfly(part.to(W.dtype), chain, order)
        upper = torch.minimum(upper, above)
        rest = rest - _dense(factors, perm, rest)
        found.append((factors, perm))
    for _ in range(sweeps):
        for i, (factors, perm) in enumerate(found):
            rest = rest + _dense(factors, perm, rest)
            factors = _again(rest if perm is None else rest[..., perm], factors, chain, order)
            rest = rest - _dense(factors, perm, rest)
            found[i] = (factors, perm)
        upper = _norm(rest)
    root = scale.pow(1 / len(chain))[:, None, None, None, None]
    given_back = [
        (tuple((f * root).to(W.dtype).reshape(*W.shape[:-2], *p) for f, p in zip(factors, chain, strict=True)), perm)
        for factors, perm in found
    ]
    lower = None if permutation else _lower(W, chain, terms)
    return given_back, lower, (upper * scale).reshape(W.shape[:-2])


def _dense(factors: Factors, perm: Tensor | None, like: Tensor) -> Tensor:
    whole = from_support(merge_all([f.to(like.dtype) for f in factors]))
    return whole if perm is None else whole[..., perm.argsort()]


def _again(W: Tensor, factors: Factors, chain: Chain, order: str) -> Factors:
    """The factors, or a projection of W where that is nearer, refined once."""
    other = project_butterfly(W.to(factors[0].dtype), chain, order)[0]
    nearer = _norm(W - _dense(other, None, W)) < _norm(W - _dense(factors, None, W))
    start = [torch.where(nearer[..., None, None, None, None], o, f) for o, f in zip(other, factors, strict=True)]
    return refine(W.to(factors[0].dtype), start, chain, 1)[0]


def _lower(W: Tensor, chain: Chain, terms: int) -> Tensor:
    """The largest error of two factors whose rank is that of all terms together; 0 where it is rounding."""
    double, scale, norm = prepare(W)
    values, outside = on_support(double, chain.merged(0, len(chain)))
    errors2 = [split_error2(values, chain, split, terms) for split in range(1, len(chain))]
    lower = torch.hypot(outside, torch.stack([torch.zeros_like(norm), *errors2]).amax(0).sqrt())
    return (torch.where(lower > tolerance(W) * norm, lower, 0) * scale).reshape(W.shape[:-2])
