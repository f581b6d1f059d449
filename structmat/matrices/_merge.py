"""Runs of Kronecker-sparse factors as one: what lets a butterfly's log2 n levels be computed in two passes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.chain import Pattern, unchainable
from structmat.projection.splitting import merge as merge_chained
from structmat_kernels.kronecker_merge import kronecker_merge
from structmat_kernels.kronecker_sparse import kronecker_sparse
from structmat_kernels.monarch import monarch, monarch_transposed

#: Reading and writing an entry of the vectors between two stages costs about as many multiply-adds on matrix units ...
PASS = 64
#: ... and without them, in IEEE float32 on a GPU: on an H100 four stages of radix 8 do better than two of radix 64.
PASS_IEEE = 5
#: Entries that a CPU takes through all stages at a time.
CACHED = 1 << 17


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


def _ieee() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


# Dynamo cannot trace the question and keeps the answer; torch.compiler.assume_constant_result would import dynamo.
_ieee._dynamo_marked_constant = True


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


def merge_levels(values: tuple[Tensor, ...]) -> Tensor:
    """The values of a product that is Kronecker-sparse: levels in one direction at once, the others one by one.

    One by one, for what two later factors make together may be no factor that joins.
    """
    patterns = [Pattern(*v.shape[-4:]) for v in values]
    ends = [_level_end(patterns, mirror) for mirror in (False, True)]
    stop, dtype = max(ends), values[0].dtype
    if stop < len(values) and dtype in (torch.float16, torch.bfloat16):  # rounded once, in the end
        values = tuple(v.float() for v in values)
    first = kronecker_merge(values[:stop], mirror=ends[1] > ends[0]).movedim(-3, -1)
    return functools.reduce(merge, values[stop:], first).to(dtype)


def _level_end(patterns: list[Pattern], mirror: bool) -> int:
    """How many factors there are before one that is not chained with rank 1."""
    stop = 1
    while stop < len(patterns):  # a plain loop: dynamo traces it
        left, right = patterns[stop - 1], patterns[stop]
        if (_mirrored(left).rank(_mirrored(right)) if mirror else left.rank(right)) != 1:
            break
        stop += 1
    return stop


def merged_stages(values: tuple[Tensor, ...]) -> list[Tensor]:
    """The merged factors of a product, from left to right; half precision is multiplied in float32 and rounded once."""
    patterns = tuple(Pattern(*v.shape[-4:]) for v in values)
    # Dynamo looks through caches, and says so.
    runs = (stages.__wrapped__ if torch.compiler.is_compiling() else stages)(patterns, pass_cost(values[0]))
    return [values[start] if stop - start == 1 else merge_levels(values[start:stop]) for start, stop in runs]


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
    differentiated = torch.is_grad_enabled() and (x.requires_grad or any([v.requires_grad for v in values]))
    if x.device.type != "cpu" or differentiated or torch.compiler.is_compiling() or values[0].ndim > 4:
        return _stage_product(x, values, nrows)
    # A few rows at a time go through all stages: what is between stays in the cache.
    rows = max(1, CACHED // max(1, x.shape[-1]))
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) < 2 * rows:
        return _stage_product(x, values, nrows)
    y = torch.cat([_stage_product(part, values, nrows) for part in flat.split(rows)])
    return y.reshape(*x.shape[:-1], nrows)


def _stage_product(x: Tensor, values: list[Tensor], nrows: int) -> Tensor:
    blocks = [v.movedim(-1, -3) for v in values]  # (*batch, a, d, b, c)
    while blocks:
        last = blocks.pop()
        a, d, _, p = last.shape[-4:]
        kept = nrows if len(blocks) <= 1 else None
        if blocks and d == 1 and blocks[-1].shape[-4] == 1:  # strided over block-diagonal: a Monarch matrix
            left = blocks.pop()[..., 0, :, :, :]
            rows = left.shape[-3] * left.shape[-2]
            x = monarch(x, left.contiguous(), last[..., :, 0, :, :].contiguous(), rows if kept is None else kept)
        elif blocks and a == 1 and blocks[-1].shape[-3] == 1:  # the other way round: a transposed one
            outer = blocks.pop()
            x = F.pad(x, (0, d * p - x.shape[-1])) if x.shape[-1] < d * p else x
            rows = outer.shape[-4] * outer.shape[-2]
            left, right = last[..., 0, :, :, :].mT, outer[..., :, 0, :, :].mT
            x = monarch_transposed(x, left.contiguous(), right.contiguous(), rows if kept is None else kept)
        else:
            x = F.pad(x, (0, a * p * d - x.shape[-1])) if x.shape[-1] < a * p * d else x
            x = kronecker_sparse(x, last)
    return x[..., :nrows]
