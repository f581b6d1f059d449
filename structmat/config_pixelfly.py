"""The config of Pixelfly matrices: how a budget is divided between blocks and low rank."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import layouts
from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.calibrated import fit, metric_of
from structmat.config import BudgetError, Config
from structmat.config_block_sparse import cells, check_block, nearest, seen_by, strides
from structmat.layouts import Layout
from structmat.layouts.layout import pair_of
from structmat.matrices import BlockSparse, LowRank, Pixelfly
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.projection.weighted_pixelfly import Found, InputMetric

# Of a budget without max_stride and rank, the shares that a search gives to the low rank beside free blocks.
_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
# Sweeps after which divisions of a budget are compared in the metric of moments.
_TRIED = 4


@dataclasses.dataclass(frozen=True)
class _Round:
    """So many more sweeps for the best splits: at most ``most``, of squared errors up to ``near`` times the least."""

    sweeps: int
    near: float = 1.0
    most: int = 99


# Of a search in the metric of inputs; and of a sketch, which is to be quick.
_SWEEPS = 60
_SEARCH = _Round(6), _Round(_SWEEPS, 1.3, 2)
_SKETCH = _Round(1), _Round(6, 1.7, 2), _Round(14, 1.08, 1)


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
        check_block(self)
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
            count = cells(m, n, self.block)
            stride = self.max_stride or min(4, 1 << (count.bit_length() - 1))
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
        if self.pattern == "flat_butterfly" and moments.outputs is None:
            return self._by_inputs(start, W, _input_metric(W, moments, damping))
        found = [fit(start, W, moments, damping)]
        splits = self._splits(W.shape[0], W.shape[1], 1)
        if self.pattern == "top_k":  # blocks chosen with the moments in view
            seen = seen_by(W, moments, damping)
            chosen = [Pixelfly._project(seen, s, r, sweeps=_TRIED, block=self.block)[0].layout for s, r in splits]
            splits = [(layout, r) for layout, (_, r) in zip(chosen, splits, strict=True)]
        # A few sweeps tell the splits apart; the best one is finished.
        tried = [Pixelfly._project(W, s, r, sweeps=_TRIED)[0] for s, r in splits if len(splits) > 1]
        fitted = [fit(value, W, moments, damping, _TRIED) for value in tried]
        layout, rank = splits[nearest(fitted, W, moments, damping)[0] if tried else 0]
        old: Any = start
        if rank != old.rank or not torch.equal(layout.mask, old.layout.mask):
            found.append(fit(Pixelfly._project(W, layout, rank)[0], W, moments, damping))
        return nearest(found, W, moments, damping)[1]

    def _sketch(
        self, W: Tensor, moments: Moments, damping: float, sweeps: int, shared: dict[Any, Any]
    ) -> StructuredMatrix:
        if self.pattern != "flat_butterfly" or moments.outputs is not None:
            return super()._sketch(W, moments, damping, sweeps, shared)
        if "metric" not in shared:
            # In single precision unless W is in double.
            dtype = torch.promote_types(W.dtype, torch.float32)
            shared["metric"] = _input_metric(W, moments, damping, dtype)
        return _pixelfly(self._best_split(W, shared["metric"], _SKETCH), W, shared["metric"])

    def _best_split(self, W: Tensor, metric: InputMetric, rounds: tuple[_Round, ...]) -> Found:
        """Blocks and low rank at the split that wins round after round."""
        # Round after round from where the low rank was; the momentum begins anew.
        left = [metric.fit(layout, rank, rounds[0].sweeps) for layout, rank in self._splits(W.shape[0], W.shape[1], 1)]
        for one in rounds[1:]:
            left.sort(key=lambda f: f.error)
            # More blocks begin worse and may end better.
            near = [f for f in left if f.layout.nnz and f.error <= one.near * left[0].error][: one.most]
            alone = [f for f in left if not f.layout.nnz]  # at its optimum from the beginning
            more = [metric.fit(f.layout, f.left.shape[1], one.sweeps, f.left) for f in near]
            left = [*alone, *(min(pair, key=_error) for pair in zip(near, more, strict=True))]
        return min(left, key=_error)

    def _by_inputs(self, start: Any, W: Tensor, metric: InputMetric) -> StructuredMatrix:
        """The better of what the best split gives and what the plain projection, from which it starts, comes to."""
        left = start.low_rank.left.to(metric.W.dtype)
        again = metric.fit(start.layout, start.rank, _SWEEPS, left)
        best = min((again, self._best_split(W, metric, _SEARCH)), key=lambda f: f.error)
        found = [_pixelfly(best, W, metric), start]
        errors = [_squared(metric, value) for value in found]
        return found[0] if errors[0] < errors[1] else start


def _error(found: Found) -> float:
    return found.error


def _input_metric(W: Tensor, moments: Moments, damping: float, dtype: torch.dtype | None = None) -> InputMetric:
    return InputMetric(W.to(work_dtype(W)), metric_of(moments, W).damped(damping), dtype)


def _squared(metric: InputMetric, value: StructuredMatrix) -> float:
    error = metric.W - value.to(metric.W.dtype).to_dense()
    return torch.sum((error.conj() * (error @ metric.S)).real).item()


def _pixelfly(found: Found, W: Tensor, metric: InputMetric) -> Pixelfly:
    """The matrix with equal weights of both parts, the low rank's factors of equal norms."""
    values, left, right = metric.factors(found)
    scale = torch.linalg.vector_norm(right, dim=-1).clamp_min(torch.finfo(W.dtype).tiny).sqrt()
    low = LowRank(2**0.5 * left * scale, 2**0.5 * right / scale[:, None]).to(W.dtype)
    blocks = BlockSparse.from_dense(torch.zeros_like(W), found.layout)
    blocks = dataclasses.replace(blocks, values=(2 * values).to(W.dtype))
    return Pixelfly(W.new_full((1,), 0.5), blocks, low)


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
