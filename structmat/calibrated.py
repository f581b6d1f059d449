"""Structured matrices fitted in the metric of data, started from any matrix of their structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from structmat.base import StructuredMatrix
from structmat.lazy import Sum
from structmat.matrices import BlockDiagonal, BlockSparse, LowRank, Monarch, PivotedLowRank, Pixelfly
from structmat.projection.blockwise import join_slices, slice_ranks, split_slices
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.projection.weighted import SWEEPS, Blocks, Metric, improve

# Quasi-Newton steps for classes that are not sums of blocks.
_STEPS = 60


@torch.no_grad()
def fit(
    start: StructuredMatrix,
    W: Tensor,
    moments: Moments,
    damping: float,
    sweeps: int = SWEEPS,
    dtype: torch.dtype | None = None,
) -> StructuredMatrix:
    """A matrix of the structure of ``start``, nearer to W in the metric of the moments, or ``start`` itself.

    Sums of dense and low-rank blocks (low rank, block diagonal, block sparse, Monarch, Pixelfly, and sums of them) are
    fitted by :func:`structmat.projection.weighted.descend`, all others by L-BFGS on all their factors at once. Neither
    increases the damped error; what is returned has been measured after rounding to the dtype of ``start``.

    Args:
        start: shape (m, n), no batch.
        W: shape (m, n).
        moments: of the layer, see :class:`structmat.Moments`.
        damping: share of the mean of the moments' diagonals that is added to these diagonals. What is made small is
            then the calibrated squared error plus that share of the plain one.
        sweeps: most sweeps over the blocks of a sum of blocks; of L-BFGS ten times as many steps, up to 60.
        dtype: in which to work; double precision by default. Single is enough to compare sizes and structures.
    """
    double = work_dtype(W) if dtype is None else dtype
    metric = metric_of(moments, W).damped(damping).to(double)
    target, value = W.to(double), start.to(double)
    parts = _blocks(value)
    if parts is None:
        fitted, before = _polish(value, target, metric, 10 * sweeps), metric.squared(target - value.to_dense())
    else:
        fitted, before = _by_blocks(parts, target, metric, sweeps)
    fitted = fitted.to(start.dtype)
    after = metric.squared(target - fitted.to(double).to_dense())
    return fitted if after < before else start


@torch.no_grad()
def calibrated_errors(W: Tensor, matrices: list[StructuredMatrix], moments: Moments) -> list[float]:
    """The relative errors of matrices in the metric of the moments, without damping."""
    double, metric = work_dtype(W), metric_of(moments, W)
    whole = metric.squared(W.to(double)) or 1.0
    return [math.sqrt(metric.squared(W.to(double) - A.to(double).to_dense()) / whole) for A in matrices]


def metric_of(moments: Moments, W: Tensor) -> Metric:
    """The moments in double precision where W is; raise unless they fit to it."""
    m, n = W.shape[-2:]
    if len(moments.mean) != n or (moments.outputs is not None and len(moments.outputs) != m):
        outputs = "none" if moments.outputs is None else len(moments.outputs)
        raise ValueError(
            f"moments are of {len(moments.mean)} inputs and of {outputs} outputs, W is {m} x {n}: they must agree"
        )
    double = work_dtype(W)
    if moments.inputs.is_complex() and not double.is_complex:
        raise TypeError("moments are complex, W is not")
    place: dict[str, Any] = {"dtype": double, "device": W.device}
    return Metric(moments.inputs.to(**place), None if moments.outputs is None else moments.outputs.to(**place))


# ---------------------------------------------------------------- classes as sums of blocks
@dataclasses.dataclass
class _Parts:
    """The blocks of a value, the sizes in which they lie, and how to make the value of them again."""

    blocks: list[Blocks]
    size: tuple[int, int]
    build: Callable[[], StructuredMatrix]


def _by_blocks(parts: _Parts, W: Tensor, metric: Metric, sweeps: int) -> tuple[StructuredMatrix, float]:
    """The value in the end, and the squared error before."""
    m, n = parts.size
    wide = F.pad(W, (0, n - W.shape[1], 0, m - W.shape[0]))
    _, before = improve(wide, parts.blocks, metric.padded(m, n), sweeps)
    return parts.build(), before


def _blocks(value: StructuredMatrix) -> _Parts | None:
    """The blocks of a value in copies of its factors, or None for a class that is no sum of blocks."""
    if isinstance(value, Sum):
        parts = [_blocks(term) for term in value.terms]
        if any(part is None for part in parts):
            return None
        return _join([part for part in parts if part is not None], lambda *terms: Sum(terms))
    found = _OF_CLASS.get(type(value))
    return None if found is None else found(value)


def _join(parts: list[_Parts], build: Callable[..., StructuredMatrix]) -> _Parts:
    blocks = [block for part in parts for block in part.blocks]
    size = max(part.size[0] for part in parts), max(part.size[1] for part in parts)
    return _Parts(blocks, size, lambda: build(*[part.build() for part in parts]))


def _of_low_rank(value: Any) -> _Parts:
    m, n = value.shape
    block = Blocks(_range(value, 0, m)[None], _range(value, 0, n), value.left[None].clone(), value.right[None].clone())

    def build() -> StructuredMatrix:
        left, right = _balanced(block.left, block.right)
        return LowRank(left[0], right[0])

    return _Parts([block], (m, n), build)


def _of_pivoted(value: Any) -> _Parts:
    parts = _of_low_rank(value.low_rank())

    def build() -> StructuredMatrix:
        found: Any = parts.build()
        return PivotedLowRank.from_low_rank(found)

    return dataclasses.replace(parts, build=build)


def _of_block_diagonal(value: Any) -> _Parts:
    k, q, p = value.blocks.shape
    blocks = [
        Blocks(_range(value, i * q, q)[None], _range(value, i * p, p), value.blocks[i : i + 1].clone())
        for i in range(k)
    ]
    return _Parts(
        blocks, (k * q, k * p), lambda: BlockDiagonal(torch.cat([b.left for b in blocks]), value.nrows, value.ncols)
    )


def _of_block_sparse(value: Any) -> _Parts:
    layout, (bo, bi) = value.layout, value.values.shape[-2:]
    blocks, stored = [], layout.rows.to(value.device)
    for row in range(layout.grid[0]):
        index = (stored == row).nonzero()[:, 0]
        if len(index):
            columns = layout.columns.to(value.device)[index]
            cols = (columns[:, None] * bi + _range(value, 0, bi)).flatten()
            held = value.values[index].movedim(0, -2).flatten(-2)[None]  # (1, bo, blocks of the row times bi)
            blocks.append((index, Blocks(_range(value, row * bo, bo)[None], cols, held.clone())))

    def build() -> StructuredMatrix:
        values = torch.zeros_like(value.values)
        for index, block in blocks:
            values[index] = block.left[0].unflatten(-1, (len(index), bi)).movedim(-2, 0)
        return dataclasses.replace(value, values=values)

    return _Parts([block for _, block in blocks], (layout.grid[0] * bo, layout.grid[1] * bi), build)


def _of_monarch(value: Any) -> _Parts:
    l, s, r, k, q, p = value.sizes
    left, right = split_slices(value.left, value.right)
    keep, rows = slice_ranks(l, k, q, value.device), _range(value, 0, l * s).view(s, l).T
    blocks = [Blocks(rows, _range(value, i * p, p), left[i].clone(), right[i].clone(), keep[i]) for i in range(k)]

    def build() -> StructuredMatrix:
        pairs = [_balanced(block.left, block.right) for block in blocks]
        joined = join_slices(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]), r, q)
        return Monarch(*joined, value.nrows, value.ncols)

    return _Parts(blocks, (l * s, k * p), build)


def _of_pixelfly(value: Any) -> _Parts:
    gamma = value.gamma[0]
    parts = [_of_block_sparse(gamma * value.block_sparse), _of_low_rank((1 - gamma) * value.low_rank)]
    return _join(parts, lambda B, L: Pixelfly(value.gamma, (1 / gamma) * B, (1 / (1 - gamma)) * L))


_OF_CLASS: dict[type, Callable[[Any], _Parts]] = {
    LowRank: _of_low_rank,
    PivotedLowRank: _of_pivoted,
    BlockDiagonal: _of_block_diagonal,
    BlockSparse: _of_block_sparse,
    Monarch: _of_monarch,
    Pixelfly: _of_pixelfly,
}


def _range(value: StructuredMatrix, start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, device=value.device)


def _balanced(left: Tensor, right: Any) -> tuple[Tensor, Tensor]:
    """Factors of the same products, each hidden unit's column and row of equal norms: no overflow when rounded."""
    a, b = torch.linalg.vector_norm(left, dim=-2), torch.linalg.vector_norm(right, dim=-1)
    root = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1)
    return left * root[..., None, :], right / root[..., None]


