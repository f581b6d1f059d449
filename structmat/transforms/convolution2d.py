"""Convolutions of images, of one channel and of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.transforms._build import butterfly, choice, convolution_factors, fast_size, select, smooth, then
from structmat.transforms.convolution import operand


def _two(name: str, value: Any, low: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one integer or two, got {value!r}")
    return check_int(name, pair[0], low), check_int(name, pair[1], low)


def conv2d(
    shape: Sequence[int],
    kernel: Any,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> StructuredMatrix:
    """The matrix of ``torch.nn.functional.conv2d`` for images of one size, stride 1: a correlation, in O(n log n).

    ``y[o, p, q] = sum_i,u,v kernel[o, i, u, v] x[i, p + dilation u - padding, q + dilation v - padding]`` with zeros
    outside of the image, or, where ``padding_mode="circular"``, indices modulo its size, and as many outputs as inputs.
    Vectors are images flattened as (channels, rows, columns). Computed by the two-dimensional DFT: one real
    :class:`Butterfly` ``conj(B) S B^T`` on images with channels last, S one out x in matrix a frequency, between
    (partial) permutations where images are padded or have channels. The kernel's gradient flows through its factors.

    Parameters and operations: N = N_1 N_2 frequencies, N_i < 5/3 (size + padding) of small factors (the size itself
    where circular): O((in + out) N log N + in out N).

    Args:
        shape: rows and columns of the images.
        kernel: shape (kh, kw), or (out, in, kh, kw) for channels: a tensor or an array.
        padding: zeros on every side, one integer or (rows, columns), or "valid" for none, or "same" for an output of
            the input's size (of an odd total the larger half at the end, as in torch). Where circular, it only shifts.
        dilation: distance between the kernel's entries, one integer or two.
        padding_mode: "zeros" or "circular".
        dtype: floating point or complex, that of the kernel by default.
        device: that of the kernel by default.

    Returns:
        A matrix of shape (out rows' columns', in rows columns).

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if kernel has other dimensions, or it is larger than the padded image, or an option is unknown.

    Example:
        >>> import torch
        >>> from structmat.transforms import conv2d
        >>> kernel, x = torch.rand(5, 3, 3, 3), torch.rand(3, 8, 10)
        >>> y = (conv2d((8, 10), kernel, padding=1) @ x.flatten()).view(5, 8, 10)
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, kernel, padding=1), atol=1e-5)
        True
    """
    sizes = _two("shape", shape, 1)
    choice("padding_mode", padding_mode, ("zeros", "circular"))
    kernel = operand("kernel", kernel, dtype, device, (2, 4))
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    steps = _two("dilation", dilation, 1)
    reach = [d * (k - 1) for d, k in zip(steps, kernel.shape[-2:], strict=True)]
    if isinstance(padding, str):
        choice("padding", padding, ("valid", "same"))
        before = [r // 2 if padding == "same" else 0 for r in reach]
        total = reach if padding == "same" else [0, 0]
    else:
        before = list(_two("padding", padding, 0))
        total = [2 * p for p in before]
    circular = padding_mode == "circular"
    rows = [n if circular else n + t - r for n, t, r in zip(sizes, total, reach, strict=True)]
    if min(rows) < 1:
        raise ValueError(
            f"kernel must fit into the padded image, got a reach of {[r + 1 for r in reach]} for a shape of "
            f"{list(sizes)} and {total} zeros"
        )
    for axis in (0, 1):
        # Entry u stands for output minus input = before - step u.
        offsets = before[axis] - steps[axis] * torch.arange(kernel.shape[axis - 2])
        kernel = _place(kernel, axis - 2, offsets, sizes[axis], rows[axis], circular)
    out, channels, *grid = kernel.shape
    spectrum = torch.fft.fft2(kernel.to(torch.complex128)).permute(2, 3, 0, 1).reshape(-1, out, channels)
    real = not kernel.is_complex()
    B = butterfly(convolution_factors(spectrum, grid), kernel.dtype, kernel.device, real)
    inputs = select(_images(grid, channels, sizes), channels * sizes[0] * sizes[1], kernel.dtype, kernel.device)
    outputs = select(_images(grid, out, rows), out * rows[0] * rows[1], kernel.dtype, kernel.device)
    return then(B if outputs is None else outputs.mT @ B, inputs)


def _place(kernel: Tensor, axis: int, offsets: Tensor, size: int, rows: int, circular: bool) -> Tensor:
    """The kernel's entries along an axis at their offsets on a circle on which none of them disturbs another."""
    moved = kernel.movedim(axis, 0)
    offsets = offsets.to(kernel.device)
    if circular:
        column = moved.new_zeros((size, *moved.shape[1:])).index_add(0, offsets % size, moved)
        if not smooth(size):
            zeros = column.new_zeros((fast_size(2 * size - 1) - 2 * size + 1, *column.shape[1:]))
            column = torch.cat([column, zeros, column[1:]])
        return column.movedim(0, axis)
    length = fast_size(max(int(offsets[0]) + size, rows - int(offsets[-1])))
    return moved.new_zeros((length, *moved.shape[1:])).index_add(0, offsets % length, moved).movedim(0, axis)


def _images(grid: Sequence[int], channels: int, sizes: Sequence[int]) -> Tensor:
    """For every entry of a padded image, channels last, the index of the entry in the flattened image, or its size."""
    p, q, c = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), torch.arange(channels), indexing="ij")
    inside = (p < sizes[0]) & (q < sizes[1])
    return torch.where(inside, (c * sizes[0] + p) * sizes[1] + q, channels * sizes[0] * sizes[1]).reshape(-1)
