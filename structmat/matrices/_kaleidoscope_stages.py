"""A kaleidoscope as few stages: each of its butterflies in groups of factors, groups that touch at a border joined.

With high and low digits as groups, ``B B'^* ...`` reads high low | low high | high low | ...: what touches is of one
pattern, so that w pairs of two groups are 2 w + 1 stages. They are joined from the border outwards, for there every
step is a chain.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from structmat.matrices._merge import PASS, merge, merge_levels, pass_cost

#: Products of full blocks are done once for about as many vectors.
VECTORS = 64


def _times(start: int, stop: int, count: int, width: int) -> int:
    """How many stages a group of the radices is: the first and the last one touch their likes at the borders."""
    if start == 0:
        return 1 if stop == count else width + 1
    return width if stop == count else 2 * width


@functools.lru_cache(1024)
def groups(radices: tuple[int, ...], width: int, pass_: int = PASS) -> tuple[tuple[int, int], ...]:
    """The cheapest way to cut the radices into groups (start, stop), with the cost of a pass of :mod:`._merge`."""
    count = len(radices)
    best: list[tuple[float, tuple[tuple[int, int], ...]]] = [(0.0, ())]  # of the first so many radices
    for stop in range(1, count + 1):
        options = []
        for start in range(stop):
            block, times = math.prod(radices[start:stop]), _times(start, stop, count, width)
            cost = times * (2 * pass_ + block)  # for every row
            if start == 0 and stop == count:
                cost += (width - 1) * block * block / VECTORS
            options.append((best[start][0] + cost, (*best[start][1], (start, stop))))
        best.append(min(options))
    return best[count][1]


def kaleidoscope_stages(values: tuple[Tensor, ...], radices: tuple[int, ...]) -> list[Tensor]:
    """The merged factors, from left to right; half precision is multiplied in float32 and rounded once."""
    dtype, count = values[0].dtype, len(radices)
    if dtype in (torch.float16, torch.bfloat16):
        values = tuple(v.float() for v in values)
    # Dynamo looks through caches, and says so.
    plan = groups.__wrapped__ if torch.compiler.is_compiling() else groups
    cuts = plan(radices, len(values) // (2 * count), pass_cost(values[0]))
    stages: list[list[tuple[Tensor, ...]]] = []  # the runs of each: one, or two and more that touch
    for i in range(0, len(values), count):
        down = i % (2 * count) == 0  # the strides, from left to right
        runs = [values[i + a : i + b] if down else values[i + count - b : i + count - a] for a, b in cuts]
        first, *others = runs if down else reversed(runs)
        if stages:
            stages[-1].append(first)
        else:
            stages.append([first])
        stages.extend([run] for run in others)
    return [_merged(runs).to(dtype) for runs in stages]


def _merged(runs: list[tuple[Tensor, ...]]) -> Tensor:
    pairs = [_joined(*runs[i : i + 2]) for i in range(0, len(runs), 2)]
    return functools.reduce(merge, pairs)


def _joined(left: tuple[Tensor, ...], right: tuple[Tensor, ...] = ()) -> Tensor:
    """The product of all, where right's patterns are left's in reverse."""
    if not right:
        return merge_levels(left)
    product = merge(left[-1], right[0])
    for outer_left, outer_right in zip(reversed(left[:-1]), right[1:], strict=True):
        product = merge(merge(outer_left, product), outer_right)
    return product


@functools.lru_cache(1024)
def kaleidoscope_flops(radices: tuple[int, ...], width: int) -> int:
    """Operations of the merges and of the merged factors' product with a vector."""
    size, count, total = math.prod(radices), len(radices), 0
    for start, stop in groups(radices, width):
        block, stages = math.prod(radices[start:stop]), _times(start, stop, count, width)
        total += 2 * size * block * stages
        pairs, blocks = 2 * width - stages, [math.prod(radices[start:j]) for j in range(start + 1, stop + 1)]
        if stages == 1:  # all runs in one: width pairs, and the products of those
            pairs = width
            total += 2 * size * block * block * (width - 1)
        singles = 2 * width - 2 * pairs
        total += singles * size * sum(blocks[1:])
        # A step to the left is a chain of rank 1, one to the right of the rank of its radix.
        grown = blocks if stop < count else [math.prod(radices[j:stop]) for j in range(stop - 1, start - 1, -1)]
        order = radices[start:stop] if stop < count else radices[start:stop][::-1]
        total += pairs * size * (2 * order[0] * grown[0])
        total += pairs * size * sum((1 + 2 * r) * b for r, b in zip(order[1:], grown[1:], strict=True))
    return total