# ---------------------------------------------------------------- all other classes
def _polish(value: StructuredMatrix, W: Tensor, metric: Metric, steps: int = _STEPS) -> StructuredMatrix:
    """L-BFGS on all factors at once; the best of its points."""
    leaves, spec = pytree.tree_flatten(value)
    free = [leaf.detach().clone().requires_grad_() if _trainable(leaf) else leaf for leaf in leaves]
    params = [leaf for leaf in free if _trainable(leaf)]
    # In the metric's own scale, so that the tolerances of the method mean the same for every layer.
    scale = metric.squared(W) or 1.0
    best: tuple[float, list[Tensor]] = math.inf, []

    def loss() -> Tensor:
        nonlocal best
        for p in params:
            p.grad = None
        with torch.enable_grad():
            error = W - pytree.tree_unflatten(free, spec).to_dense()
            weighted = error @ metric.S if metric.T is None else metric.T @ error @ metric.S
            found = torch.sum((error.conj() * weighted).real) / scale
            found.backward()
        if found.item() < best[0]:
            best = found.item(), [p.detach().clone() for p in params]
        return found

    steps = min(steps, _STEPS)
    torch.optim.LBFGS(params, max_iter=steps, history_size=20, line_search_fn="strong_wolfe").step(loss)
    found: Iterator[Tensor] = iter(best[1])
    return pytree.tree_unflatten([next(found) if _trainable(leaf) else leaf for leaf in free], spec)


def _trainable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
