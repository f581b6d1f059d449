"""The config of block-sparse matrices, and what it shares with that of Pixelfly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import layouts
from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.calibrated import fit, metric_of
from structmat.config import Config
from structmat.layouts import Layout
from structmat.matrices import BlockSparse
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype

_PATTERNS: dict[str, Callable[..., Layout]] = {"flat_butterfly": layouts.flat_butterfly, "banded": layouts.banded}


def check_block(config: Any) -> None:
    """Raise unless the block of a config is one or two sizes; make a list of JSON a tuple."""
    if isinstance(config.block, list):  # JSON has no tuples
        object.__setattr__(config, "block", tuple(config.block))
    for size in config.block if isinstance(config.block, tuple) else (config.block,):
        check_int("block", size)


def seen_by(W: Tensor, moments: Moments, damping: float) -> Tensor:
    """W in double precision, columns and rows as large as inputs and output gradients make their entries count."""
    metric = metric_of(moments, W).damped(damping)
    seen = W.to(work_dtype(W)) * metric.S.diagonal().real.clamp_min(0).sqrt()
    return seen if metric.T is None else seen * metric.T.diagonal().real.clamp_min(0).sqrt()[:, None]


def nearest(
    found: Sequence[StructuredMatrix], W: Tensor, moments: Moments, damping: float
) -> tuple[int, StructuredMatrix]:
    """The matrix of least damped error, and which one it is; of equal ones the first."""
    metric, target = metric_of(moments, W).damped(damping), W.to(work_dtype(W))
    errors = [metric.squared(target - value.to(target.dtype).to_dense()) for value in found]
    best = min(range(len(found)), key=errors.__getitem__)
    return best, found[best]


def cells(m: int, n: int, block: Any) -> int:
    """The shorter side of the block grid."""
    return min(layouts.block_diagonal((m, n), block).grid)


def strides(m: int, n: int, block: Any) -> Iterator[tuple[int, Layout]]:
    """The flat butterflies of all strides, from the smallest."""
    for s in range(cells(m, n, block).bit_length()):
        yield 1 << s, layouts.flat_butterfly((m, n), block, 1 << s)


@dataclasses.dataclass(frozen=True)
class BlockSparseConfig(Config):
    """Block-sparse matrices; see :class:`structmat.BlockSparse`.

    Args:
        block: height and width of a block, or one number.
        pattern: "top_k" for the blocks of largest norm (of a matrix made at random: random ones; with moments, those of
            largest norm after each column and row has been multiplied by the root mean square of what it meets, where
            they serve better), "flat_butterfly" of the largest stride, or "banded" of the largest width that the budget
            allows.
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
        check_block(self)
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
            candidates = (layout for _, layout in strides(m, n, self.block))
        else:
            candidates = (layouts.banded((m, n), self.block, w) for w in range(cells(m, n, self.block)))
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

    def _calibrate(self, start: StructuredMatrix, W: Tensor, moments: Moments, damping: float) -> StructuredMatrix:
        found = [fit(start, W, moments, damping)]
        if self.pattern == "top_k" and isinstance(start, BlockSparse):
            density = self.resolve(*W.shape)["layout"]
            layout = layouts.top_k(seen_by(W, moments, damping), self.block, density)
            if not torch.equal(layout.mask, start.layout.mask):
                found.append(fit(BlockSparse.from_dense(W, layout), W, moments, damping))
        return nearest(found, W, moments, damping)[1]
