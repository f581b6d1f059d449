"""Long convolutions in Triton in float32 grade, one pass over memory: a sequence stays on the chip.

A program convolves the sequences of one channel, two by two: u + i u' is transformed as one complex sequence, and as
the filter is real the parts of the result are those of u and u'. The filter is transformed once in a program and stays
in registers. Gates and the skip term cost no pass of their own; the zeros behind the input cost no arithmetic in the
first product, the outputs that nobody wants none in the last.

Floor: reading u and gates, writing y. Arithmetic of 64 x 768 sequences of 4096 entries: 206 Gflop of products.
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.fft_conv.transforms import forward, inverse, pairs


@triton.jit
def _two(ptr, b, h, t, live, live2, stride_b, stride_h):
    """The entries t of sequences b and b + 1 of channel h, float32."""
    at = ptr + b * stride_b + h * stride_h + t
    x = tl.load(at, mask=live, other=0.0).to(tl.float32)
    return x, tl.load(at + stride_b, mask=live2, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, xr, xi, b, h, t, live, live2, channels, length):
    """Store them in a contiguous tensor."""
    tl.store(ptr + (b * channels + h) * length + t, xr.to(ptr.dtype.element_ty), mask=live)
    tl.store(ptr + ((b + 1) * channels + h) * length + t, xi.to(ptr.dtype.element_ty), mask=live2)


@triton.jit
def _filter(
    k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV: tl.constexpr, SKIP: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transform of a channel's filter, P times."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    t = (tl.arange(0, P * R) % R)[:, None] + tl.arange(0, N1)[None, :] * R
    k = tl.load(k_ptr + h * taps + t, mask=t < taps, other=0.0).to(tl.float32)
    if REV:  # rev[j] is j + 1 places before the end
        k += tl.load(rev_ptr + h * behind + M - 1 - t, mask=M - 1 - t < behind, other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(t == 0, tl.load(skip_ptr + h).to(tl.float32), 0.0)
    return forward(pairs(k, tl.zeros_like(k)), table, True, P, N1, N2, N3, PRECISION)


@triton.jit
def convolve(
    u_ptr, pre_ptr, post_ptr, k_ptr, rev_ptr, skip_ptr, table, y_ptr,
    batch, channels, length, taps, behind, steps, u_b, u_h, pre_b, pre_h, post_b, post_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    REV: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = post * (k * (pre u))`` for ``steps`` groups of P pairs of one channel's sequences."""
    R: tl.constexpr = N2 * N3
    H: tl.constexpr = N1 // 2
    h = (tl.program_id(0) % channels).to(tl.int64)
    group = (tl.program_id(0) // channels) * steps
    kr, ki = _filter(k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, P, N1, N2, N3, PRECISION)
    row = tl.arange(0, P * R)
    t = (row % R)[:, None] + tl.arange(0, H)[None, :] * R
    for step in range(steps):
        b = (2 * ((group + step) * P + row // R))[:, None].to(tl.int64)
        live = (t < length) & (b < batch)
        live2 = (t < length) & (b + 1 < batch)
        xr, xi = _two(u_ptr, b, h, t, live, live2, u_b, u_h)
        if PRE:
            vr, vi = _two(pre_ptr, b, h, t, live, live2, pre_b, pre_h)
            xr *= vr
            xi *= vi
        ar, ai = forward(pairs(xr, xi), table, False, P, N1, N2, N3, PRECISION)
        br = ar * kr - ai * ki
        bi = ar * ki + ai * kr
        yr, yi = inverse(br, bi, table, False, P, N1, N2, N3, PRECISION)
        if POST:
            vr, vi = _two(post_ptr, b, h, t, live, live2, post_b, post_h)
            yr *= vr
            yi *= vi
        _put(y_ptr, yr, yi, b, h, t, live, live2, channels, length)


@triton.jit
def gradients(
    gy_ptr, u_ptr, pre_ptr, post_ptr, k_ptr, rev_ptr, skip_ptr, table, gu_ptr, gpre_ptr, gpost_ptr, gk_ptr,
    batch, channels, length, taps, behind, steps, gy_b, gy_h, u_b, u_h, pre_b, pre_h, post_b, post_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    REV: tl.constexpr, SKIP: tl.constexpr, INPUT: tl.constexpr, GATE: tl.constexpr, FILTER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients for ``steps`` groups of P pairs; that of the filter, of all M places, is a partial sum.

    INPUT: of u (and of the first gate). GATE: of the second gate, for which y is computed again. FILTER: of the filter.
    """
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    W: tl.constexpr = N2 if N3 == 1 else N3
    h = (tl.program_id(0) % channels).to(tl.int64)
    part = tl.program_id(0) // channels
    group = part * steps
    kr, ki = _filter(k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, P, N1, N2, N3, PRECISION)
    row = tl.arange(0, P * R)
    column = tl.arange(0, N1)
    t = (row % R)[:, None] + tl.arange(0, H)[None, :] * R
    sr = tl.zeros((P * M // W, W), tl.float32)
    si = tl.zeros((P * M // W, W), tl.float32)
    for step in range(steps):
        b = (2 * ((group + step) * P + row // R))[:, None].to(tl.int64)
        live = (t < length) & (b < batch)
        live2 = (t < length) & (b + 1 < batch)
        wr, wi = _two(gy_ptr, b, h, t, live, live2, gy_b, gy_h)
        if POST:
            vr, vi = _two(post_ptr, b, h, t, live, live2, post_b, post_h)
            wr *= vr
            wi *= vi
        ar, ai = forward(pairs(wr, wi), table, False, P, N1, N2, N3, PRECISION)
        if INPUT:
            xr, xi = inverse(ar * kr + ai * ki, ai * kr - ar * ki, table, False, P, N1, N2, N3, PRECISION)
            if PRE:
                vr, vi = _two(u_ptr, b, h, t, live, live2, u_b, u_h)
                _put(gpre_ptr, xr * vr, xi * vi, b, h, t, live, live2, channels, length)
                vr, vi = _two(pre_ptr, b, h, t, live, live2, pre_b, pre_h)
                xr *= vr
                xi *= vi
            _put(gu_ptr, xr, xi, b, h, t, live, live2, channels, length)
        if FILTER or GATE:
            xr, xi = _two(u_ptr, b, h, t, live, live2, u_b, u_h)
            if PRE:
                vr, vi = _two(pre_ptr, b, h, t, live, live2, pre_b, pre_h)
                xr *= vr
                xi *= vi
            zr, zi = forward(pairs(xr, xi), table, False, P, N1, N2, N3, PRECISION)
            if FILTER:  # the real part, in time, of conj(Z) W is the sum of both correlations
                fr = zr * ar + zi * ai
                fi = zr * ai - zi * ar
                sr += fr
                si += fi
            if GATE:
                yr, yi = inverse(zr * kr - zi * ki, zr * ki + zi * kr, table, False, P, N1, N2, N3, PRECISION)
                vr, vi = _two(gy_ptr, b, h, t, live, live2, gy_b, gy_h)
                yr *= vr
                yi *= vi
                _put(gpost_ptr, yr, yi, b, h, t, live, live2, channels, length)
    if FILTER:
        gr, _ = inverse(sr, si, table, True, P, N1, N2, N3, PRECISION)
        total = tl.sum(tl.reshape(gr, (P, R, N1)), 0)
        at = (part * channels + h) * M + tl.arange(0, R)[:, None] + column[None, :] * R
        tl.store(gk_ptr + at, total)
