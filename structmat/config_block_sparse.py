"""The configs of block-sparse and Pixelfly matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import layouts
from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.layouts import Layout
from structmat.matrices import BlockSparse, Pixelfly

_PATTERNS: dict[str, Callable[..., Layout]] = {"flat_butterfly": layouts.flat_butterfly, "banded": layouts.banded}


def _check_block(config: Any) -> None:
    if isinstance(config.block, list):  # JSON has no tuples
        object.__setattr__(config, "block", tuple(config.block))
    for size in config.block if isinstance(config.block, tuple) else (config.block,):
        check_int("block", size)


def _cells(m: int, n: int, block: Any) -> int:
    """The shorter side of the block grid."""
    return min(layouts.block_diagonal((m, n), block).grid)


def _strides(m: int, n: int, block: Any) -> Iterator[tuple[int, Layout]]:
    """The flat butterflies of all strides, from the smallest."""
    for s in range(_cells(m, n, block).bit_length()):
        yield 1 << s, layouts.flat_butterfly((m, n), block, 1 << s)


@dataclasses.dataclass(frozen=True)
class BlockSparseConfig(Config):
    """Block-sparse matrices; see :class:`structmat.BlockSparse`.

    Args:
        block: height and width of a block, or one number.
        pattern: "top_k" for the blocks of largest norm (of a matrix made at random: random ones), "flat_butterfly" of
            the largest stride, or "banded" of the largest width that the budget allows.
        density: share of the blocks, in place of a budget.
        max_params: a budget; blocks cut by the edge count as whole ones.
        ratio: a budget as a share of dense; exactly one of the three.

    Example:
        >>> import structmat
        >>> config = structmat.BlockSparseConfig(block=32, pattern="flat_butterfly", ratio=0.1)
        >>> config.resolve(1024, 1024)
        {'layout': Layout(shape=(1024, 1024), block=(32, 32), nnz=96, density=0.09375)}
    """

    structure: ClassVar[str] = "blocksparse"
    matrix_class: ClassVar[type[StructuredMatrix]] = BlockSparse
    block: int | tuple[int, int] = 32
    pattern: str = "top_k"
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self)
        if self.pattern not in ("top_k", *_PATTERNS):
            raise ValueError(f'pattern must be "top_k", "flat_butterfly" or "banded", got {self.pattern!r}')
        if sum(v is not None for v in (self.density, self.max_params, self.ratio)) != 1:
            raise ValueError("give exactly one of density, max_params and ratio")
        if self.density is not None and not (isinstance(self.density, (int, float)) and 0 < self.density <= 1):
            raise ValueError(f"density must be a number in (0, 1], got {self.density!r}")

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        whole = layouts.full((m, n), self.block)
        area = whole.block[0] * whole.block[1]
        budget = self.budget(m, n)
        count = whole.nnz * (self.density or 0) if budget is None else budget // area
        if self.pattern == "top_k":
            if count < 1 and budget is not None:
                raise self._over(m, n, area)
            return {"layout": min(count / whole.nnz, 1.0), "block": self.block}
        found = None
        if self.pattern == "flat_butterfly":
            candidates = (layout for _, layout in _strides(m, n, self.block))
        else:
            candidates = (layouts.banded((m, n), self.block, w) for w in range(_cells(m, n, self.block)))
        for layout in candidates:
            if layout.nnz > count:
                break
            found = layout
        if found is None:
            smallest = layouts.block_diagonal((m, n), self.block).num_params
            if budget is None:
                raise ValueError(
                    f"density must be at least {smallest / area / whole.nnz:.3g} for a {self.pattern} layout of a "
                    f"{m} x {n} matrix in blocks of {self.block}, got {self.density}"
                )
            raise self._over(m, n, smallest)
        return {"layout": found}


@dataclasses.dataclass(frozen=True)
class PixelflyConfig(Config):
    """Pixelfly matrices of flat butterfly layouts; see :class:`structmat.Pixelfly`.

    A budget is divided between blocks and low rank. What is not given follows the paper's rule: the largest stride that
    leaves the low rank a quarter of the budget, or the smallest one; and the rank that fills what is left.

    Args:
        block: height and width of a block, or one number.
        max_stride: of the butterfly, a power of two; without a budget 4, or the largest one of a smaller grid.
        rank: of the rest; without a budget the smaller side of a block.
        split: how :func:`project` divides a budget where neither max_stride nor rank is given. "search" projects at
            every stride that the budget allows and at low rank alone, and takes the least error, so that no flat
            butterfly and no low rank of as many parameters (but for gamma) is nearer; "rule" is faster, follows the
            rule, as random matrices do, and so has as many parameters as they.
        max_params: a budget.
        ratio: a budget as a share of dense.

    Example:
        >>> import structmat
        >>> structmat.PixelflyConfig(ratio=0.25).resolve(1024, 1024)
        {'layout': Layout(shape=(1024, 1024), block=(32, 32), nnz=192, density=0.1875), 'rank': 31}
    """

    structure: ClassVar[str] = "pixelfly"
    matrix_class: ClassVar[type[StructuredMatrix]] = Pixelfly
    block: int | tuple[int, int] = 32
    max_stride: int | None = None
    rank: int | None = None
    split: str = "search"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self)
        if self.max_stride is not None:
            check_int("max_stride", self.max_stride)
        if self.rank is not None:
            check_int("rank", self.rank, 0)
        if self.split not in ("rule", "search"):
            raise ValueError(f'split must be "rule" or "search", got {self.split!r}')
        budgeted = (self.max_params or self.ratio) is not None
        both = self.max_stride is not None and self.rank is not None
        if budgeted and both:
            raise ValueError("give max_stride and rank or a budget (max_params, ratio), not all of them")

    def _fits(self, m: int, n: int) -> list[tuple[Layout, int]]:
        """Layouts of growing stride within the budget, and the largest rank beside each."""
        budget = self.budget(m, n)
        assert budget is not None
        if self.max_stride is not None:
            options = [layouts.flat_butterfly((m, n), self.block, self.max_stride)]
        else:
            options = [layout for _, layout in _strides(m, n, self.block)]
        found = []
        for layout in options:
            left = budget - 1 - layout.num_params
            if left >= (self.rank or 0) * (m + n):
                found.append((layout, self.rank if self.rank is not None else min(left // (m + n), m, n)))
        if not found:
            raise self._over(m, n, options[0].num_params + (self.rank or 0) * (m + n) + 1)
        return found

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        if self.budget(m, n) is None:
            cells = _cells(m, n, self.block)
            stride = self.max_stride or min(4, 1 << (cells.bit_length() - 1))
            layout = layouts.flat_butterfly((m, n), self.block, stride)
            rank = min(*layout.block, m, n) if self.rank is None else self.rank
            if rank > min(m, n):
                raise ValueError(f"rank must be at most min(rows, columns) = {min(m, n)}, got {rank}")
            return {"layout": layout, "rank": rank}
        fits = self._fits(m, n)
        if self.rank is None:
            # Of layouts that leave a quarter, the last one; else the first.
            budget = self.budget(m, n) or 0
            fits = [f for f in fits if 4 * (budget - f[0].num_params) >= budget] or fits[:1]
        return dict(zip(("layout", "rank"), fits[-1], strict=True))

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, None, Tensor]:
        m, n = int(W.shape[-2]), int(W.shape[-1])
        budget = self.budget(m, n)
        if self.split == "rule" or budget is None or self.max_stride is not None or self.rank is not None:
            return Pixelfly._project(W, **self.resolve(m, n))
        fits, rank = self._fits(m, n), min((budget - 1) // (m + n), m, n)
        empty = Layout(torch.zeros_like(fits[0][0].mask), fits[0][0].block, (m, n))
        found = [Pixelfly._project(W, layout, r) for layout, r in [(empty, rank), *fits]]
        return min(found, key=lambda f: torch.linalg.vector_norm(f[2]).item())
