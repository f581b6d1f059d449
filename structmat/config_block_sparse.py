"""The configs of block-sparse and Pixelfly matrices."""

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
from structmat.config import BudgetError, Config
from structmat.layouts import Layout
from structmat.layouts.layout import pair_of
from structmat.matrices import BlockSparse, Pixelfly
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype

_PATTERNS: dict[str, Callable[..., Layout]] = {"flat_butterfly": layouts.flat_butterfly, "banded": layouts.banded}


def _check_block(config: Any) -> None:
    if isinstance(config.block, list):  # JSON has no tuples
        object.__setattr__(config, "block", tuple(config.block))
    for size in config.block if isinstance(config.block, tuple) else (config.block,):
        check_int("block", size)


def _seen(W: Tensor, moments: Moments, damping: float) -> Tensor:
    """W in double precision, columns and rows as large as inputs and output gradients make their entries count."""
    metric = metric_of(moments, W).damped(damping)
    seen = W.to(work_dtype(W)) * metric.S.diagonal().real.clamp_min(0).sqrt()
    return seen if metric.T is None else seen * metric.T.diagonal().real.clamp_min(0).sqrt()[:, None]


def _nearest(
    found: Sequence[StructuredMatrix], W: Tensor, moments: Moments, damping: float
) -> tuple[int, StructuredMatrix]:
    """The matrix of least damped error, and which one it is; of equal ones the first."""
    metric, target = metric_of(moments, W).damped(damping), W.to(work_dtype(W))
    errors = [metric.squared(target - value.to(target.dtype).to_dense()) for value in found]
    best = min(range(len(found)), key=errors.__getitem__)
    return best, found[best]


def _cells(m: int, n: int, block: Any) -> int:
    """The shorter side of the block grid."""
    return min(layouts.block_diagonal((m, n), block).grid)


def strides(m: int, n: int, block: Any) -> Iterator[tuple[int, Layout]]:
    """The flat butterflies of all strides, from the smallest."""
    for s in range(_cells(m, n, block).bit_length()):
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
            candidates = (layout for _, layout in strides(m, n, self.block))
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

    def _calibrate(self, start: StructuredMatrix, W: Tensor, moments: Moments, damping: float) -> StructuredMatrix:
        found = [fit(start, W, moments, damping)]
        if self.pattern == "top_k" and isinstance(start, BlockSparse):
            density = self.resolve(*W.shape)["layout"]
            layout = layouts.top_k(_seen(W, moments, damping), self.block, density)
            if not torch.equal(layout.mask, start.layout.mask):
                found.append(fit(BlockSparse.from_dense(W, layout), W, moments, damping))
        return _nearest(found, W, moments, damping)[1]


# Of a budget without max_stride and rank, the shares that a search gives to the low rank beside free blocks.
_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
# Sweeps after which divisions of a budget are compared in the metric of moments.
_TRIED = 4


