"""Long convolutions in Triton, block by block, whose spectra never leave the chip: causal filters of few windows.

Where only the windows G_0, ..., G_(count - 1) of :mod:`long_programs` are not zero, as of causal filters of inputs of
few blocks and of short filters, an output block needs the spectra of its own and of few blocks before. A program takes
the blocks of two sequences one after the other and keeps those spectra in memory of its own, which stays in L2 as the
windows do: only input and output pass through memory.
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.fft_conv.chain import forward, forward_matrices, inverse, inverse_matrices
from structmat_kernels.fft_conv.chain_programs import _places, _power_below
from structmat_kernels.fft_conv.long_programs import by_threads, frequencies, put_spectrum, spectrum, times_spectrum


@triton.jit
def _gated(u_ptr, gate_ptr, b, h, t, batch, length, u_b, u_h, gate_b, gate_h, GATE: tl.constexpr):
    """The gated inputs at sequences b and times t, zeros outside, float32."""
    live = (t < length) & (b < batch)
    x = tl.load(u_ptr + b * u_b + h * u_h + t, mask=live, other=0.0).to(tl.float32)
    if GATE:
        x *= tl.load(gate_ptr + b * gate_b + h * gate_h + t, mask=live, other=0.0).to(tl.float32)
    return x


@triton.jit
def carry(
    u_ptr, gate_ptr, g_ptr, up_k_ptr, post_ptr, scratch_ptr, table, y_ptr,
    batch, channels, length, blocks, count, u_b, u_h, gate_b, gate_h, post_b, post_h, y_b, y_h,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, GATE: tl.constexpr, POST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """All of ``y = post * sum_m G_m x``, m < count, of two sequences, then of two others, and so on."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    pairs = (batch + 1) // 2
    before, middle, last = forward_matrices(table, H, N1, N2, N3)
    real, imaginary, middle_, last_ = inverse_matrices(table, N1, N2, N3)
    row = tl.arange(0, N1)[:, None]
    to = row % H * R + tl.arange(0, R)[None, :]
    scratch_ptr += tl.program_id(0).to(tl.int64) * (count * 2 * M)
    for item in range(tl.program_id(0), pairs * channels, tl.num_programs(0)):
        first = (item % pairs * 2).to(tl.int64)
        h = (item // pairs).to(tl.int64)
        b, t = _places(first, 1, N1, N2, N3)
        c = first + row // H
        # Blocks share a scale, as their spectra are added.
        most = tl.zeros((N1, 4, R // 4), tl.float32)
        for block in range(blocks):
            x = _gated(u_ptr, gate_ptr, b, h, t + block * (M // 2), batch, length, u_b, u_h, gate_b, gate_h, GATE)
            most = tl.maximum(most, tl.abs(x))
        # Columns and rows one after the other: Triton reduces over lanes wrongly that are no neighbours.
        rows = tl.max(tl.reshape(most, (N1 // 16, 2, 8, R)), 3)
        rows = tl.max(tl.reshape(tl.permute(rows, (1, 0, 2)), (2, N1 // 2)), 1)
        up, down = _power_below(rows)
        up = tl.where(rows == 0, 0.0, up)  # of zeros zeros, whatever the neighbour leaves there
        rise = tl.load(up_k_ptr + h)
        for block in range(blocks):
            x = _gated(u_ptr, gate_ptr, b, h, t + block * (M // 2), batch, length, u_b, u_h, gate_b, gate_h, GATE)
            x = tl.permute(tl.reshape(x, (N1, 4, N2 // 4, N3)), (0, 3, 2, 1))
            x = tl.reshape(x, (N1 // 16, 2, 8, R)) * down[None, :, None, None]
            x = tl.reshape(x, (N1, R)).to(tl.float16)
            ar, ai = forward(x, before, middle, last, table, 1, N1, N2, N3, ASM)
            xr, xi = by_threads(ar, ai, N1, N2, N3)
            # For the next blocks: registers do not hold it meanwhile.
            put_spectrum(scratch_ptr + block % count * (2 * M), xr, xi, N1, N2, N3)
            gr, gi = spectrum(g_ptr + h * count * (2 * M), N1, N2, N3)
            zr, zi = times_spectrum(xr, xi, gr, gi)
            tl.debug_barrier()  # what other threads have stored
            for m in range(1, tl.minimum(block + 1, count)):
                xr, xi = spectrum(scratch_ptr + (block - m) % count * (2 * M), N1, N2, N3)
                gr, gi = spectrum(g_ptr + (h * count + m) * (2 * M), N1, N2, N3)
                yr, yi = times_spectrum(xr, xi, gr, gi)
                zr += yr
                zi += yi
            zr, zi, factor = frequencies(zr, zi, N1, N2, N3)
            y, _ = inverse(zr, zi, real, imaginary, middle_, last_, table, 1, N1, N2, N3, ASM)
            # The scale of the channel apart: three powers of two at once may leave float32's range.
            y = tl.reshape(y, (2, H, R)) * factor * rise * up[:, None, None]
            y = tl.reshape(tl.permute(tl.reshape(y, (N1, N3, N2)), (0, 2, 1)), (N1, R))
            live = (to + block * (M // 2) < length) & (c < batch)
            if POST:
                at = post_ptr + c * post_b + h * post_h + to + block * (M // 2)
                y *= tl.load(at, mask=live, other=0.0).to(tl.float32)
            at = y_ptr + c * y_b + h * y_h + to + block * (M // 2)
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=live)
