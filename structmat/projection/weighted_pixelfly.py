"""Blocks plus low rank in the metric of a layer's inputs: alternating least squares with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.layouts.layout import Layout
from structmat.projection.weighted import Metric, cholesky

# A sweep that takes off less than this share of the squared error is the last one.
_SMALLEST_STEP = 2e-3
# Sweeps that are done in any case: the first ones are the slow start of the momentum.
_LEAST = 4


@dataclass
class Found:
    """Blocks plus low rank, in the coordinates of an :class:`InputMetric`.

    Attributes:
        layout: of the blocks.
        blocks: of each block row that has any, side by side, without what lies beyond the matrix.
        left: (m, rank), orthonormal columns.
        right: (rank, n), times the metric's factor.
        error: the squared norm of what is missed.
    """

    layout: Layout
    blocks: list[Tensor]
    left: Tensor
    right: Tensor
    error: float


@dataclass
class _Row:
    """The blocks of a block row: where they lie, and the factorised moments of their columns."""

    rows: slice
    cols: Tensor
    stored: Tensor
    lower: Tensor


class InputMetric:
    """W in the metric of the inputs alone, factorised once for many structures and sizes.

    Args:
        W: (m, n), double precision.
        metric: of the same sizes, positive definite, without output moments.
        dtype: of the sweeps; what is factorised is in double precision. Single is enough for a sketch, whose error is
            then measured on the result: by a thousandth of itself it may be larger than it need be.

    Raises:
        ValueError: if the metric is singular, or has output moments.
    """

    def __init__(self, W: Tensor, metric: Metric, dtype: torch.dtype | None = None) -> None:
        if metric.T is not None:
            raise ValueError("the metric must be that of the inputs alone: output moments couple the rows of blocks")
        dtype = W.dtype if dtype is None else dtype
        lower = cholesky(metric.S)
        seen = W @ lower  # |E lower|_F is the norm of E
        self.W, self.S, self.lower, self.seen = W, metric.S, lower.to(dtype), seen.to(dtype)
        self.slope = (seen @ lower.mH).to(dtype)
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self._leading: Tensor | None = None

    def leading(self, rank: int) -> Tensor:
        """Orthonormal (m, rank): the left singular vectors of the best low-rank matrices."""
        found = self._leading
        if found is None:
            A = self.seen.to(self.W.dtype)
            if A.shape[0] <= A.shape[1]:
                found = torch.linalg.eigh(A @ A.mH)[1].flip(-1)
            else:
                found = torch.linalg.qr(A @ torch.linalg.eigh(A.mH @ A)[1].flip(-1))[0]
            self._leading = found = found.to(self.seen.dtype)
        return found[:, :rank]

    def fit(self, layout: Layout, rank: int, sweeps: int, left: Tensor | None = None) -> Found:
        """Blocks at the places of a layout and a matrix of low rank, improved in turns.

        The blocks are the least-squares optimum for what the low rank leaves, block row by block row; the low rank is
        turned towards the optimum for what the blocks leave by one step of orthogonal iteration. Blocks are carried on
        in the direction of the last step (Nesterov 1983), from anew where that makes the error grow; the best of all
        sweeps is returned, its blocks at their optimum.

        Args:
            layout: of the blocks.
            rank: of the rest, at most min(m, n).
            sweeps: most of them.
            left: (m, rank), where the low rank starts; by default at the best matrix of low rank alone.

        Cost: a sweep takes 2 m n (c + 3 rank) operations, where c is how many columns the blocks of a row cover, and
        2 rank n^2.
        """
        basis = self.leading(rank) if left is None else torch.linalg.qr(left)[0]
        rows = self._rows(layout)
        right = basis.mH @ self.seen
        if not rows:  # low rank alone, which starts at its optimum
            basis = self.leading(rank)
            right = basis.mH @ self.seen
        best, error, count = (basis, right), float("inf"), 0
        old: list[Tensor] | None = None
        for sweep in range(sweeps if rows else 0):
            new = self._blocks(rows, basis, right)
            used = new
            if old is not None and rank:
                count += 1
                share = count / (count + 3)
                used = [b + share * (b - a) for a, b in zip(old, new, strict=True)]
            rest = self._without(rows, used)
            basis = torch.linalg.qr(rest @ (rest.mH @ basis))[0]
            right = basis.mH @ rest
            now = (rest - basis @ right).abs().square().sum().item()
            if now < error:
                gained, error, best = error - now, now, (basis, right)
                if rank == 0 or (sweep >= _LEAST and gained <= _SMALLEST_STEP * now):
                    break
            else:
                count = 0
            old = new
        basis, right = best
        blocks = self._blocks(rows, basis, right)
        error = (self._without(rows, blocks) - basis @ right).abs().square().sum().item()
        return Found(layout, blocks, basis, right, error)

    def factors(self, found: Found) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks as (nnz, bo, bi), 0 beyond the matrix, and the factors (m, rank) and (rank, n) of the low rank."""
        bo, bi = found.layout.block
        values = self.seen.new_zeros(found.layout.nnz, bo, bi)
        for row, block in zip(self._rows(found.layout), found.blocks, strict=True):
            wide = self.seen.new_zeros(bo, len(row.stored) * bi)
            wide[: block.shape[0], : block.shape[1]] = block  # only the last block of a row is cut by the edge
            values[row.stored] = wide.unflatten(-1, (len(row.stored), bi)).movedim(-2, 0)
        right = torch.linalg.solve_triangular(self.lower, found.right, upper=False, left=False)
        return values, found.left, right

    # ---------------------------------------------------------------- the two halves of a sweep
    def _blocks(self, rows: Sequence[_Row], basis: Tensor, right: Tensor) -> list[Tensor]:
        """The best blocks beside a matrix of low rank."""
        inner = right @ self.lower.mH
        return [
            torch.cholesky_solve(
                (self.slope[row.rows][:, row.cols] - basis[row.rows] @ inner[:, row.cols]).mH, row.lower
            ).mH
            for row in rows
        ]

    def _without(self, rows: Sequence[_Row], blocks: Sequence[Tensor]) -> Tensor:
        """What blocks leave of W, in the metric's coordinates."""
        rest = self.seen.clone()
        for row, block in zip(rows, blocks, strict=True):
            rest[row.rows] -= block @ self.lower[row.cols]
        return rest

    def _rows(self, layout: Layout) -> list[_Row]:
        (m, n), (bo, bi), found = self.W.shape, layout.block, []
        stored = layout.rows.to(self.W.device)
        for i in range(layout.grid[0]):
            index = (stored == i).nonzero()[:, 0]
            if not len(index):
                continue
            columns = layout.columns.to(self.W.device)[index]
            order = columns.argsort()
            index, columns = index[order], columns[order]
            cols = (columns[:, None] * bi + torch.arange(bi, device=self.W.device)).flatten()
            cols, key = cols[cols < n], tuple(columns.tolist())
            if key not in self._columns:
                self._columns[key] = cholesky(self.S[cols[:, None], cols]).to(self.seen.dtype)
            found.append(_Row(slice(i * bo, min((i + 1) * bo, m)), cols, index, self._columns[key]))
        return found
