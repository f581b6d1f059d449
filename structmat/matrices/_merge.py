"""Runs of Kronecker-sparse factors as one: what lets a butterfly's log2 n levels be computed in two passes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.chain import Pattern, unchainable
from structmat.projection.splitting import merge as merge_chained
from structmat_kernels.kronecker_sparse import kronecker_sparse
from structmat_kernels.monarch import monarch, monarch_transposed

#: Reading and writing an entry of the vectors between two stages costs about as many multiply-adds on matrix units ...
PASS = 64
#: ... and without them, in IEEE float32 on a GPU: on an H100 four stages of radix 8 do better than two of radix 64.
PASS_IEEE = 5


def _mirrored(p: Pattern) -> Pattern:
    """The pattern in the mirror, the first index last: chains whose strides grow to the right are chains there."""
    return Pattern(p.d, p.b, p.c, p.a)


def _rank(left: Pattern, right: Pattern) -> int | None:
    """The rank of the blocks of ``left right``, chained or chained in the mirror; else None."""
    rank = left.rank(right)
    return rank if rank is not None else _mirrored(left).rank(_mirrored(right))


def joined(left: Pattern, right: Pattern) -> Pattern | None:
    """The pattern of ``left right`` where that is Kronecker-sparse, else None."""
    if left.rank(right) is not None:
        return left.merge(right)
    left, right = _mirrored(left), _mirrored(right)
    return _mirrored(left.merge(right)) if left.rank(right) is not None else None


def merge(left: Tensor, right: Tensor) -> Tensor:
    """The values of the product of two factors that :func:`joined` joins; shapes (*batch, a, b, c, d)."""
    first, second = Pattern(*left.shape[-4:]), Pattern(*right.shape[-4:])
    if first.rank(second) is not None:
        return merge_chained(left, right)
    # In the mirror: the second one's d is alpha times the first's, the first one's a is delta times the second's.
    rank = _rank(first, second)
    if rank is None:
        raise ValueError(unchainable(first, second))
    alpha, delta = second.d // first.d, first.a // second.a
    x = left.unflatten(-2, (rank, alpha)).unflatten(-5, (second.a, delta))  # (a, delta, b, rank, alpha, d)
    y = right.unflatten(-1, (alpha, first.d)).unflatten(-4, (delta, rank))  # (a, delta, rank, c, alpha, d)
    z = x * y if rank == 1 else torch.einsum("...axbrke,...axrcke->...axbcke", x, y)
    return z.flatten(-5, -4).flatten(-3, -2)


@torch.compiler.assume_constant_result  # Dynamo cannot trace it; of a compiled product it was asked at compilation
def _ieee() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def pass_cost(x: Tensor) -> int:
    """The cost of a pass over vectors of this dtype and device, for :func:`stages`."""
    return PASS_IEEE if x.is_cuda and x.dtype == torch.float32 and _ieee() else PASS


@functools.lru_cache(1024)
def stages(patterns: tuple[Pattern, ...], cost: int = PASS) -> tuple[tuple[int, int], ...]:
    """The cheapest way to cut a product into runs that merge: (start, stop) of every run, from left to right.

    A run costs a pass over its inputs and outputs (``cost`` an entry) and the multiply-adds of its merged factor.
    """
    count = len(patterns)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first so many factors, and where their last run starts
    for stop in range(1, count + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            whole: Pattern | None = patterns[start]
            for right in patterns[start + 1 : stop]:
                whole = joined(whole, right) if whole is not None else None
            if whole is None:
                break
            options.append((best[start][0] + cost * sum(whole.shape) + whole.num_params, start))
        best.append(min(options))
    cuts, stop = [], count
    while stop:
        cuts.append((best[stop][1], stop))
        stop = best[stop][1]
    return tuple(reversed(cuts))


def merge_levels(values: tuple[Tensor, ...], mirror: bool = False) -> Tensor:
    """The values of a product of factors that are chained with rank 1, in float32 at least.

    One path joins every input to every output, so that the product's entries are products of one entry of each factor:
    a broadcast multiplication a factor, no sums, no copies. The result's memory is in the order (*batch, a, d, b, c),
    in which the operations take blocks, from the first multiplication on.

    Args:
        values: of the factors from left to right, shapes (*batch, a, b, c, d).
        mirror: whether they are chained in the mirror, strides growing to the right.
    """
    a, d = values[-1 if mirror else 0].shape[-4], values[0 if mirror else -1].shape[-1]
    # The digits of an index: those of inputs met before are in a (in the mirror, d), of outputs to come in d (a).
    pieces = [v.unflatten(-4, (a, -1)).unflatten(-1, (-1, d)) for v in values]  # (*batch, a, A, b, c, D, d)
    lead = tuple(range(pieces[0].ndim - 6))
    A, B, C, D = (len(lead) + i for i in (1, 2, 3, 4))
    outer = (*lead, len(lead), len(lead) + 5)
    # In half precision factors are multiplied in float32; it is enough that the first one is.
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    product = pieces[0].permute(*outer, *((A, B, D, C) if mirror else (B, D, A, C)))
    product = product.to(dtype, memory_format=torch.contiguous_format).contiguous()  # one copy, with another dtype too
    product = product.flatten(-2)  # (*batch, a, d, outputs to come, outputs, inputs); not mirrored: outputs first
    for v in pieces[1:]:
        b = v.shape[B]
        if mirror:
            left = product.unflatten(-3, (-1, b))[..., None, :]
            product = left * v.permute(*outer, A, B, C, D)[..., None, :, :]
            product = product.flatten(-2).flatten(-3, -2)
        else:
            left = product.unflatten(-2, (b, -1))[..., None]
            product = left * v.permute(*outer, B, D, A, C)[..., None, :, :, :, :]
            product = product.flatten(-2).flatten(-4, -3)
    return product.squeeze(-3 if mirror else -2).movedim(-3, -1)


def _merge_run(values: tuple[Tensor, ...]) -> Tensor:
    """The values of a product that is Kronecker-sparse: runs of rank 1 in one direction first."""
    patterns = [Pattern(*v.shape[-4:]) for v in values]
    found, start = [], 0
    while start < len(values):
        ends = {}
        for mirror in (False, True):
            stop = start + 1
            while stop < len(values) and _step(patterns[stop - 1], patterns[stop], mirror) == 1:
                stop += 1
            ends[mirror] = stop
        mirror = ends[True] > ends[False]
        found.append(merge_levels(values[start : ends[mirror]], mirror))
        start = ends[mirror]
    return functools.reduce(merge, found)


def _step(left: Pattern, right: Pattern, mirror: bool) -> int | None:
    return _mirrored(left).rank(_mirrored(right)) if mirror else left.rank(right)


def merged_stages(values: tuple[Tensor, ...]) -> list[Tensor]:
    """The merged factors of a product, from left to right; half precision is multiplied in float32 and rounded once."""
    dtype = values[0].dtype
    patterns = tuple(Pattern(*v.shape[-4:]) for v in values)
    # Dynamo looks through caches, and says so.
    runs = (stages.__wrapped__ if torch.compiler.is_compiling() else stages)(patterns, pass_cost(values[0]))
    return [values[start] if stop - start == 1 else _merge_run(values[start:stop]).to(dtype) for start, stop in runs]


@functools.lru_cache(1024)
def product_flops(patterns: tuple[Pattern, ...], cost: int = PASS) -> int:
    """Operations of the merges and of the merged factors' product with a vector."""
    total = 0
    for start, stop in stages(patterns, cost):
        whole = patterns[start]
        for right in patterns[start + 1 : stop]:
            rank, merged = _rank(whole, right), joined(whole, right)
            assert merged is not None  # stages only cuts runs that join
            total += merged.num_params * (2 * rank if rank and rank > 1 else 1)
            whole = merged
        total += 2 * whole.num_params
    return total


