"""Long convolutions in Triton, block by block, for half precision: sequences longer than what a chip holds.

A sequence is cut into blocks of B entries; x_j is block j followed by B zeros, and of the output's block i

    y_i = first half of IDFT(sum_m G_m DFT(x_{i - m})),

where G_m is the DFT of 2B points of what lies (m - 1) B to (m + 1) B behind: taps of block m first, those of block
m - 1 after them (overlap-save). All transforms have 2B points and stay on the chip; spectra pass through memory in
float16, in the order in which threads hold them. The transpose and the gradient of the filter are sums of such products
as well. As elsewhere two sequences are one complex one.

The scale of a sequence or filter is the same in all of its blocks, whose spectra are added.

Source: Stockham 1966, "High-speed convolution and correlation".
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.fft_conv.chain import forward, forward_matrices, inverse, inverse_matrices
from structmat_kernels.fft_conv.chain_programs import _places, _power_below


@triton.jit
def largest(
    u_ptr, gate_ptr, up_ptr, channels, length, u_b, u_h, gate_b, gate_h, GATE: tl.constexpr, TILE: tl.constexpr
):
    """Of each sequence the power of two below its largest entry; zero of zeros."""
    b = (tl.program_id(0) // channels).to(tl.int64)
    h = (tl.program_id(0) % channels).to(tl.int64)
    most = tl.zeros((TILE,), tl.float32)
    for start in range(0, length, TILE):
        t = start + tl.arange(0, TILE)
        x = tl.load(u_ptr + b * u_b + h * u_h + t, mask=t < length, other=0.0).to(tl.float32)
        if GATE:
            x *= tl.load(gate_ptr + b * gate_b + h * gate_h + t, mask=t < length, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
    most = tl.max(most, 0)
    up, _ = _power_below(most)
    tl.store(up_ptr + tl.program_id(0), tl.where(most == 0, 0.0, up))


@triton.jit
def _up(up_ptr, b, h, batch, channels, APART: tl.constexpr):
    """The scales of sequences b and b + 1 of channel h; one for both unless APART."""
    up = tl.load(up_ptr + b * channels + h)
    up2 = tl.load(up_ptr + (b + 1) * channels + h, mask=b + 1 < batch, other=0.0)
    up2 = tl.where(b + 1 < batch, up2, up)
    if not APART:
        up = tl.maximum(up, up2)
        up2 = up
    return up, up2


@triton.jit
def _offsets(N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Places of a part of a spectrum, (4 N1, E / 8, 8): a thread's entries by eights, those of neighbours together."""
    thread = tl.arange(0, 4 * N1)[:, None, None]
    return (tl.arange(0, N2 * N3 // 32)[None, :, None] * (4 * N1) + thread) * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def by_threads(ar, ai, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """What :func:`forward` gives as (4 N1, E / 8, 8), float16."""
    x = tl.reshape(tl.join(ar.to(tl.float16), ai.to(tl.float16)), (N2 // 2, N1 // 8, 2, 8, N3 // 8, 4, 2, 2))
    return tl.split(tl.reshape(tl.permute(x, (1, 3, 5, 0, 2, 4, 6, 7)), (4 * N1, N2 * N3 // 32, 8, 2)))


@triton.jit
def put_spectrum(ptr, xr, xi, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Store what :func:`by_threads` gives."""
    at = _offsets(N1, N2, N3)
    tl.store(ptr + at, xr)
    tl.store(ptr + N1 * N2 * N3 + at, xi)


@triton.jit
def spectrum(ptr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Both parts in that order, float16."""
    at = _offsets(N1, N2, N3)
    return tl.load(ptr + at), tl.load(ptr + N1 * N2 * N3 + at)


@triton.jit
def times_spectrum(xr, xi, gr, gi):
    """The parts of the product of two spectra, float32."""
    xr, xi, gr, gi = xr.to(tl.float32), xi.to(tl.float32), gr.to(tl.float32), gi.to(tl.float32)
    return xr * gr - xi * gi, xr * gi + xi * gr


@triton.jit
def frequencies(ar, ai, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Sums of spectra as :func:`inverse` takes them, and the factor by which they are too small."""
    most = tl.max(tl.max(tl.maximum(tl.abs(ar), tl.abs(ai)), 2), 1)
    up, down = _power_below(tl.max(most, 0))
    # The inverse makes means of them, which 1024 keeps away from float16's smallest numbers. In two steps: of zeros the
    # product of both factors is not finite.
    x = tl.join((ar * down * 1024.0).to(tl.float16), (ai * down * 1024.0).to(tl.float16))
    x = tl.permute(tl.reshape(x, (N1 // 8, 8, 4, N2 // 2, 2, N3 // 8, 2, 2)), (3, 0, 4, 1, 5, 2, 6, 7))
    ar, ai = tl.split(tl.reshape(x, (N1 * N2, N3 // 8, 8, 2)))
    return ar, ai, up * (1.0 / 1024.0)


@triton.jit
def transform(
    u_ptr, gate_ptr, up_ptr, table, to_ptr, batch, channels, length, blocks, u_b, u_h, gate_b, gate_h,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, GATE: tl.constexpr, APART: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The spectrum of a block of two sequences, times a gate: (channel, pair, block, part, frequency)."""
    M: tl.constexpr = N1 * N2 * N3
    pairs = (batch + 1) // 2
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    b = (rest % pairs * 2).to(tl.int64)
    h = (rest // pairs).to(tl.int64)
    up, up2 = _up(up_ptr, b, h, batch, channels, APART)
    b, t = _places(b, 1, N1, N2, N3)
    t += block * (M // 2)
    live = (t < length) & (b < batch)
    x = tl.load(u_ptr + b * u_b + h * u_h + t, mask=live, other=0.0).to(tl.float32)
    if GATE:
        x *= tl.load(gate_ptr + b * gate_b + h * gate_h + t, mask=live, other=0.0).to(tl.float32)
    second = tl.arange(0, N1)[:, None, None] // 8 % 2 == 1
    _, down = _power_below(tl.where(second, up2, up))
    x = tl.permute(tl.reshape(x * down, (N1, 4, N2 // 4, N3)), (0, 3, 2, 1))
    first, middle, last = forward_matrices(table, N1 // 2, N1, N2, N3)
    # Rounded last: Triton 3.6 fails at a reshaped operand that it finds in single entries, those of odd lengths.
    x = tl.reshape(x, (N1, N3 * N2)).to(tl.float16)
    ar, ai = forward(x, first, middle, last, table, 1, N1, N2, N3, ASM)
    xr, xi = by_threads(ar, ai, N1, N2, N3)
    put_spectrum(to_ptr + tl.program_id(0).to(tl.int64) * (2 * M), xr, xi, N1, N2, N3)


@triton.jit
def windows(
    k_ptr, rev_ptr, skip_ptr, up_k_ptr, table, to_ptr, taps, behind, lowest, count,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, REV: tl.constexpr, SKIP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """G_m of a channel for m = lowest, ..., lowest + count - 1: (channel, m, part, frequency)."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    h = (tl.program_id(0) // count).to(tl.int64)
    m = lowest + tl.program_id(0) % count
    # As in _places neighbours in t2 lie apart, so that a thread has what are neighbours in memory later.
    column = tl.arange(0, R // 4)[None, None, :]
    row = tl.arange(0, N1)[:, None, None]
    t = row * R + (column // N3 * 4 + tl.arange(0, 4)[None, :, None]) * N3 + column % N3
    t += m * (M // 2) - tl.where(row < N1 // 2, 0, M)
    k = tl.load(k_ptr + h * taps + t, mask=(t >= 0) & (t < taps), other=0.0).to(tl.float32)
    if REV:
        k += tl.load(rev_ptr + h * behind - 1 - t, mask=(t < 0) & (t >= -behind), other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(t == 0, tl.load(skip_ptr + h).to(tl.float32), 0.0)
    _, down = _power_below(tl.load(up_k_ptr + h))
    x = tl.permute(tl.reshape(k * down, (N1, 4, N2 // 4, N3)), (0, 3, 2, 1))
    x = tl.reshape(x, (N1, N3 * N2)).to(tl.float16)
    # Imaginary parts are zeros: of the first matrix the columns of real ones will do.
    real = tl.arange(0, N1)[None, :]
    first = tl.load(table + tl.arange(0, 2 * N1)[:, None] * (2 * N1) + real // 8 * 16 + real % 8)
    _, middle, last = forward_matrices(table, N1, N1, N2, N3)
    ar, ai = forward(x, first, middle, last, table, 1, N1, N2, N3, ASM)
    xr, xi = by_threads(ar, ai, N1, N2, N3)
    put_spectrum(to_ptr + tl.program_id(0).to(tl.int64) * (2 * M), xr, xi, N1, N2, N3)


@triton.jit
def combine(
    x_ptr, g_ptr, up_ptr, up_k_ptr, post_ptr, other_ptr, table, y_ptr, z_ptr,
    batch, channels, length, blocks, lowest, count, post_b, post_h, other_b, other_h, y_b, y_h,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, POST: tl.constexpr, OTHER: tl.constexpr,
    APART: tl.constexpr, TRANSPOSE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A block of two sequences of ``y = post * sum_m G_m x``, or of the transpose. OTHER: also z, with another gate."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    pairs = (batch + 1) // 2
    block = tl.program_id(0) % blocks
    rest = (tl.program_id(0) // blocks).to(tl.int64)
    b = rest % pairs * 2
    h = rest // pairs
    ar = tl.zeros((4 * N1, R // 32, 8), tl.float32)
    ai = tl.zeros((4 * N1, R // 32, 8), tl.float32)
    if TRANSPOSE:
        start = tl.maximum(lowest, -block)
        stop = tl.minimum(lowest + count, blocks - block)
    else:
        start = tl.maximum(lowest, block + 1 - blocks)
        stop = tl.minimum(lowest + count, block + 1)
    for m in range(start, stop):
        source = block + m if TRANSPOSE else block - m
        xr, xi = spectrum(x_ptr + (rest * blocks + source) * (2 * M), N1, N2, N3)
        gr, gi = spectrum(g_ptr + (h * count + m - lowest) * (2 * M), N1, N2, N3)
        zr, zi = times_spectrum(xr, xi, gr, -gi if TRANSPOSE else gi)
        ar += zr
        ai += zi
    ar, ai, factor = frequencies(ar, ai, N1, N2, N3)
    real, imaginary, middle, last = inverse_matrices(table, N1, N2, N3)
    y, _ = inverse(ar, ai, real, imaginary, middle, last, table, 1, N1, N2, N3, ASM)
    y = tl.reshape(tl.permute(tl.reshape(y, (N1, N3, N2)), (0, 2, 1)), (N1, R))
    up, up2 = _up(up_ptr, b, h, batch, channels, APART)
    row = tl.arange(0, N1)[:, None]
    # The scale of the channel apart: three powers of two at once may leave float32's range.
    y = y * factor * tl.load(up_k_ptr + h) * tl.where(row < H, up, up2)
    t = block * (M // 2) + row % H * R + tl.arange(0, R)[None, :]
    b += row // H
    live = (t < length) & (b < batch)
    if OTHER:
        v = tl.load(other_ptr + b * other_b + h * other_h + t, mask=live, other=0.0).to(tl.float32)
        tl.store(z_ptr + b * y_b + h * y_h + t, (y * v).to(z_ptr.dtype.element_ty), mask=live)
    if POST:
        y *= tl.load(post_ptr + b * post_b + h * post_h + t, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + b * y_b + h * y_h + t, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def correlate(
    w_ptr, x_ptr, up_w_ptr, up_x_ptr, table, gk_ptr, batch, channels, blocks, lowest, count, steps,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The gradient of window m of a channel, 2B points, of ``steps`` pairs, whose sequences share a scale."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    pairs = (batch + 1) // 2
    part = tl.program_id(0) // count // channels
    h = (tl.program_id(0) // count % channels).to(tl.int64)
    m = lowest + tl.program_id(0) % count
    ar = tl.zeros((4 * N1, R // 32, 8), tl.float32)
    ai = tl.zeros((4 * N1, R // 32, 8), tl.float32)
    for pair in range(part * steps, tl.minimum(part * steps + steps, pairs)):
        up, _ = _up(up_w_ptr, 2 * pair, h, batch, channels, False)
        rise, _ = _up(up_x_ptr, 2 * pair, h, batch, channels, False)
        for block in range(tl.maximum(m, 0), blocks + tl.minimum(m, 0)):
            at = (h * pairs + pair) * blocks + block
            wr, wi = spectrum(w_ptr + at * (2 * M), N1, N2, N3)
            xr, xi = spectrum(x_ptr + (at - m) * (2 * M), N1, N2, N3)
            # The real part, in time, of conj(X) W is the sum of both correlations.
            zr, zi = times_spectrum(wr, wi, xr, -xi)
            ar += zr * (up * rise)
            ai += zi * (up * rise)
    ar, ai, factor = frequencies(ar, ai, N1, N2, N3)
    real, imaginary, middle, last = inverse_matrices(table, N1, N2, N3)
    low, high = inverse(ar, ai, real, imaginary, middle, last, table, 1, N1, N2, N3, ASM)
    which = tl.arange(0, 2)[:, None, None, None]  # only real parts are wanted
    at = tl.arange(0, H)[None, :, None, None] * R + tl.arange(0, N3)[None, None, :, None]
    at += tl.arange(0, N2)[None, None, None, :] * N3 + which * 0
    at = gk_ptr + tl.program_id(0).to(tl.int64) * M + at
    tl.store(at, tl.reshape(low, (2, H, N3, N2)) * factor, mask=which == 0)
    tl.store(at + H * R, tl.reshape(high, (2, H, N3, N2)) * factor, mask=which == 0)