@dataclasses.dataclass(frozen=True)
class PixelflyConfig(Config):
    """Pixelfly matrices of flat butterflies, or of blocks where a matrix wants them; see :class:`structmat.Pixelfly`.

    A budget is divided between blocks and low rank, and gamma, which is a parameter too. What is not given follows the
    paper's rule: the largest stride that leaves the low rank a quarter of the budget, or the smallest one; and the rank
    that fills what is left.

    Args:
        block: height and width of a block, or one number.
        max_stride: of the butterfly, a power of two; without a budget 4, or the largest one of a smaller grid.
        rank: of the rest; without a budget the smaller side of a block.
        split: how :func:`project` divides a budget where neither max_stride nor rank is given. "search" projects at
            every stride that the budget allows and at low rank alone, and takes the least error, so that no flat
            butterfly and no low rank of as many parameters (but for gamma) is nearer. With moments it searches in their
            metric too, by a few sweeps for each split. What it takes depends on the matrix; ``num_params`` is that of
            "rule", and the budget bounds both. "rule" is faster, follows the rule, as random matrices do, and so has
            as many parameters as they.
        pattern: "flat_butterfly"; or "top_k" with a budget, for blocks that are chosen together with the low rank, as
            ``Pixelfly.from_dense`` does of a density (of a matrix made at random: random ones). The rule gives a
            quarter to the low rank; a search tries several shares, none and all among them.
        max_params: a budget.
        ratio: a budget as a share of dense.

    Example:
        >>> import structmat
        >>> structmat.PixelflyConfig(ratio=0.25).resolve(1024, 1024)
        {'layout': Layout(shape=(1024, 1024), block=(32, 32), nnz=192, density=0.1875), 'rank': 31}
        >>> structmat.PixelflyConfig(ratio=0.25, pattern="top_k").resolve(1024, 1024)
        {'layout': 0.1865234375, 'rank': 32, 'block': 32}
    """

    structure: ClassVar[str] = "pixelfly"
    matrix_class: ClassVar[type[StructuredMatrix]] = Pixelfly
    block: int | tuple[int, int] = 32
    max_stride: int | None = None
    rank: int | None = None
    split: str = "search"
    pattern: str = "flat_butterfly"

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
        if self.pattern not in ("flat_butterfly", "top_k"):
            raise ValueError(f'pattern must be "flat_butterfly" or "top_k", got {self.pattern!r}')
        if self.pattern == "top_k" and (self.max_stride is not None or not budgeted):
            raise ValueError('pattern="top_k" needs a budget (max_params or ratio), and no max_stride')

    def _fits(self, m: int, n: int, offsets: int) -> list[tuple[Layout, int]]:
        """Layouts of growing stride within the budget, and the largest rank beside each."""
        budget = self._budget(m, n, offsets)
        if self.max_stride is not None:
            options = [layouts.flat_butterfly((m, n), self.block, self.max_stride)]
        else:
            options = [layout for _, layout in strides(m, n, self.block)]
        side, found = m + n * offsets, []
        for layout in (beside(layout, offsets) for layout in options):
            left = budget - 1 - layout.num_params
            if left >= (self.rank or 0) * side:
                found.append((layout, self.rank if self.rank is not None else min(left // side, m, n * offsets)))
        if not found:
            raise self._too_small(m, n, offsets, options[0].num_params * offsets)
        return found

    def _free(self, m: int, n: int, share: float) -> tuple[float, int]:
        """The density that a share of the budget for the low rank leaves, and the rank."""
        whole, budget = layouts.full((m, n), self.block), self._budget(m, n, 1)
        area = whole.block[0] * whole.block[1]
        rank = min(int(share * budget), budget - 1 - area) // (m + n) if self.rank is None else self.rank
        rank = max(0, min(rank, m, n) if self.rank is None else rank)
        count = (budget - 1 - rank * (m + n)) // area
        if count < 1:
            raise self._too_small(m, n, 1, area)
        return min(count / whole.nnz, 1.0), rank

    def _budget(self, m: int, n: int, offsets: int) -> int:
        budget = self.budget(m, n * offsets)
        assert budget is not None
        return budget

    def _too_small(self, m: int, n: int, offsets: int, blocks: int) -> BudgetError:
        bo, bi = pair_of(self.block)
        low = (self.rank or 0) * (m + n * offsets)
        return BudgetError(
            f"pixelfly needs at least {blocks + low + 1} parameters for a {m} x {n * offsets} matrix, {blocks} of them "
            f"in blocks of {bo} x {bi}, {low} of low rank, and gamma; the budget is {self._budget(m, n, offsets)}. "
            "Take smaller blocks or a larger budget"
        )

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        return self._resolve(m, n)

    def _resolve(self, m: int, n: int, offsets: int = 1) -> dict[str, Any]:
        """As :meth:`resolve`; of a convolution the matrices of all offsets beside each other, of one layout."""
        if self.pattern == "top_k":
            density, rank = self._free(m, n, 0.25)
            return {"layout": density, "rank": rank, "block": self.block}
        if self.budget(m, n) is None:
            cells = _cells(m, n, self.block)
            stride = self.max_stride or min(4, 1 << (cells.bit_length() - 1))
            layout = beside(layouts.flat_butterfly((m, n), self.block, stride), offsets)
            most = min(m, n * offsets)
            rank = min(*layout.block, most) if self.rank is None else self.rank
            if rank > most:
                raise ValueError(f"rank must be at most min(rows, columns) = {most}, got {rank}")
            return {"layout": layout, "rank": rank}
        fits = self._fits(m, n, offsets)
        if self.rank is None:
            # Of layouts that leave a quarter, the last one; else the first.
            budget = self._budget(m, n, offsets)
            fits = [f for f in fits if 4 * (budget - f[0].num_params) >= budget] or fits[:1]
        return dict(zip(("layout", "rank"), fits[-1], strict=True))

    def _project(self, W: Tensor, offsets: int = 1) -> tuple[StructuredMatrix, None, Tensor]:
        m, n = int(W.shape[-2]), int(W.shape[-1]) // offsets
        found = [Pixelfly._project(W, layout, rank, block=self.block) for layout, rank in self._splits(m, n, offsets)]
        return min(found, key=lambda f: torch.linalg.vector_norm(f[2]).item())

    def _splits(self, m: int, n: int, offsets: int) -> list[tuple[Any, int]]:
        """Layouts, or densities, and ranks among which a projection chooses."""
        fixed = self.split == "rule" or self.max_stride is not None or self.rank is not None
        if fixed or self.budget(m, n) is None:
            sizes = self._resolve(m, n, offsets)
            return [(sizes["layout"], sizes["rank"])]
        if self.pattern == "top_k":
            fits: list[tuple[Any, int]] = list(dict.fromkeys(self._free(m, n, share) for share in _SHARES))
        else:
            fits = list(self._fits(m, n, offsets))
        side = m + n * offsets
        none = layouts.full((m, n * offsets), self.block)
        empty = Layout(torch.zeros_like(none.mask), none.block, none.shape)
        return [*fits, (empty, min((self._budget(m, n, offsets) - 1) // side, m, n * offsets))]

    def _calibrate(self, start: StructuredMatrix, W: Tensor, moments: Moments, damping: float) -> StructuredMatrix:
        found = [fit(start, W, moments, damping)]
        splits = self._splits(W.shape[0], W.shape[1], 1)
        if self.pattern == "top_k":  # blocks chosen with the moments in view
            seen = _seen(W, moments, damping)
            chosen = [Pixelfly._project(seen, s, r, sweeps=_TRIED, block=self.block)[0].layout for s, r in splits]
            splits = [(layout, r) for layout, (_, r) in zip(chosen, splits, strict=True)]
        # A few sweeps tell the splits apart; the best one is finished.
        tried = [Pixelfly._project(W, s, r, sweeps=_TRIED)[0] for s, r in splits if len(splits) > 1]
        fitted = [fit(value, W, moments, damping, _TRIED) for value in tried]
        layout, rank = splits[_nearest(fitted, W, moments, damping)[0] if tried else 0]
        old: Any = start
        if rank != old.rank or not torch.equal(layout.mask, old.layout.mask):
            found.append(fit(Pixelfly._project(W, layout, rank)[0], W, moments, damping))
        return _nearest(found, W, moments, damping)[1]


def beside(layout: Layout, offsets: int) -> Layout:
    """The layout of so many matrices of one layout beside each other: [B_0, B_1, ...].

    Raises:
        ValueError: if there is more than one and the blocks' width does not divide the columns of a matrix.
    """
    (m, n), (bo, bi) = layout.shape, layout.block
    if offsets == 1:
        return layout
    if n % bi:
        raise ValueError(
            f"block must have a width that divides the {n} input channels where the kernel is larger than 1 x 1, got "
            f"{bo} x {bi}"
        )
    return Layout(layout.mask.repeat(1, offsets), layout.block, (m, n * offsets), layout.coarsening)
