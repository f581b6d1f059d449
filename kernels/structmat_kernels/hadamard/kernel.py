"""Walsh-Hadamard transform in Triton: one pass over memory, no shared memory up to n = 4096.

A warp holds a whole row (128 values a lane at n = 4096). The levels whose index bit is a register bit are additions
within a lane; the five whose bit is a lane bit cost one shuffle and one multiply-add a value. On an H100 at n = 4096
and 8192 rows of bfloat16 that is 23 us of shuffles beside 44 us of memory traffic (134 MB at 3.03 TB/s), so a copy's
speed is within reach without tensor cores, exact up to float32 rounding for all three dtypes.

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


def config(rows: int, n: int) -> dict[str, int]:
    """Rows a program, values of a row it computes, and warps.

    A program of one warp and 2048 values keeps 4 KB (bfloat16) in flight; 20 of them fit on a multiprocessor.
    """
    part = min(n, 4096) if n <= 8192 else n
    fitting = max(1, 2048 // n)
    spread = max(1, triton.next_power_of_2(triton.cdiv(rows, 1024)))  # few rows: many small programs
    return {"rows": min(fitting, spread), "part": part, "num_warps": max(1, part // 2048 if part > 4096 else 1)}


def hadamard(x: Tensor, scale: float, config: dict[str, int] | None = None) -> Tensor:
    """``scale * H x`` for x of shape (rows, n), n a power of two up to LARGEST; any row stride."""
    rows, n = x.shape
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    c = config or _config(rows, n)
    parts = n // c["part"]
    grid = (triton.cdiv(rows, c["rows"]) * parts,)
    with torch.cuda.device_of(x):
        _hadamard[grid](
            x, y, rows, x.stride(0), float(scale),
            ROWS=c["rows"], PART=c["part"], LEVELS=c["part"].bit_length() - 1, PARTS=parts, num_warps=c["num_warps"],
        )  # fmt: skip
    return y


_config = config
