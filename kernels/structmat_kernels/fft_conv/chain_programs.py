"""Long convolutions in Triton for half precision, one pass over memory: a sequence stays on the chip.

A program convolves the sequences of one channel, two by two: u + i u' is transformed as one complex sequence, and as
the filter is real the parts of the result are those of u and u'. The filter is transformed once in a program and stays
in registers. Gates and the skip term cost no pass of their own; the zeros behind the input cost no arithmetic in the
first product.

Floor: reading u and gates, writing y. Arithmetic of 64 x 768 sequences of 4096 entries: 206 Gflop of products. Measured
on an H100: what threads do between the products takes longest; see docs/kernels.md.
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.fft_conv.chain import forward, forward_matrices, inverse, inverse_matrices, times


@triton.jit
def _power_below(m):
    """The power of two below each positive m, and its inverse; 2^-126 of zeros."""
    bits = m.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _filter(
    k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV: tl.constexpr, SKIP: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The transform of a channel's filter, P times, float16 parts, and the factor by which it is too small."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    row = tl.arange(0, 2 * N1)[:, None]
    column = tl.arange(0, P * R)[None, :]
    t = (row // 16 * 8 + row % 8) * R + (column % N2) * N3 + column // N2 % N3
    real = row // 8 % 2 == 0
    k = tl.load(k_ptr + h * taps + t, mask=real & (t < taps), other=0.0).to(tl.float32)
    if REV:  # rev[j] is j + 1 places before the end
        k += tl.load(rev_ptr + h * behind + M - 1 - t, mask=real & (M - 1 - t < behind), other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(real & (t == 0), tl.load(skip_ptr + h).to(tl.float32), 0.0)
    up, down = _power_below(tl.max(tl.abs(k)))
    first, second, third = forward_matrices(table, N1, N1, N2, N3)
    kr, ki = forward((k * down).to(tl.float16), first, second, third, table, P, N1, N2, N3, ASM)
    high, low = _power_below(tl.maximum(tl.max(tl.abs(kr)), tl.max(tl.abs(ki))))
    return (kr * low).to(tl.float16), (ki * low).to(tl.float16), up * high


@triton.jit
def _places(b, P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Of P pairs from sequence b on: sequences and times, (N1, S, P R / S), R = N2 N3.

    Rows are t1 in eights, columns (p, t2 / S, t3), and S = 4 of the t2 lie apart in order 3, so that a thread, which
    reads 8 of the t3 at once, has neighbours in t2 as well: these will be neighbours in memory.
    """
    R: tl.constexpr = N2 * N3
    S: tl.constexpr = 1 if N3 == 1 else 4
    row = tl.arange(0, N1)[:, None, None]
    column = tl.arange(0, P * R // S)[None, None, :]
    t2 = column % (R // S) // N3 * S + tl.arange(0, S)[None, :, None]
    t = (row // 16 * 8 + row % 8) * R + t2 * N3 + column % N3
    return (b + column // (R // S) * 2 + row // 8 % 2).to(tl.int64), t


@triton.jit
def _operand(x, P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, APART: tl.constexpr):
    """What was read from :func:`_places` as float16 (N1, P N3 N2), scaled, and the factors (2, P) that are missing.

    APART: of each sequence a factor; else of each pair.
    """
    S: tl.constexpr = 1 if N3 == 1 else 4
    x = tl.permute(tl.reshape(x, (N1 // 16, 2, 8, S, P, N2 // S, N3)), (0, 1, 2, 4, 6, 5, 3))
    # Columns and rows one after the other: Triton reduces over lanes wrongly that are no neighbours.
    most = tl.max(tl.reshape(tl.abs(x), (N1 // 16, 2, 8, P, N2 * N3)), 4)
    if APART:
        up, down = _power_below(tl.max(tl.reshape(tl.permute(most, (1, 3, 0, 2)), (2, P, N1 // 2)), 2))
    else:
        most = tl.max(tl.reshape(tl.permute(most, (3, 0, 1, 2)), (1, P, N1)), 2)
        up, down = _power_below(tl.broadcast_to(most, (2, P)))
    x = tl.reshape(x, (N1 // 16, 2, 8, P, N2 * N3)) * down[None, :, None, :, None]
    return tl.reshape(x.to(tl.float16), (N1, P * N3 * N2)), up


# Not specialised to a single step, which would make one straight piece of the filter's and the input's transforms: too
# many registers.
@triton.jit(do_not_specialize=["steps"])
def convolve(
    u_ptr, pre_ptr, post_ptr, other_ptr, k_ptr, rev_ptr, skip_ptr, table, y_ptr, z_ptr,
    batch, channels, length, taps, behind, steps, u_b, u_h, pre_b, pre_h, post_b, post_h, other_b, other_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    OTHER: tl.constexpr, REV: tl.constexpr, SKIP: tl.constexpr, CONJUGATE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``y = post * (k * (pre u))`` for ``steps`` groups of P pairs of one channel's sequences.

    CONJUGATE: the transpose, a correlation. OTHER: also z, with another gate behind.
    """
    R: tl.constexpr = N2 * N3
    H: tl.constexpr = N1 // 2
    h = (tl.program_id(0) % channels).to(tl.int64)
    group = (tl.program_id(0) // channels) * steps
    kr, ki, factor = _filter(
        k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, P, N1, N2, N3, ASM
    )  # fmt: skip
    first, second, third = forward_matrices(table, H, N1, N2, N3)
    real, imaginary, second_, third_ = inverse_matrices(table, N1, N2, N3)
    row = tl.arange(0, N1)[:, None]
    column = tl.arange(0, P * R)[None, :]
    to = row % H * R + column % R
    for step in range(steps):
        start = 2 * (group + step) * P
        b, t = _places(start, P, N1, N2, N3)
        live = (t < length) & (b < batch)
        x = tl.load(u_ptr + b * u_b + h * u_h + t, mask=live, other=0.0).to(tl.float32)
        if PRE:
            x *= tl.load(pre_ptr + b * pre_b + h * pre_h + t, mask=live, other=0.0).to(tl.float32)
        x, up = _operand(x, P, N1, N2, N3, True)
        ar, ai = forward(x, first, second, third, table, P, N1, N2, N3, ASM)
        ar, ai = times(ar.to(tl.float16), ai.to(tl.float16), kr, ki, CONJUGATE, ASM)
        y, _ = inverse(ar, ai, real, imaginary, second_, third_, table, P, N1, N2, N3, ASM)
        y = tl.reshape(y, (2, H, P, R)) * (up * factor)[:, None, :, None]
        y = tl.reshape(tl.permute(tl.reshape(y, (N1, P, N3, N2)), (0, 1, 3, 2)), (N1, P * R))
        b = (start + 2 * (column // R) + row // H).to(tl.int64)
        live = (to < length) & (b < batch)
        at = (b * channels + h) * length + to
        if OTHER:
            v = tl.load(other_ptr + b * other_b + h * other_h + to, mask=live, other=0.0).to(tl.float32)
            tl.store(z_ptr + at, (y * v).to(z_ptr.dtype.element_ty), mask=live)
        if POST:
            y *= tl.load(post_ptr + b * post_b + h * post_h + to, mask=live, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def correlate(
    gy_ptr, post_ptr, u_ptr, pre_ptr, table, gk_ptr,
    batch, channels, length, steps, gy_b, gy_h, post_b, post_h, u_b, u_h, pre_b, pre_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The gradient of the filter, of all M places: a partial sum over ``steps`` groups of P pairs.

    Neighbours share a scale here, as the sum over them needs: what the sequence with the smaller entries adds has the
    rounding errors of the larger one.
    """
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    L: tl.constexpr = N2 if N3 == 1 else N3
    h = (tl.program_id(0) % channels).to(tl.int64)
    part = tl.program_id(0) // channels
    first, second, third = forward_matrices(table, H, N1, N2, N3)
    sr = tl.zeros((P * M // L, L // 8, 8), tl.float32)
    si = tl.zeros((P * M // L, L // 8, 8), tl.float32)
    for step in range(steps):
        b, t = _places(2 * (part * steps + step) * P, P, N1, N2, N3)
        live = (t < length) & (b < batch)
        w = tl.load(gy_ptr + b * gy_b + h * gy_h + t, mask=live, other=0.0).to(tl.float32)
        if POST:
            w *= tl.load(post_ptr + b * post_b + h * post_h + t, mask=live, other=0.0).to(tl.float32)
        w, up = _operand(w, P, N1, N2, N3, False)
        ar, ai = forward(w, first, second, third, table, P, N1, N2, N3, ASM)
        x = tl.load(u_ptr + b * u_b + h * u_h + t, mask=live, other=0.0).to(tl.float32)
        if PRE:
            x *= tl.load(pre_ptr + b * pre_b + h * pre_h + t, mask=live, other=0.0).to(tl.float32)
        x, rise = _operand(x, P, N1, N2, N3, False)
        zr, zi = forward(x, first, second, third, table, P, N1, N2, N3, ASM)
        factor = tl.max(up * rise, 0)
        if N3 == 1:  # rows (p / 2, k1 / 8, p % 2, k1 % 8)
            factor = tl.reshape(factor, (P // 2, 1, 2, 1))
            factor = tl.reshape(tl.broadcast_to(factor, (P // 2, N1 // 8, 2, 8)), (P * M // L, 1, 1))
        else:
            factor = tl.reshape(tl.broadcast_to(factor[:, None], (P, M // L)), (P * M // L, 1, 1))
        # The real part, in time, of conj(Z) W is the sum of both correlations.
        sr += (zr * ar + zi * ai) * factor
        si += (zr * ai - zi * ar) * factor
    up, down = _power_below(tl.maximum(tl.max(tl.abs(sr)), tl.max(tl.abs(si))))
    real, imaginary, second_, third_ = inverse_matrices(table, N1, N2, N3)
    ar, ai = (sr * down).to(tl.float16), (si * down).to(tl.float16)
    low, high = inverse(ar, ai, real, imaginary, second_, third_, table, P, N1, N2, N3, ASM)
    part_of = tl.arange(0, 2)[:, None, None, None, None]  # only real parts are wanted
    at = tl.arange(0, H)[None, :, None, None, None] * R + tl.arange(0, N3)[None, None, None, :, None]
    at += tl.arange(0, N2)[None, None, None, None, :] * N3 + part_of * 0
    at = gk_ptr + (part * channels + h) * M + at
    total = tl.sum(tl.reshape(low, (2, H, P, N3, N2)), 2, keep_dims=True) * up
    tl.store(at, total, mask=part_of == 0)
    total = tl.sum(tl.reshape(high, (2, H, P, N3, N2)), 2, keep_dims=True) * up
    tl.store(at + H * R, total, mask=part_of == 0)
