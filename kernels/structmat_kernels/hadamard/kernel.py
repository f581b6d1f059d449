"""Walsh-Hadamard transform in Triton: one pass over memory.

Half precision from n = 4096 to 16384 goes through the matrix units (``_products``), everything else through
``_hadamard``: a warp holds a whole row (128 values a lane at n = 4096). The levels whose index bit is a register bit
are additions within a lane; the five whose bit is a lane bit cost one shuffle and one multiply-add a value, exact up to
float32 rounding. On an H100 float32 then runs at a copy's speed; bfloat16 takes 1.2 times a copy at n = 4096, where the
23 us of shuffles stand beside 44 us of memory traffic, and 1.1 times with matrix units.

Above 4096 there are two ways: ``num_warps`` > 1 exchanges the top levels through shared memory (16 bytes a value and
level), and ``part`` < n lets n / part programs read the row and each keep one part of the result, which costs n / part
reads from L2 but none from DRAM.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.launches import launch, processors, shared_memory

LARGEST = 32768


@triton.jit
def _hadamard(
    x_ptr, y_ptr, rows, x_row, scale,
    ROWS: tl.constexpr, PART: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, part number ``pid % PARTS`` of the result; neighbours read the same rows together."""
    pid = tl.program_id(0)
    part = pid % PARTS
    row = (pid // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, PART)
    mask = (row < rows)[:, None] & (col < PART)[None, :]
    x_ptrs = x_ptr + row[:, None] * x_row + col[None, :]
    h = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):  # the levels above a part: this part's row of the PARTS x PARTS transform
        parity = i & part
        parity = parity ^ (parity >> 2)
        parity = (parity ^ (parity >> 1)) & 1
        h += (1 - 2 * parity).to(tl.float32) * tl.load(x_ptrs + i * PART, mask=mask, other=0.0).to(tl.float32)
    h = tl.reshape(h, [ROWS] + [2] * LEVELS)
    for level in tl.static_range(LEVELS):
        # The partner's value along a dimension of size 2, exactly: a sum of the bit patterns (which wraps around) less
        # one's own. The compiler reduces it to a register's name or to one shuffle.
        bits = h.to(tl.int32, bitcast=True)
        partner = (tl.sum(bits, LEVELS - level, keep_dims=True) - bits).to(tl.float32, bitcast=True)
        bit = tl.reshape(tl.arange(0, 2), [1] * (LEVELS - level) + [2] + [1] * level)
        h = tl.fma(tl.broadcast_to((1 - 2 * bit).to(tl.float32), h.shape), h, partner)
    h = tl.reshape(h, [ROWS, PART]) * scale
    tl.store(
        y_ptr + row[:, None] * (PARTS * PART) + part * PART + col[None, :], h.to(y_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def _signs(N: tl.constexpr):
    """The N x N transform, N <= 256: minus one to the number of bits that row and column share."""
    i = tl.arange(0, N)
    v = i[:, None] & i[None, :]
    v ^= v >> 4
    v ^= v >> 2
    v ^= v >> 1
    return 1.0 - 2.0 * (v & 1).to(tl.float32)


@triton.jit
def _products(
    x_ptr, y_ptr, rows, x_row, scale, walkers,
    A: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Half precision on the matrix units: a row X as (A, B) becomes H_A X H_B.

    X and the signs are exact in half precision; between the products the float32 values are split into two bfloat16
    parts, which keeps 16 bits. 1.5 n (A + 2 B) multiply-adds a row, a tenth of the time of the memory traffic.
    """
    at = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    left = _signs(A).to(x_ptr.dtype.element_ty)
    right = _signs(B).to(tl.bfloat16)
    if UPCAST:  # the interpreter's NumPy has no bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    for row in tl.range(tl.program_id(0), rows, walkers, num_stages=STAGES):
        wide = row + tl.zeros((1, 1), tl.int64)
        x = tl.load(x_ptr + wide * x_row + at)
        if UPCAST:
            x = x.to(tl.float32)
        h = tl.dot(left, x)
        high = h.to(tl.bfloat16)
        low = (h - high.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            high = high.to(tl.float32)
            low = low.to(tl.float32)
        y = tl.dot(low, right, tl.dot(high, right)) * scale
        tl.store(y_ptr + wide * (A * B) + at, y.to(y_ptr.dtype.element_ty))


def config(rows: int, n: int, dtype: torch.dtype = torch.float32, large: bool = True) -> dict[str, int]:
    """Which kernel and tiles; measured on an H100. ``large``: a program can have an H100's shared memory.

    With shuffles: rows a program, values of a row it computes, and warps. A program of one warp and 4096 values keeps
    8 KB (bfloat16) in flight; 12 of them fit on a multiprocessor. With products (``A``): the split of a row, and
    programs a multiprocessor.
    """
    if dtype != torch.float32 and 4096 <= n <= (16384 if large else 4096) and rows > 64:
        A = 64 if n <= 4096 else 128
        few = {4096: (4, 3, 6), 8192: (4, 3, 6), 16384: (8, 4, 1)}[n]
        return {"A": A} | dict(zip(("num_warps", "STAGES", "CTAS"), few, strict=True))
    return {"rows": max(1, 512 // n), "part": min(n, 4096), "num_warps": 1}


def hadamard(x: Tensor, scale: float, config: dict[str, int] | None = None) -> Tensor:
    """``scale * H x`` for x of shape (rows, n), n a power of two up to LARGEST; any row stride."""
    rows, n = x.shape
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    c = config or _config(rows, n, x.dtype, shared_memory(x.device) > 200_000)
    with launching(x):
        if "A" in c:
            walkers = min(rows, processors(x.device) * c["CTAS"])
            more = {"A": c["A"], "B": n // c["A"], "STAGES": c["STAGES"], "UPCAST": INTERPRETED}
            sizes = (rows, x.stride(0), float(scale), walkers)
            launch(_products, (walkers,), (x, y), sizes, **more, num_warps=c["num_warps"])
            return y
        parts = n // c["part"]
        grid = (-(-rows // c["rows"]) * parts,)
        tiles = {"ROWS": c["rows"], "PART": c["part"], "LEVELS": c["part"].bit_length() - 1, "PARTS": parts}
        launch(_hadamard, grid, (x, y), (rows, x.stride(0), float(scale)), **tiles, num_warps=c["num_warps"])
    return y


_config = config
