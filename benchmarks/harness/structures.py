"""What the linear layers of the training benchmarks become at a share of their parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

from structmat import BudgetError, ButterflyConfig, LowRankConfig, MonarchConfig, PixelflyConfig
from structmat.chain import Chain
from structmat.config import Config

#: In the order of the tables.
STRUCTURES = ("dense", "pixelfly", "monarch", "butterfly", "lowrank")
#: What the kernels are fast for, and 16 for small layers.
BLOCKS = (128, 64, 32, 16)
Shapes = Mapping[str, tuple[int, int]]


def configs(structure: str, ratio: float, shapes: Shapes) -> dict[str, Config] | None:
    """A config for each layer, by name; None for dense.

    Args:
        structure: one of ``STRUCTURES``.
        ratio: the largest share of each layer's dense parameters.
        shapes: (out, in) of the layers by name.

    Raises:
        BudgetError: if a layer has no matrix of the structure within the budget.
        ValueError: if the structure is unknown, or does not exist for a layer's size.
    """
    if structure == "dense":
        return None
    makers = {"pixelfly": _pixelfly, "monarch": _monarch, "butterfly": _butterfly, "lowrank": _low_rank}
    if structure not in makers:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
    return {name: makers[structure](m, n, ratio) for name, (m, n) in shapes.items()}


def parameters(found: Mapping[str, Config] | None, shapes: Shapes) -> int:
    """Parameters of the layers' weights, biases left out."""
    return sum(m * n if found is None else found[name].num_params(m, n) for name, (m, n) in shapes.items())


def _whole(rank: int, unit: int = 8) -> int:
    """A rank that tensor cores like: the next lower multiple of 8, or of 4 where a kernel pads it in any case."""
    return rank if rank < unit else rank // unit * unit


def _low_rank(m: int, n: int, ratio: float) -> Config:
    return LowRankConfig(rank=_whole(LowRankConfig(ratio=ratio).resolve(m, n)["rank"]))


@functools.cache
def _monarch(m: int, n: int, ratio: float) -> Config:
    """2 / ratio blocks, of which a square matrix of the full hidden width has exactly this share, or half as many.

    The ones with more parameters, in rectangles that are not the former; hidden blocks are multiples of 8.
    """
    found: list[tuple[int, int, MonarchConfig]] = []
    error: BudgetError | None = None
    for nblocks in (min(m, n, max(1, round(share / ratio))) for share in (2, 1)):
        try:
            rank = MonarchConfig(nblocks=nblocks, ratio=ratio).resolve(m, n)["rank"]
        except BudgetError as caught:
            error = error or caught
            continue
        config = MonarchConfig(nblocks=nblocks, rank=max(1, _whole(nblocks * rank) // nblocks))
        found.append((config.num_params(m, n), nblocks, config))
    if not found:
        raise error or AssertionError
    return max(found, key=lambda f: f[:2])[2]


@functools.cache
def _pixelfly(m: int, n: int, ratio: float) -> Config:
    """The paper's division of a budget, in the largest blocks that leave a butterfly, and a rank that is whole.

    A butterfly has a stride of at least 4: two diagonals of cells beside the main one. Where no block gives that, the
    largest of those with most. gamma, one number, is not counted.
    """
    best: tuple[int, PixelflyConfig] | None = None
    budget = int(ratio * m * n)
    for block in (b for b in BLOCKS if b <= min(m, n)):
        try:
            found = PixelflyConfig(block=block, max_params=budget + 1, split="rule").resolve(m, n)
        except BudgetError:
            continue
        if found["rank"] < 1:
            continue
        layout, cells = found["layout"], min(found["layout"].grid)
        diagonals = layout.nnz * cells // layout.mask.numel()  # of cells: log2(max_stride) + 1
        if best is None or min(diagonals, 3) > best[0]:
            stride, rank = 1 << (diagonals - 1), _whole(found["rank"], 4)
            best = min(diagonals, 3), PixelflyConfig(block=block, max_stride=stride, rank=rank)
    if best is None:
        raise BudgetError(
            f"no pixelfly layout in blocks of {min(BLOCKS)} to {max(BLOCKS)} leaves room for low rank in {budget} "
            f"parameters of a {m} x {n} matrix"
        )
    return best[1]


@functools.cache
def _butterfly(m: int, n: int, ratio: float) -> Config:
    """Butterflies of three factors, one or the sum of two or four, with at least 0.9 of the budget if there are any.

    Of these the ones that read and write least: the widths between their factors, times the terms. Then those with most
    parameters. If there are none, those with most parameters.
    """
    budget = int(ratio * m * n)
    found: list[tuple[int, int, int, tuple[tuple[int, int], ...]]] = []
    smallest = m * n
    for rows, columns in itertools.product(_ordered(m, 3), _ordered(n, 3)):
        radices = tuple(zip(rows, columns, strict=True))
        if (1, 1) in radices:
            continue
        size = Chain.mixed_radix(radices).num_params
        smallest = min(smallest, size)
        widths = m + rows[1] * rows[2] * columns[0] + rows[2] * columns[0] * columns[1] + n
        for terms in (1, 2, 4):
            if size * terms <= budget:
                found.append((terms * widths, -size * terms, terms, radices))
    if not found:
        raise BudgetError(
            f"butterflies of three factors need at least {smallest} parameters for a {m} x {n} matrix, the budget is "
            f"{budget}"
        )
    full = [f for f in found if -f[1] >= 0.9 * budget]
    _, _, terms, radices = min(full) if full else min(found, key=lambda f: f[1:])
    return ButterflyConfig(radices=radices, terms=terms)


def _ordered(n: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of so many factors, in order."""
    if count == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in _ordered(n // first, count - 1):
                yield (first, *rest)
