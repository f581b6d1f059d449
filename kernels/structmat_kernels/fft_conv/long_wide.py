"""The programs of :mod:`long_programs` in float32 grade: with the same names and parameters, without scales."""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.fft_conv.programs import _two
from structmat_kernels.fft_conv.transforms import forward, inverse, pairs


@triton.jit
def _offsets(M: tl.constexpr, W: tl.constexpr):
    return tl.arange(0, M // W)[:, None] * W + tl.arange(0, W)[None, :]


@triton.jit
def _put_spectrum(ptr, ar, ai, M: tl.constexpr, W: tl.constexpr):
    tl.store(ptr + _offsets(M, W), ar)
    tl.store(ptr + M + _offsets(M, W), ai)


@triton.jit
def _spectrum(ptr, M: tl.constexpr, W: tl.constexpr):
    return tl.load(ptr + _offsets(M, W)), tl.load(ptr + M + _offsets(M, W))


@triton.jit
def transform(
    u_ptr, gate_ptr, up_ptr, table, to_ptr, batch, channels, length, blocks, u_b, u_h, gate_b, gate_h,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, GATE: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    W: tl.constexpr = N2 if N3 == 1 else N3
    count = (batch + 1) // 2
    rest = tl.program_id(0) // blocks
    b = (rest % count * 2).to(tl.int64)
    h = (rest // count).to(tl.int64)
    t = tl.program_id(0) % blocks * (M // 2) + tl.arange(0, R)[:, None] + tl.arange(0, N1 // 2)[None, :] * R
    live = t < length
    live2 = live & (b + 1 < batch)
    xr, xi = _two(u_ptr, b, h, t, live, live2, u_b, u_h)
    if GATE:
        vr, vi = _two(gate_ptr, b, h, t, live, live2, gate_b, gate_h)
        xr *= vr
        xi *= vi
    ar, ai = forward(pairs(xr, xi), table, False, 1, N1, N2, N3, PRECISION)
    _put_spectrum(to_ptr + tl.program_id(0).to(tl.int64) * (2 * M), ar, ai, M, W)


@triton.jit
def windows(
    k_ptr, rev_ptr, skip_ptr, up_ptr, table, to_ptr, taps, behind, lowest, count,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, REV: tl.constexpr, SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    W: tl.constexpr = N2 if N3 == 1 else N3
    h = (tl.program_id(0) // count).to(tl.int64)
    m = lowest + tl.program_id(0) % count
    t = tl.arange(0, R)[:, None] + tl.arange(0, N1)[None, :] * R
    t += m * (M // 2) - tl.where(t < M // 2, 0, M)
    k = tl.load(k_ptr + h * taps + t, mask=(t >= 0) & (t < taps), other=0.0).to(tl.float32)
    if REV:
        k += tl.load(rev_ptr + h * behind - 1 - t, mask=(t < 0) & (t >= -behind), other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(t == 0, tl.load(skip_ptr + h).to(tl.float32), 0.0)
    x = pairs(k, tl.zeros_like(k))
    ar, ai = forward(x, table, True, 1, N1, N2, N3, PRECISION)
    _put_spectrum(to_ptr + tl.program_id(0).to(tl.int64) * (2 * M), ar, ai, M, W)


@triton.jit
def combine(
    x_ptr, g_ptr, up_ptr, up_k_ptr, post_ptr, other_ptr, table, y_ptr, z_ptr,
    batch, channels, length, blocks, lowest, count, post_b, post_h, other_b, other_h, y_b, y_h,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, POST: tl.constexpr, OTHER: tl.constexpr,
    APART: tl.constexpr, TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    W: tl.constexpr = N2 if N3 == 1 else N3
    two = (batch + 1) // 2
    block = tl.program_id(0) % blocks
    rest = (tl.program_id(0) // blocks).to(tl.int64)
    b = rest % two * 2
    h = rest // two
    ar = tl.zeros((M // W, W), tl.float32)
    ai = tl.zeros((M // W, W), tl.float32)
    if TRANSPOSE:
        start = tl.maximum(lowest, -block)
        stop = tl.minimum(lowest + count, blocks - block)
    else:
        start = tl.maximum(lowest, block + 1 - blocks)
        stop = tl.minimum(lowest + count, block + 1)
    for m in range(start, stop):
        source = block + m if TRANSPOSE else block - m
        xr, xi = _spectrum(x_ptr + (rest * blocks + source) * (2 * M), M, W)
        gr, gi = _spectrum(g_ptr + (h * count + m - lowest) * (2 * M), M, W)
        if TRANSPOSE:
            gi = -gi
        ar += xr * gr - xi * gi
        ai += xr * gi + xi * gr
    yr, yi = inverse(ar, ai, table, False, 1, N1, N2, N3, PRECISION)
    t = block * (M // 2) + tl.arange(0, R)[:, None] + tl.arange(0, N1 // 2)[None, :] * R
    live = t < length
    live2 = live & (b + 1 < batch)
    at = b * y_b + h * y_h + t
    if OTHER:
        vr, vi = _two(other_ptr, b, h, t, live, live2, other_b, other_h)
        tl.store(z_ptr + at, (yr * vr).to(z_ptr.dtype.element_ty), mask=live)
        tl.store(z_ptr + y_b + at, (yi * vi).to(z_ptr.dtype.element_ty), mask=live2)
    if POST:
        vr, vi = _two(post_ptr, b, h, t, live, live2, post_b, post_h)
        yr *= vr
        yi *= vi
    tl.store(y_ptr + at, yr.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(y_ptr + y_b + at, yi.to(y_ptr.dtype.element_ty), mask=live2)


@triton.jit
def correlate(
    w_ptr, x_ptr, up_w_ptr, up_x_ptr, table, gk_ptr, batch, channels, blocks, lowest, count, steps,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    W: tl.constexpr = N2 if N3 == 1 else N3
    two = (batch + 1) // 2
    part = tl.program_id(0) // count // channels
    h = (tl.program_id(0) // count % channels).to(tl.int64)
    m = lowest + tl.program_id(0) % count
    ar = tl.zeros((M // W, W), tl.float32)
    ai = tl.zeros((M // W, W), tl.float32)
    for pair in range(part * steps, tl.minimum(part * steps + steps, two)):
        for block in range(tl.maximum(m, 0), blocks + tl.minimum(m, 0)):
            at = (h * two + pair) * blocks + block
            wr, wi = _spectrum(w_ptr + at * (2 * M), M, W)
            xr, xi = _spectrum(x_ptr + (at - m) * (2 * M), M, W)
            ar += xr * wr + xi * wi
            ai += xr * wi - xi * wr
    gr, _ = inverse(ar, ai, table, True, 1, N1, N2, N3, PRECISION)
    t = tl.arange(0, R)[:, None] + tl.arange(0, N1)[None, :] * R
    tl.store(gk_ptr + tl.program_id(0).to(tl.int64) * M + t, gr)