def stage_product(x: Tensor, values: list[Tensor], nrows: int) -> Tensor:
    """``x @ (values[0] values[1] ...).mT``, cropped to nrows; missing entries of x count as zeros."""
    blocks = [v.movedim(-1, -3) for v in values]  # (*batch, a, d, b, c)
    while blocks:
        *rest, last = blocks
        a, d, _, p = last.shape[-4:]
        kept = nrows if len(blocks) <= 2 else None
        if rest and d == 1 and rest[-1].shape[-4] == 1:  # strided over block-diagonal: a Monarch matrix
            left = rest.pop()[..., 0, :, :, :]
            rows = left.shape[-3] * left.shape[-2]
            x = monarch(x, left.contiguous(), last[..., :, 0, :, :].contiguous(), rows if kept is None else kept)
        elif rest and a == 1 and rest[-1].shape[-3] == 1:  # the other way round: a transposed one
            outer = rest.pop()
            x = F.pad(x, (0, d * p - x.shape[-1])) if x.shape[-1] < d * p else x
            rows = outer.shape[-4] * outer.shape[-2]
            left, right = last[..., 0, :, :, :].mT, outer[..., :, 0, :, :].mT
            x = monarch_transposed(x, left.contiguous(), right.contiguous(), rows if kept is None else kept)
        else:
            x = F.pad(x, (0, a * p * d - x.shape[-1])) if x.shape[-1] < a * p * d else x
            x = kronecker_sparse(x, last)
        blocks = rest
    return x[..., :nrows]
