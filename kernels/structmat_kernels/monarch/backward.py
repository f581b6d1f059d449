"""Triton kernels of the transposed Monarch product and of the factors' gradients.

The strided gradient of the outputs is first brought to ``(left block, token, row)``; then one program a left block and
set of token tiles computes the hidden gradient and the block's gradient, and one program a right block the rest.
Gradients of factors accumulate in registers over the tiles of a program and are written as float32 partial sums: the
order of additions never changes.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.monarch.kernel import _dot, _load_bias, _store_outputs


@triton.jit
def deinterleave(
    gy, out, sums, T, nrows, batches, gy_batch, gy_token,
    L: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, REPEAT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr,
    WANT_B: tl.constexpr,
):  # fmt: skip
    """``out[j, t, u] = gy[t, u l + j]``, zero where gy has no such column, for REPEAT times TT tokens a program.

    WANT_B: their sums of gy, of which the gradient of a bias is made, into row (REPEAT TT tokens, g) of ``sums``.
    """
    groups: tl.constexpr = (L + JB - 1) // JB
    chunks: tl.constexpr = (S + BU - 1) // BU
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    part = (pid // (groups * chunks)).to(tl.int64)
    j0 = pid // chunks % groups * JB
    u0 = (pid % chunks) * BU
    e = tl.arange(0, BU * JB)
    col = u0 * L + e if JB == L else (u0 + e // JB) * L + j0 + e % JB
    keep = col < nrows
    if L % JB != 0:
        keep &= j0 + e % JB < L
    if JB != L and S % BU != 0:
        keep &= u0 + e // JB < S
    j = (j0 + tl.arange(0, JB)).to(tl.int64)
    u = u0 + tl.arange(0, BU)
    total = tl.zeros((BU * JB,), tl.float32)
    for step in range(REPEAT):
        t = (part * REPEAT + step) * TT + tl.arange(0, TT)
        v = tl.load(
            gy + g * gy_batch + t[:, None] * gy_token + col[None, :], mask=(t < T)[:, None] & keep[None, :], other=0.0
        )
        at = out + ((g * L + j[:, None, None]) * T + t[None, :, None]) * S + u[None, None, :]
        tl.store(
            at,
            tl.permute(tl.reshape(v, (TT, BU, JB)), (2, 0, 1)),
            mask=(j < L)[:, None, None] & (t < T)[None, :, None] & (u < S)[None, None, :],
        )
        if WANT_B:
            total += tl.sum(v.to(tl.float32), 0)
    if WANT_B:
        tl.store(sums + (part * batches + g) * nrows + col, total, mask=keep)


@triton.jit
def interleave(
    z, bias, y, T, nrows,
    L: tl.constexpr, S: tl.constexpr, TT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``y[t, u l + j] = act(z[j, t, u] + bias[u l + j])``."""
    groups: tl.constexpr = (L + JB - 1) // JB
    chunks: tl.constexpr = (S + BU - 1) // BU
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    t = (pid // (groups * chunks)).to(tl.int64) * TT + tl.arange(0, TT)
    j0 = pid // chunks % groups * JB
    u0 = (pid % chunks) * BU
    j = (j0 + tl.arange(0, JB)).to(tl.int64)
    u = u0 + tl.arange(0, BU)
    at = z + ((g * L + j[:, None, None]) * T + t[None, :, None]) * S + u[None, None, :]
    v = tl.load(
        at, mask=(j < L)[:, None, None] & (t < T)[None, :, None] & (u < S)[None, None, :], other=0.0
    )  # (JB, TT, BU)
    y += g * T * nrows
    bs = _load_bias(bias + g * nrows, u0, j0, nrows, L, S, HAS_BIAS, BU, JB)
    _store_outputs(y, bs, tl.permute(v, (1, 2, 0)), t, u0, j0, T, nrows, L, S, ACT, HAS_BIAS, TT, BU, JB)


@triton.jit
def left_backward(
    gyj, left, h, gh, partial, T, tiles, walkers, batches,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr, WANT_W: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of left block j over every ``walkers``-th tile: ``gh = left^T gy`` and the partial sum of ``gy h^T``.

    Tiles from the last to the first: what the kernels before wrote last is still in the L2 cache.
    """
    j = tl.program_id(0).to(tl.int64)
    walker = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    u = tl.arange(0, BS)
    d = tl.arange(0, BR)
    lane = tl.arange(0, TT)
    gyj += (g * L + j) * T * S
    block = (g * L + j) * S * R
    keep = (u < S)[:, None] & (d < R)[None, :]
    ls = tl.load(left + block + u[:, None] * R + d[None, :], mask=keep, other=0.0)
    acc = tl.zeros((BS, BR), tl.float32)
    for step in tl.range(walker, tiles, walkers, num_stages=STAGES):
        tile = tiles - 1 - step
        t = tile * TT + lane.to(tl.int64)
        gs = tl.load(gyj + t[:, None] * S + u[None, :], mask=(t < T)[:, None] & (u < S)[None, :], other=0.0)
        at = (((g * tiles + tile) * L + j) * R + d[:, None]) * TT + lane[None, :]
        if WANT_W:
            hs = tl.load(h + at, mask=(d < R)[:, None], other=0.0)
            acc = _dot(tl.trans(gs), tl.trans(hs), acc, PREC, UPCAST)
        out = _dot(tl.trans(ls), tl.trans(gs), tl.zeros((BR, TT), tl.float32), PREC, UPCAST)
        tl.store(gh + at, out.to(gh.dtype.element_ty), mask=(d < R)[:, None])
    if WANT_W:
        tl.store(
            partial + walker.to(tl.int64) * batches * L * S * R + block + u[:, None] * R + d[None, :], acc, mask=keep
        )


@triton.jit
def right_backward(
    gh, right, x, gx, partial, T, n, tiles, spans, walkers, batches, x_batch, x_token,
    L: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TT: tl.constexpr, TX: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
    WANT_X: tl.constexpr, WANT_W: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of right block i over each ``walkers``-th span of TX tokens: ``gx = right^T gh``, the partial sum of ``gh x^T``.

    Spans from the first to the last: the kernel before wrote the first ones last, and they are still in the L2 cache,
    where x and gx, used once, do not displace them.
    """
    i = tl.program_id(0).to(tl.int64)
    walker = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    a = tl.arange(0, BQ)
    b = tl.arange(0, BP)
    lane = tl.arange(0, TX)
    block = (g * K + i) * Q * P
    keep = (a < Q)[:, None] & (b < P)[None, :]
    rs = tl.load(right + block + a[:, None] * P + b[None, :], mask=keep, other=0.0)
    hid = i * Q + a
    row = hid % L * R + hid // L
    col = i * P + b
    live = (b < P) & (col < n)
    gh += g * tiles * L * R * TT
    acc = tl.zeros((BQ, BP), tl.float32)
    for span in tl.range(walker, spans, walkers, num_stages=STAGES):
        t = span * TX + lane.to(tl.int64)
        tile = span * (TX // TT) + (lane // TT).to(tl.int64)
        at = row[:, None] * TT + (tile * (L * R * TT) + lane % TT)[None, :]
        hs = tl.load(gh + at, mask=(a < Q)[:, None] & (tile < tiles)[None, :], other=0.0)  # (BQ, TX)
        here = (t < T)[:, None] & live[None, :]
        if WANT_W:
            xs = tl.load(
                x + g * x_batch + t[:, None] * x_token + col[None, :],
                mask=here,
                other=0.0,
                eviction_policy="evict_first",
            )
            acc = _dot(hs, xs, acc, PREC, UPCAST)
        if WANT_X:
            out = _dot(tl.trans(hs), rs, tl.zeros((TX, BP), tl.float32), PREC, UPCAST)
            tl.store(
                gx + (g * T + t)[:, None] * n + col[None, :], out.to(gx.dtype.element_ty), mask=here,
                eviction_policy="evict_first",
            )  # fmt: skip
    if WANT_W:
        sums = partial + walker.to(tl.int64) * batches * K * Q * P + block
        tl.store(sums + a[:, None] * P + b[None, :], acc, mask=keep)


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
