"""Products with Toeplitz matrices by the long convolution kernels, where they run."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat_kernels.backend import DTYPES
from structmat_kernels.fft_conv import fft_conv, supported
from structmat_kernels.fft_conv.op import LONGEST


def kernels_take(x: Tensor, nrows: int = 1) -> bool:
    """Whether :func:`convolved` of x (*batch, tokens, n) runs the kernels, for so many outputs."""
    # Other dtypes are not asked about, with STRUCTMAT_BACKEND=triton either: solves work in double precision.
    return x.dtype in DTYPES and supported(x) and nrows <= LONGEST


def convolved(x: Tensor, ahead: Tensor, behind: Tensor | None, nrows: int) -> Tensor:
    """``y[i] = sum_{j <= i} ahead[i - j] x[j] + sum_{j > i} behind[j - i - 1] x[j]`` for i < nrows.

    Every filter is a channel of the kernels, and all vectors that meet it are its batch. x is read where it lies,
    whatever its strides but the last one, except for a copy if there are more outputs than inputs (zeros behind x), or
    if it has dimensions before a batch of filters and several tokens.

    Args:
        x: shape (*batch, tokens, n), of which :func:`kernels_take` says yes.
        ahead: shape (*batch, taps), device of x; batches broadcast.
        behind: shape (*batch, taps2), of the batch of ``ahead``, or None.
        nrows: how many outputs.

    Returns:
        Shape (*batch, tokens, nrows), dtype of x; the channels' dimensions are next to the last one in memory.
    """
    tokens, n = x.shape[-2:]
    x = x.expand(*torch.broadcast_shapes(x.shape[:-2], ahead.shape[:-1]), tokens, n)
    while ahead.ndim > 1 and ahead.shape[0] == 1:  # one filter for all of that dimension, which are more vectors
        ahead, behind = ahead[0], None if behind is None else behind[0]
    split = x.ndim - 1 - ahead.ndim
    lead, batch = x.shape[:split], x.shape[split:-2]
    rows, channels = math.prod(lead) * tokens, math.prod(batch)
    size = max(n, nrows)
    u = (F.pad(x, (0, size - n)) if size > n else x).movedim(-2, split).reshape(rows, channels, size)
    taps = ahead.expand(*batch, ahead.shape[-1]).reshape(channels, ahead.shape[-1])
    rev = None if behind is None else behind.expand(*batch, behind.shape[-1]).reshape(channels, behind.shape[-1])
    y = fft_conv(u, taps, rev).view(*lead, tokens, *batch, size).movedim(split, -2)
    return y[..., :nrows]


def f_circulant_by_kernels(v: Tensor, x: Tensor, f: float | complex) -> Tensor:
    """``Z_f(v) x``, v (*batch, n) and x (*batch, tokens, n); see :func:`~._convolution.f_circulant`."""
    return convolved(x, v, None if f == 0 else f * v[..., 1:].flip(-1), x.shape[-1])
