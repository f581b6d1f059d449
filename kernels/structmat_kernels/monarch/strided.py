"""Triton kernels of the gradients that read the strided gradient of the outputs as it lies, JB left blocks a program.

A few programs walk over many token tiles, and keep factors and sums of factors' gradients on chip. Each writes its sums
once, as float32; ``reduce`` adds those of all programs in a fixed order.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.monarch.kernel import _dot


@triton.jit
def _through_registers(v, HOLD: tl.constexpr):
    """v, which the compiler may then not read from shared memory in the layout of a product's operand.

    That would be two bytes at a time with many bank conflicts, since adjacent entries belong to different products.
    """
    if HOLD:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=False, pack=2)
    return v


@triton.jit
def _outputs(
    gy, t0, j0, T, nrows, gy_token, L: tl.constexpr, S: tl.constexpr, TT: tl.constexpr,
    JB: tl.constexpr, BU: tl.constexpr, HOLD: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """(TT, BU, JB) entries ``gy[t, u l + j]`` for TT tokens from t0 and JB adjacent j from j0 on.

    SPREAD: a warp reads 8 j of 16 u and two tokens: for the compiler, u is then the fastest dimension in shared memory
    and the token the next. With tokens one row, or two rows of 128 bytes, apart no access has bank conflicts.
    """
    if SPREAD:
        UH: tl.constexpr = BU // 16
        JH: tl.constexpr = JB // 8
        e = tl.arange(0, TT * UH * JH)
        f = tl.arange(0, 128)
        rest = e // 2 // UH // JH
        bits = e % 2 * 2 + rest % 2 if BU >= 64 else rest % 2 * 2 + e % 2
        t = t0 + (rest // 2 * 4 + bits)[:, None].to(tl.int64)
        u = (e // 2 % UH * 16)[:, None] + (f // 8)[None, :]
        c = (e // 2 // UH % JH * 8)[:, None] + (f % 8)[None, :]
    else:
        e = tl.arange(0, BU * JB)
        t = t0 + tl.arange(0, TT)[:, None].to(tl.int64)
        u, c = (e // JB)[None, :], (e % JB)[None, :]
    # Said as adjacent where they are, and without conditions that hold anyway, the loads are wide.
    col = u * L + j0 + c
    if not SPREAD and JB == L:
        col = e[None, :]
    keep = (t < T) & (col < nrows)
    if L % JB != 0:
        keep &= j0 + c < L
    if S != BU:
        keep &= u < S
    v = _through_registers(tl.load(gy + t * gy_token + col, mask=keep, other=0.0), HOLD)
    if SPREAD:
        v = tl.reshape(v, (TT // 4, 2, JB // 8, BU // 16, 2, 16, 8))
        v = tl.permute(v, (0, 4, 1, 3, 5, 2, 6) if BU >= 64 else (0, 1, 4, 3, 5, 2, 6))
    return tl.reshape(v, (TT, BU, JB))


@triton.jit
def strided_left(
    gy, left, h, gh, partial, T, nrows, tiles, walkers, batches, gy_batch, gy_token,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr,
    BR: tl.constexpr, HOLD: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr, WANT_W: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Of JB left blocks: ``gh = left^T gy`` into the hidden layout and the partial sums of ``gy h^T``.

    BR of the hidden entries of a block a program. Token tiles from the last to the first: what the kernel before wrote
    last is still in the L2 cache.
    """
    groups: tl.constexpr = (L + JB - 1) // JB
    chunks: tl.constexpr = (R + BR - 1) // BR
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    j0 = pid // chunks % groups * JB
    walker = pid // (chunks * groups)
    j = j0 + tl.arange(0, JB)
    u = tl.arange(0, BU)
    d = (pid % chunks) * BR + tl.arange(0, BR)
    lane = tl.arange(0, TT)
    gy += g * gy_batch
    block = ((g * L + j[:, None, None]) * S + u[None, None, :]) * R + d[None, :, None]  # (JB, BR, BU)
    keep = (j < L)[:, None, None] & (u < S)[None, None, :] & (d < R)[None, :, None]
    ls = tl.load(left + block, mask=keep, other=0.0)
    acc = tl.zeros((JB, BR, BU), tl.float32)
    row = (j[:, None, None] * R + d[None, :, None]) * TT + lane[None, None, :]
    there = (j < L)[:, None, None] & (d < R)[None, :, None]
    for step in tl.range(walker, tiles, walkers, num_stages=STAGES):
        tile = tiles - 1 - step
        gs = _outputs(gy, tile * TT, j0, T, nrows, gy_token, L, S, TT, JB, BU, HOLD, SPREAD)
        at = (g * tiles + tile) * L * R * TT + row
        z = _dot(ls, tl.permute(gs, (2, 1, 0)), tl.zeros((JB, BR, TT), tl.float32), PREC, UPCAST)
        tl.store(gh + at, z.to(gh.dtype.element_ty), mask=there)
        if WANT_W:
            hs = tl.load(h + at, mask=there, other=0.0)  # (JB, BR, TT)
            acc = _dot(hs, tl.permute(gs, (2, 0, 1)), acc, PREC, UPCAST)
    if WANT_W:
        tl.store(partial + walker.to(tl.int64) * batches * L * S * R + block, acc, mask=keep)


@triton.jit
def _reduce(partial, out, pid, size, splits, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    e = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for s in range(0, splits, ROWS):
        k = s + rows
        acc += tl.load(
            partial + k[:, None].to(tl.int64) * size + e[None, :],
            mask=(k < splits)[:, None] & (e < size)[None, :],
            other=0.0,
        )
    tl.store(out + e, tl.sum(acc, 0).to(out.dtype.element_ty), mask=e < size)


@triton.jit
def reduce(
    first, first_out, second, second_out, third, third_out, first_blocks, second_blocks, first_size, second_size,
    third_size, first_splits, second_splits, third_splits,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Sums over the leading dimension of three stacks of partial sums, by so many blocks of programs for each.

    Tiles of ROWS x BLOCK entries; of the third stack, which is high and narrow, of LONG x SHORT.
    """
    pid = tl.program_id(0)
    if pid < first_blocks:
        _reduce(first, first_out, pid, first_size, first_splits, BLOCK, ROWS)
    elif pid < first_blocks + second_blocks:
        _reduce(second, second_out, pid - first_blocks, second_size, second_splits, BLOCK, ROWS)
    else:
        _reduce(third, third_out, pid - first_blocks - second_blocks, third_size, third_splits, SHORT, LONG)
