"""The short causal depthwise convolution in Triton: one pass over memory, forwards and backwards.

A thread holds groups of 8 consecutive times (4 of float32), 16 bytes: those of its outputs and, as far as the filter
reaches, of their neighbours, which come from L1. So loads and stores are 16 bytes wide where length and strides are
multiples of 16; loads shifted by a tap would be one entry wide.

Operands may have channels next to each other in place of times, as the transposed output of a linear layer has: the
tile is transposed on the chip.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import launching
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: Programs of the backward pass to aim at: 64 for each multiprocessor of an H100, so that the last ones are few.
PROGRAMS = 64 * 132


@triton.jit
def _apart(t, LEVELS: tl.constexpr):
    """A (C, N << LEVELS) tile as 1 << LEVELS (C, N) ones: number i has the times (n << LEVELS) + i. In float32."""
    C: tl.constexpr = t.shape[0]
    N: tl.constexpr = t.shape[1] >> LEVELS
    parts = (t,)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(1 << level):
            pair = tl.reshape(parts[i], (C, N, 2, 1 << (LEVELS - 1 - level)))
            halves = halves + tl.split(tl.permute(pair, (0, 1, 3, 2)))
        parts = halves
    out = ()
    for i in tl.static_range(1 << LEVELS):
        out = out + (tl.reshape(parts[i], (C, N)).to(tl.float32),)
    return out


@triton.jit
def _together(parts, LEVELS: tl.constexpr):
    """The inverse of _apart."""
    C: tl.constexpr = parts[0].shape[0]
    N: tl.constexpr = parts[0].shape[1]
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(1 << (LEVELS - 1 - level)):
            pair = tl.reshape(tl.join(parts[2 * i], parts[2 * i + 1]), (C, N, 1 << level, 2))
            pairs = pairs + (tl.reshape(tl.permute(pair, (0, 1, 3, 2)), (C, N, 2 << level)),)
        parts = pairs
    return tl.reshape(parts[0], (C, N << LEVELS))


@triton.jit
def _load(ptr, c, t, channels, length, stride_c, stride_t, live):
    """The tile at channels c and times t, zeros outside."""
    mask = ((c < channels) & live)[:, None] & ((t >= 0) & (t < length))[None, :]
    return tl.load(ptr + c[:, None] * stride_c + t[None, :] * stride_t, mask=mask, other=0.0)


@triton.jit
def _store(ptr, value, c, t, channels, length, stride_c, stride_t, live):
    mask = ((c < channels) & live)[:, None] & (t < length)[None, :]
    tl.store(ptr + c[:, None] * stride_c + t[None, :] * stride_t, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _filter(z, w, start, FIRST: tl.constexpr, MIRROR: tl.constexpr, LEVELS: tl.constexpr):
    """A group of outputs of neighbouring inputs z: output o is the filter's product with those from FIRST + o on."""
    TAPS: tl.constexpr = len(w)
    out = ()
    for o in tl.static_range(1 << LEVELS):
        acc = start
        for j in tl.static_range(TAPS):
            acc += w[TAPS - 1 - j if MIRROR else j] * z[FIRST + o + j]
        out = out + (acc,)
    return _together(out, LEVELS)


