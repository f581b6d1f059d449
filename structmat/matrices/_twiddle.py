"""The parameters of torch_butterfly as Kronecker-sparse factors."""

from __future__ import annotations

from torch import Tensor

from structmat._checks import check_tensor


def twiddle_values(twiddle: Tensor, increasing_stride: bool) -> list[Tensor]:
    """Values (a, 2, 2, d) of the factors, from left to right, of a twiddle (nblocks, log2 n, n / 2, 2, 2).

    Raises:
        ValueError: if the shape is not that of a twiddle.
    """
    check_tensor("twiddle", twiddle, 5)
    stacked = twiddle if twiddle.ndim == 5 else twiddle.squeeze(0)
    if stacked.ndim != 5 or stacked.shape[-2:] != (2, 2) or stacked.shape[2] != 1 << (stacked.shape[1] - 1):
        raise ValueError(f"twiddle must have shape (nblocks, log2 n, n / 2, 2, 2), got {tuple(twiddle.shape)}")
    levels, values = stacked.shape[1], []
    for block in stacked:
        for level in range(levels):
            d = 1 << (level if increasing_stride else levels - 1 - level)
            values.append(block[level].unflatten(0, (-1, d)).movedim(1, -1))
        increasing_stride = not increasing_stride
    return values[::-1]
