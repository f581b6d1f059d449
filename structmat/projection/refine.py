"""Refinement of a projection on a chain, and the search for a permutation of columns that makes W one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat._checks import check_int, check_tensor
from structmat.chain import Chain
from structmat.projection.bases import norm_over
from structmat.projection.butterfly import balance, check_chain, lower_bound, prepare, tolerance
from structmat.projection.splitting import (
    left_blocks,
    left_values,
    merge,
    merge_all,
    on_support,
    orthonormalise,
    orthonormalise_rows,
    right_blocks,
    right_values,
    split_blocks,
)
from structmat.projection.truncated import work_dtype


# ---------------------------------------------------------------- alternating least squares
def _right_orthonormal(factors: list[Tensor], chain: Chain) -> list[Tensor]:
    """The same product, all factors but the first with orthonormal rows: triangular parts go into the one before."""
    factors = list(factors)
    for i in range(len(chain) - 1, 0, -1):
        left, right = chain[i - 1], chain[i]
        factors[i], triangle = orthonormalise_rows(factors[i], left, right)
        factors[i - 1] = left_values(left_blocks(factors[i - 1], left, right) @ triangle, left)
    return factors


def _there(values: Tensor, factors: list[Tensor], chain: Chain) -> list[Tensor]:
    """The least-squares optimum of one factor after the other, from left to right.

    The factors right of the first have orthonormal rows: so every problem is solved by products with the conjugate
    transposes of its two sides, on a core that has lost the factors left of it.
    """
    size, sides = len(chain), [factors[-1]]
    for factor in reversed(factors[1:-1]):  # the product of all factors right of i
        sides.insert(0, merge(factor, sides[0]))
    core, done = values, []
    for i in range(size - 1):
        left, right = chain[i], chain.merged(i + 1, size)
        blocks = split_blocks(core, left, right)
        best = left_values(blocks @ right_blocks(sides[i], left, right).mH, left)
        done.append(orthonormalise(best, left, right)[0])
        core = right_values(left_blocks(done[-1], left, right).mH @ blocks, right)
    return [*done, core]


def _back(values: Tensor, factors: list[Tensor], chain: Chain) -> list[Tensor]:
    """The same from right to left, where the factors left of the last have orthonormal columns."""
    sides = [factors[0]]
    for factor in factors[1:-1]:  # the product of all factors left of i
        sides.append(merge(sides[-1], factor))
    core, done = values, []
    for i in range(len(chain) - 1, 0, -1):
        left, right = chain.merged(0, i), chain[i]
        blocks = split_blocks(core, left, right)
        best = right_values(left_blocks(sides[i - 1], left, right).mH @ blocks, right)
        done.insert(0, orthonormalise_rows(best, left, right)[0])
        core = left_values(blocks @ right_blocks(done[0], left, right).mH, left)
    return [core, *done]


def _error(values: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return norm_over(merge_all(list(factors)) - values, (-4, -3, -2, -1))


@torch.no_grad()
def refine(W: Tensor, factors: Sequence[Tensor], chain: Chain, sweeps: int = 10) -> tuple[tuple[Tensor, ...], Tensor]:
    """Better factors by alternating least squares: the optimum of one after the other, all others fixed.

    The least-squares problem of a factor falls into one small problem for each of its blocks, r x r' numbers between
    two neighbours; they are solved together, and well-posed because all other factors are kept orthonormal. The error
    never grows: what a sweep does not improve stays as it was. It ends in a local optimum, near the start.

    Args:
        W: shape (*batch, m, n), what the product is to approximate.
        factors: one of shape (*batch, a, b, c, d) for each pattern, as :func:`project_butterfly` returns them.
        chain: their patterns.
        sweeps: how often to go through the factors, there and back: each takes about 25 r m n flops.

    Returns:
        Factors in W's dtype, of equal Frobenius norms unless they are the ones given, and the error of their product,
        (*batch) in double precision.

    Raises:
        TypeError: if W is neither floating point nor complex.
        ValueError: if shapes do not fit the chain, or W has NaN or infinite entries.

    Source: Holtz, Rohwedder, Schneider 2012, "The alternating linear scheme for tensor optimization in the tensor
    train format", whose orthogonal cores these are.

    Example:
        >>> import torch
        >>> from structmat import Chain
        >>> from structmat.projection.butterfly import project_butterfly
        >>> from structmat.projection.refine import refine
        >>> W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        >>> factors, lower, upper = project_butterfly(W, Chain.dyadic(16))
        >>> factors, error = refine(W, factors, Chain.dyadic(16), sweeps=5)
        >>> bool(lower <= error <= upper)
        True
    """
    check_chain(W, chain)
    check_int("sweeps", sweeps, 0)
    if len(factors) != len(chain):
        raise ValueError(f"factors must be {len(chain)}, one for each pattern of the chain, got {len(factors)}")
    for i, (factor, pattern) in enumerate(zip(factors, chain, strict=True)):
        check_tensor(f"factors[{i}]", factor, 4)
        if tuple(factor.shape) != (*W.shape[:-2], *pattern):
            raise ValueError(f"factors[{i}] must have shape {(*W.shape[:-2], *pattern)}, got {tuple(factor.shape)}")
    double, scale, _ = prepare(W)
    values, outside = on_support(double, chain.merged(0, len(chain)))
    root = scale.pow(1 / len(chain))[:, None, None, None, None]
    given = [f.to(work_dtype(W)).reshape(-1, *p) / root for f, p in zip(factors, chain, strict=True)]
    best = _sweep(values, given, chain, sweeps)
    rounded = [(f * root).to(W.dtype) for f in balance(best)]
    after = _error(values, [f.to(values.dtype) / root for f in rounded])
    before = _error(values, given)
    better = after < before
    better_ = better[:, None, None, None, None]
    kept = tuple(
        torch.where(better_, new, old.to(W.dtype).reshape(-1, *p)).reshape(*W.shape[:-2], *p).contiguous()
        for new, old, p in zip(rounded, factors, chain, strict=True)
    )
    error = torch.hypot(outside, torch.where(better, after, before)) * scale
    return kept, error.reshape(W.shape[:-2])


def _sweep(values: Tensor, given: list[Tensor], chain: Chain, sweeps: int) -> list[Tensor]:
    best, error = given, _error(values, given)
    if len(chain) == 1:
        return [values] if sweeps else given
    current = _right_orthonormal(given, chain)
    for turn in range(2 * sweeps):
        current = _back(values, current, chain) if turn % 2 else _there(values, current, chain)
        now = _error(values, current)
        better = now < error
        if not better.any():
            break
        error = torch.where(better, now, error)
        best = [torch.where(better[:, None, None, None, None], c, b) for c, b in zip(current, best, strict=True)]
    return best


# ---------------------------------------------------------------- permutations of the columns
def _primes(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def permutation_candidates(n: int, radices: Sequence[int]) -> dict[str, Tensor]:
    """Permutations that turn known transforms into butterflies, by name; ``W[:, perm]`` is what is projected.

    They are the identity, reversal, even-then-reversed-odd, the digit reversals of the radices, the stride permutations
    of their partial products, and the products of two of these. Each permutation comes once, under its shortest name;
    ``"p * q"`` is ``p[q]``: first p, then q among p's columns.

    Args:
        n: number of columns.
        radices: factors of n, from the most significant digit.

    Raises:
        ValueError: if the product of the radices is not n.

    Example:
        >>> from structmat.projection.refine import permutation_candidates
        >>> permutation_candidates(8, [2, 2, 2])["digit reversal"]
        tensor([0, 4, 2, 6, 1, 5, 3, 7])
    """
    check_int("n", n)
    radices = [check_int("a radix", r) for r in radices]
    if math.prod(radices) != n:
        raise ValueError(f"the product of the radices must be n = {n}, got {radices} of product {math.prod(radices)}")
    order = torch.arange(n)
    single = {
        "identity": order,
        "digit reversal": order.view(radices[::-1]).permute(tuple(range(len(radices) - 1, -1, -1))).flatten(),
        "even then reversed odd": torch.cat((order[::2], order[1::2].flip(0))),
        "reversal": order.flip(0),
        "inverse digit reversal": order.view(radices).permute(tuple(range(len(radices) - 1, -1, -1))).flatten(),
    }
    for stride in sorted({math.prod(radices[:i]) for i in range(1, len(radices))}):
        single[f"stride {stride}"] = order.view(-1, stride).T.flatten()
    found = {}
    for name, perm in single.items():
        found.setdefault(tuple(perm.tolist()), name)
    for (p, first), (q, second) in itertools.product(single.items(), repeat=2):
        found.setdefault(tuple(first[second].tolist()), f"{p} * {q}")
    return {name: torch.tensor(perm) for perm, name in found.items()}


@torch.no_grad()
def search_permutation(W: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """The permutation of W's columns, among :func:`permutation_candidates`, of the smallest lower bound.

    A candidate is given up as soon as its bound exceeds the best one, most of them after one cheap projection. What is
    no product of two of those families is not found: among n! permutations this looks at a few dozen (55 for n = 1024),
    and a small lower bound does not prove a small error unless it is zero.

    Args:
        W: shape (*batch, m, n) with ``chain.shape == (m, n)``; a batch is given one permutation.
        chain: the patterns; the radices are the prime factors of their column counts.

    Returns:
        Indices ``perm`` of shape (n) on W's device, such that ``W[..., perm]`` is to be projected, and the lower bound
        (*batch) of the error then, in double precision.

    Raises:
        TypeError: if W is neither floating point nor complex.
        ValueError: if W has another shape, or NaN or infinite entries.

    Example:
        >>> import torch
        >>> from structmat import Chain
        >>> from structmat.projection.refine import search_permutation
        >>> dft = torch.fft.fft(torch.eye(8, dtype=torch.complex128))
        >>> perm, lower = search_permutation(dft, Chain.dyadic(8))
        >>> perm.tolist(), lower.item() < 1e-12
        ([0, 4, 2, 6, 1, 5, 3, 7], True)
    """
    check_chain(W, chain)
    levels = [chain[0].a, *(right.a // left.a for left, right in itertools.pairwise(chain)), chain[-1].c, chain[-1].d]
    radices = [p for size in levels for p in _primes(size)]
    double, scale, norm = prepare(W)
    enough = tolerance(W) * torch.linalg.vector_norm(norm)
    best, lowest = torch.arange(W.shape[-1], device=W.device), None
    for perm in permutation_candidates(W.shape[-1], radices).values():
        perm = perm.to(W.device)
        limit = None if lowest is None else torch.linalg.vector_norm(lowest)
        lower = lower_bound(double[..., perm], chain, limit)
        if lower is not None and (limit is None or torch.linalg.vector_norm(lower) < limit):
            best, lowest = perm, lower
            if torch.linalg.vector_norm(lower) <= enough:
                break
    assert lowest is not None
    return best, (lowest * scale).reshape(W.shape[:-2])