@triton.jit
def _weights(ptr, c, channels, TAPS: tl.constexpr):
    """The taps of channels c, each of shape (C, 1)."""
    w = ()
    for j in tl.static_range(TAPS):
        w = w + (tl.load(ptr + c * TAPS + j, mask=c < channels, other=0.0).to(tl.float32)[:, None],)
    return w


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, batch, channels, length, x_g, x_b, x_c, x_t, y_g, y_b, y_c, y_t,
    TAPS: tl.constexpr, BIAS: tl.constexpr, LEVELS: tl.constexpr, BEYOND: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program: BC channels, BT times."""
    cols, rows = tl.cdiv(length, BT), tl.cdiv(channels, BC)
    pid = tl.program_id(0)
    at = (pid // cols // rows).to(tl.int64)
    g, b = at // batch, at % batch
    c = (pid // cols % rows).to(tl.int64) * BC + tl.arange(0, BC)
    t = (pid % cols).to(tl.int64) * BT + tl.arange(0, BT)
    x_ptr += g * x_g + b * x_b
    z = ()
    for i in tl.static_range(BEYOND + 1):  # the groups before, and this one
        z = z + _apart(_load(x_ptr, c, t - (BEYOND - i << LEVELS), channels, length, x_c, x_t, True), LEVELS)
    w = _weights(weight_ptr + g * channels * TAPS, c, channels, TAPS)
    start = tl.zeros((BC, BT >> LEVELS), tl.float32)
    if BIAS:
        start += tl.load(bias_ptr + g * channels + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    y = _filter(z, w, start, (BEYOND << LEVELS) - (TAPS - 1), False, LEVELS)
    _store(y_ptr + g * y_g + b * y_b, y, c, t, channels, length, y_c, y_t, True)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, gx_ptr, partial_ptr, batch, channels, length, splits, steps,
    grad_g, grad_b, grad_c, grad_t, x_g, x_b, x_c, x_t, gx_g, gx_b, gx_c, gx_t,
    TAPS: tl.constexpr, WANT_X: tl.constexpr, WANT_W: tl.constexpr, LEVELS: tl.constexpr, BEYOND: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program: BC channels, ``steps`` pieces of BT times of all in the batch one after the other.

    gx[t] = sum_s weight[taps - 1 - s] grad[t + s], and tap taps - 1 - s has the gradient sum_t x[t] grad[t + s]: both
    have the gradient's neighbours. Partial results (splits, G, channels, taps + 1), the last one the bias's.
    """
    cols, rows = tl.cdiv(length, BT), tl.cdiv(channels, BC)
    pid = tl.program_id(0)
    split = pid % splits
    g = (pid // splits // rows).to(tl.int64)
    c = (pid // splits % rows).to(tl.int64) * BC + tl.arange(0, BC)
    grad_ptr += g * grad_g
    x_ptr += g * x_g
    gx_ptr += g * gx_g
    w = _weights(weight_ptr + g * channels * TAPS, c, channels, TAPS)
    zero = tl.zeros((BC, BT >> LEVELS), tl.float32)
    sums = ()
    for _ in tl.static_range(TAPS + 1 if WANT_W else 1):
        sums = sums + (zero,)
    for step in range(steps):
        piece = split * steps + step
        b = (piece // cols).to(tl.int64)
        t = (piece % cols).to(tl.int64) * BT + tl.arange(0, BT)
        live = b < batch
        z = ()
        for i in tl.static_range(BEYOND + 1):  # this group, and those behind it
            at = t + (i << LEVELS)
            z = z + _apart(_load(grad_ptr + b * grad_b, c, at, channels, length, grad_c, grad_t, live), LEVELS)
        if WANT_X:
            gx = _filter(z, w, zero, 0, True, LEVELS)
            _store(gx_ptr + b * gx_b, gx, c, t, channels, length, gx_c, gx_t, live)
        if WANT_W:
            x = _apart(_load(x_ptr + b * x_b, c, t, channels, length, x_c, x_t, live), LEVELS)
            more = ()
            for j in tl.static_range(TAPS):
                acc = sums[j]
                for o in tl.static_range(1 << LEVELS):
                    acc += x[o] * z[o + TAPS - 1 - j]
                more = more + (acc,)
            acc = sums[TAPS]
            for o in tl.static_range(1 << LEVELS):
                acc += z[o]
            sums = more + (acc,)
    if WANT_W:
        partial_ptr += ((split * (tl.num_programs(0) // splits // rows) + g) * channels + c) * (TAPS + 1)
        for j in tl.static_range(TAPS + 1):
            tl.store(partial_ptr + j, tl.sum(sums[j], 1), mask=c < channels)


def config(channels: int, length: int, dtype: torch.dtype, along: bool) -> Config:
    """Tile sizes, with two groups a thread.

    Args:
        channels: number of them.
        length: of the convolution.
        dtype: of the operands.
        along: whether times lie next to each other in all of them; otherwise tiles are square, to be transposed.
    """
    group = 4 if dtype == torch.float32 else 8
    entries = 256 * group
    BT = max(group, min(power(length), 512 if along else 8 * group))
    BC = min(power(channels), entries // BT if along else 64)
    return {"BC": BC, "BT": BT, "num_warps": 4 if entries >= BC * BT else 8}


def _groups(dtype: torch.dtype, taps: int) -> Config:
    """Binary logarithm of a group's size, and how many groups a filter reaches beyond one."""
    levels = 2 if dtype == torch.float32 else 3
    return {"TAPS": taps, "LEVELS": levels, "BEYOND": cdiv(taps - 1, 1 << levels)}


def _dense(x: Tensor) -> Tensor:
    """x with times or channels next to each other."""
    return x if x.stride(-1) == 1 or x.stride(-2) == 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor, config: Config | None = None) -> Tensor:
    """The convolution of x (G, batch, channels, length) with weight (G, channels, taps) and bias (G, channels or 0)."""
    G, batch, channels, length = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = _dense(x)
    c = config or _config(channels, length, x.dtype, x.stride(3) == 1)
    grid = (G * batch * cdiv(channels, c["BC"]) * cdiv(length, c["BT"]),)
    sizes = (batch, channels, length, *x.stride(), *y.stride())
    with launching(x):
        tensors = (x, weight.contiguous(), bias.contiguous(), y)
        launch(_forward, grid, tensors, sizes, **_groups(x.dtype, weight.shape[2]), BIAS=bias.numel() > 0, **c)
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, gx: Tensor | None, want_w: bool, config: Config | None = None
) -> Tensor:
    """Writes the gradient of x to gx, if there is one, and returns those of weight and bias.

    Returns:
        Shape (G, channels, taps + 1), the bias's gradient last, in float32; (0,) if they are not wanted.
    """
    G, batch, channels, length = x.shape
    taps = weight.shape[2]
    if x.numel() == 0:
        return torch.zeros((G, channels, taps + 1) if want_w else (0,), dtype=torch.float32, device=x.device)
    grad, x = _dense(grad), _dense(x)
    out = x if gx is None else gx
    along = all([t.stride(3) == 1 for t in ((grad, x, out) if want_w else (grad, out))])
    c = config or _config(channels, length, x.dtype, along)
    tiles, pieces = G * cdiv(channels, c["BC"]), batch * cdiv(length, c["BT"])
    steps = cdiv(pieces, max(1, min(pieces, PROGRAMS // tiles)))
    splits = cdiv(pieces, steps)
    partial = torch.empty((splits, G, channels, taps + 1) if want_w else (1, 0), dtype=torch.float32, device=x.device)
    sizes = (batch, channels, length, splits, steps, *grad.stride(), *x.stride(), *out.stride())
    with launching(x):
        tensors = (grad, x, weight.contiguous(), out, partial)
        wanted = {"WANT_X": gx is not None, "WANT_W": want_w}
        launch(_backward, (tiles * splits,), tensors, sizes, **_groups(x.dtype, taps), **wanted, **c)
    return partial.sum(0)


_config = config
