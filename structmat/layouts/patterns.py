"""Layouts by name.

They are made on the CPU, whatever torch's default device: a model built under ``torch.device("cuda")``, or on the meta
device, has the same layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.layouts.layout import Layout, blocks_of, grid_of, sizes_of


def _stretched(pattern: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Layout:
    """A layout whose blocks follow the cell of a smaller pattern (p, p) that they lie in."""
    (mb, nb), p = grid_of(shape, block), pattern.shape[0]
    rows, columns = (torch.arange(n, device="cpu") * p // n for n in (mb, nb))
    return Layout(pattern[rows][:, columns], block, shape)


def _distance(p: int) -> Tensor:
    i = torch.arange(p, device="cpu")
    return (i[:, None] - i).abs()


def flat_butterfly(shape: Any, block: Any, max_stride: int | None = None, cells: int | None = None) -> Layout:
    """The flat block butterfly of Pixelated Butterfly (Chen, Dao et al. 2021): a sum of butterfly factors.

    On p x p cells, cell (i, j) is stored where i = j or i xor j = 2^s with 2^(s + 1) <= max_stride: the union of the
    supports of the butterfly factors of strides 2, 4, ..., max_stride. With t = log2(max_stride) the density is exactly
    (t + 1) / p where p divides both sides of the grid. Other grids take the nearest stretching, whose cells are
    floor or ceil of grid / p blocks high and wide, and whose density ``layout.density`` says.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        max_stride: a power of two from 1 (block diagonal) to p; p if None.
        cells: p, a power of two up to both sides of the grid; the largest one if None.

    Raises:
        ValueError: if max_stride or cells is not such a power of two, or a block is larger than the matrix.

    Example:
        >>> from structmat import layouts
        >>> layouts.flat_butterfly((1024, 1024), 32, max_stride=4, cells=16).density == 3 / 16
        True
        >>> print(layouts.flat_butterfly((64, 128), 16, max_stride=2))
        ████····
        ████····
        ····████
        ····████
    """
    size, pair, grid = sizes_of(shape, block)
    largest = 1 << (min(grid).bit_length() - 1)
    p = largest if cells is None else cells
    if check_int("cells", p) > largest or p & (p - 1):
        raise ValueError(f"cells must be a power of two from 1 to {largest} for a grid of {grid}, got {p}")
    top = p if max_stride is None else max_stride
    if check_int("max_stride", top) > p or top & (top - 1):
        raise ValueError(f"max_stride must be a power of two from 1 to {p} for {p} x {p} cells, got {top}")
    i = torch.arange(p, device="cpu")
    difference = i[:, None] ^ i
    pattern = difference == 0
    for s in range(top.bit_length() - 1):
        pattern |= difference == 1 << s
    return _stretched(pattern, size, pair)


def banded(shape: Any, block: Any, width: int = 1) -> Layout:
    """A band: cells with abs(i - j) <= width, on min(mb, nb) cells.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        width: cells beside the diagonal on either side; 0 is :func:`block_diagonal`.
    """
    return dilated(shape, block, width, 1)


def block_diagonal(shape: Any, block: Any) -> Layout:
    """The diagonal cells of min(mb, nb) cells; on a square grid, the diagonal blocks.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
    """
    return dilated(shape, block, 0, 1)


def dilated(shape: Any, block: Any, width: int = 1, dilation: int = 2) -> Layout:
    """A dilated band: cells with abs(i - j) = 0, d, 2 d, ..., width d for the dilation d.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        width: how many diagonals on either side.
        dilation: their distance, in cells.

    Example:
        >>> from structmat import layouts
        >>> print(layouts.dilated((6, 6), 1, width=2, dilation=2))
        █·█·█·
        ·█·█·█
        █·█·█·
        ·█·█·█
        █·█·█·
        ·█·█·█
    """
    size, pair, grid = sizes_of(shape, block)
    check_int("width", width, 0)
    check_int("dilation", dilation)
    distance = _distance(min(grid))
    return _stretched((distance % dilation == 0) & (distance <= width * dilation), size, pair)


def global_(shape: Any, block: Any, size: int = 1) -> Layout:
    """The first ``size`` block rows and block columns, as the global tokens of attention.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        size: from 0; beyond the grid all blocks are stored.
    """
    sizes, pair, (mb, nb) = sizes_of(shape, block)
    check_int("size", size, 0)
    rows, columns = (torch.arange(n, device="cpu") < size for n in (mb, nb))
    return Layout(rows[:, None] | columns, pair, sizes)


def bigbird(shape: Any, block: Any, width: int = 1, size: int = 1, extra: int = 1, seed: int = 0) -> Layout:
    """A band, global blocks, and random ones in every row (Zaheer et al. 2020, "Big Bird").

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        width: of the band, see :func:`banded`.
        size: global block rows and columns, see :func:`global_`.
        extra: random blocks in every block row; they may fall on stored ones.
        seed: of the random blocks.
    """
    _, _, (mb, nb) = sizes_of(shape, block)
    check_int("extra", extra, 0)
    order = torch.rand(mb, nb, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").argsort(1)
    fixed = banded(shape, block, width) | global_(shape, block, size)
    return Layout(fixed.mask | (order < extra), fixed.block, fixed.shape)


def random(shape: Any, block: Any, density: float, seed: int = 0) -> Layout:
    """Blocks drawn uniformly without replacement.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
        density: share of the blocks, in (0, 1]: their number is the nearest integer, at least 1.
        seed: of the draw.
    """
    sizes, pair, (mb, nb) = sizes_of(shape, block)
    scores = torch.rand(mb, nb, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return Layout(_largest(scores, density), pair, sizes, (1, 1))


def top_k(W: Tensor, block: Any, density: float) -> Layout:
    """The blocks of largest Frobenius norm of a dense matrix: of all layouts of this size the nearest to it.

    Args:
        W: shape (*batch, m, n); norms are taken over the batch.
        block: height and width of a block, or one number.
        density: share of the blocks, in (0, 1]: their number is the nearest integer, at least 1.

    Raises:
        TypeError: if W is not a floating-point or complex tensor.
        ValueError: if the density is out of range, or a block is larger than the matrix.

    Example:
        >>> import torch
        >>> from structmat import layouts
        >>> print(layouts.top_k(torch.diag(torch.tensor([3.0, 0.0, 1.0, 2.0])), 1, 3 / 16))
        █···
        ····
        ··█·
        ···█
    """
    check_tensor("W", W, 2)
    check_inexact("W", W)
    sizes, pair, _ = sizes_of(W.shape[-2:], block)
    double = torch.float32 if W.device.type == "mps" else torch.float64
    flat = W.detach().reshape(-1, *sizes).abs().to(double)
    if not torch.isfinite(flat).all():
        raise ValueError("W has NaN or infinite entries")
    top = flat.amax().clamp_min(torch.finfo(double).tiny) if flat.numel() else 1.0
    norms = blocks_of((flat / top).square().sum(0), pair).sum((-2, -1))
    return Layout(_largest(norms.cpu(), density), pair, sizes, (1, 1))


def _largest(scores: Tensor, density: Any) -> Tensor:
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density must be a number in (0, 1], got {density!r}")
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device="cpu")
    # Stable, so that ties are broken by place and not by chance.
    order = scores.flatten().argsort(descending=True, stable=True)
    mask[order[: max(1, round(density * scores.numel()))]] = True
    return mask.view(scores.shape)


def full(shape: Any, block: Any) -> Layout:
    """Every block.

    Args:
        shape: (m, n).
        block: height and width of a block, or one number.
    """
    sizes, pair, grid = sizes_of(shape, block)
    return Layout(torch.ones(grid, dtype=torch.bool, device="cpu"), pair, sizes)


def kron(a: Layout, b: Layout) -> Layout:
    """The support of A ⊗ B, in b's blocks: a block of b for every entry that a stores.

    Args:
        a: layout of A; its blocks are taken entry by entry, so that a pattern has blocks of one entry.
        b: layout of B, in blocks that divide its sizes.

    Raises:
        ValueError: if b has cut blocks, between which A ⊗ B has no common grid.

    Example:
        >>> from structmat import layouts
        >>> print(layouts.kron(layouts.banded((3, 3), 1), layouts.full((64, 32), 32)))
        ██·
        ██·
        ███
        ███
        ·██
        ·██
    """
    if any(size % width for size, width in zip(b.shape, b.block, strict=True)):
        raise ValueError(f"b must have blocks that divide its sizes {b.shape}, got {b.block}")
    mask = torch.kron(a.entries().to(torch.uint8), b.mask.to(torch.uint8)).bool()
    return Layout(mask, b.block, (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))
