"""Long convolutions in Triton, one pass over memory: all transforms of a sequence stay on the chip.

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
def _power_below(m):
    """The power of two below each positive m, and its inverse; 2^-126 of zeros."""
    bits = m.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _scales(x, P: tl.constexpr):
    """Of P tiles one below the other the powers of two below their largest entries, and the inverses: (P,)."""
    tiles = tl.reshape(tl.abs(x), (P, x.shape[0] // P, x.shape[1]))
    return _power_below(tl.max(tl.max(tiles, 2), 1))


@triton.jit
def _scaled(x, factors, P: tl.constexpr):
    """P tiles one below the other, each times its factor.

    In three dimensions: a column of factors for all rows would have a layout of its own, which x would have to take.
    """
    tiles = tl.reshape(x, (P, x.shape[0] // P, x.shape[1]))
    return tl.reshape(tiles * factors[:, None, None], x.shape)


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
    k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV: tl.constexpr, SKIP: tl.constexpr, SCALED: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The transform of a channel's filter, P times, and the factor by which it is too small."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    t = (tl.arange(0, P * R) % R)[:, None] + tl.arange(0, N1)[None, :] * R
    k = tl.load(k_ptr + h * taps + t, mask=t < taps, other=0.0).to(tl.float32)
    if REV:  # rev[j] is j + 1 places before the end
        k += tl.load(rev_ptr + h * behind + M - 1 - t, mask=M - 1 - t < behind, other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(t == 0, tl.load(skip_ptr + h).to(tl.float32), 0.0)
    factor = 1.0
    if SCALED:
        up, down = _power_below(tl.max(tl.abs(k)))
        x = pairs(k * down, tl.zeros_like(k), OP)
        kr, ki = forward(x, table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
        high, low = _power_below(tl.maximum(tl.max(tl.abs(kr)), tl.max(tl.abs(ki))))
        kr = kr * low
        ki = ki * low
        factor = up * high
    else:
        kr, ki = forward(pairs(k, tl.zeros_like(k), OP), table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
    return kr.to(OP), ki.to(OP), factor


@triton.jit
def convolve(
    u_ptr, pre_ptr, post_ptr, k_ptr, rev_ptr, skip_ptr, table, y_ptr,
    batch, channels, length, taps, behind, steps, u_b, u_h, pre_b, pre_h, post_b, post_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    REV: tl.constexpr, SKIP: tl.constexpr, OP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """``y = post * (k * (pre u))`` for ``steps`` groups of P pairs of one channel's sequences."""
    R: tl.constexpr = N2 * N3
    H: tl.constexpr = N1 // 2
    h = (tl.program_id(0) % channels).to(tl.int64)
    group = (tl.program_id(0) // channels) * steps
    kr, ki, factor = _filter(
        k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, SCALED, P, N1, N2, N3, OP, PRECISION, PACKED
    )
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
        if SCALED:
            up, down = _scales(xr, P)
            up2, down2 = _scales(xi, P)
            xr = _scaled(xr, down, P)
            xi = _scaled(xi, down2, P)
        ar, ai = forward(pairs(xr, xi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        kr32 = kr.to(tl.float32)
        ki32 = ki.to(tl.float32)
        br = ar * kr32 - ai * ki32
        bi = ar * ki32 + ai * kr32
        yr, yi = inverse(br, bi, table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        if SCALED:
            yr = _scaled(yr, up * factor, P)
            yi = _scaled(yi, up2 * factor, P)
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
    OP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """All gradients for ``steps`` groups of P pairs; that of the filter, of all M places, is a partial sum.

    INPUT: of u (and of the first gate). GATE: of the second gate, for which y is computed again. FILTER: of the filter.
    Neighbours share a scale here, as the sum over them needs: the smaller gradient of a pair has the larger one's
    rounding errors.
    """
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    W: tl.constexpr = N2 if N3 == 1 else N3
    h = (tl.program_id(0) % channels).to(tl.int64)
    part = tl.program_id(0) // channels
    group = part * steps
    kr, ki, factor = _filter(
        k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, SCALED, P, N1, N2, N3, OP, PRECISION, PACKED
    )
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
        if SCALED:
            up, down = _scales(tl.maximum(tl.abs(wr), tl.abs(wi)), P)
            wr = _scaled(wr, down, P)
            wi = _scaled(wi, down, P)
        ar, ai = forward(pairs(wr, wi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        kr32 = kr.to(tl.float32)
        ki32 = ki.to(tl.float32)
        if INPUT:
            xr, xi = inverse(
                ar * kr32 + ai * ki32, ai * kr32 - ar * ki32, table, False, P, N1, N2, N3, OP, PRECISION, PACKED
            )
            if SCALED:
                xr = _scaled(xr, up * factor, P)
                xi = _scaled(xi, up * factor, P)
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
            if SCALED:
                rise, fall = _scales(tl.maximum(tl.abs(xr), tl.abs(xi)), P)
                xr = _scaled(xr, fall, P)
                xi = _scaled(xi, fall, P)
            zr, zi = forward(pairs(xr, xi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
            if FILTER:  # the real part, in time, of conj(Z) W is the sum of both correlations
                fr = zr * ar + zi * ai
                fi = zr * ai - zi * ar
                if SCALED:
                    fr = _scaled(fr, up * rise, P)
                    fi = _scaled(fi, up * rise, P)
                sr += fr
                si += fi
            if GATE:
                yr, yi = inverse(
                    zr * kr32 - zi * ki32, zr * ki32 + zi * kr32, table, False, P, N1, N2, N3, OP, PRECISION, PACKED
                )
                if SCALED:
                    yr = _scaled(yr, rise * factor, P)
                    yi = _scaled(yi, rise * factor, P)
                vr, vi = _two(gy_ptr, b, h, t, live, live2, gy_b, gy_h)
                yr *= vr
                yi *= vi
                _put(gpost_ptr, yr, yi, b, h, t, live, live2, channels, length)
    if FILTER:
        if SCALED:
            large, small = _power_below(tl.maximum(tl.max(tl.abs(sr)), tl.max(tl.abs(si))))
            sr *= small
            si *= small
        gr, _ = inverse(sr, si, table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
        if SCALED:
            gr *= large
        total = tl.sum(tl.reshape(gr, (P, R, N1)), 0)
        at = (part * channels + h) * M + tl.arange(0, R)[:, None] + column[None, :] * R
        tl.store(gk_ptr + at, total)
