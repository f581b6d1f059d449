"""Triton kernels of the Monarch product.

The hidden vector h[t l + j] (t < r, j < l) lies in a scratch tensor, the *hidden layout* ``[token tile][j][t][token]``:
tokens are fastest within a tile, so that either factor reads and writes whole lines although the permutation between
the factors separates neighbouring entries. Of the strided index u l + j of the outputs a program owns JB adjacent j: 16
of them are one 32-byte sector.
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.dots import dot


@triton.jit
def _dot(a, b, acc, PREC: tl.constexpr, UPCAST: tl.constexpr):
    # The interpreter multiplies with NumPy, which knows no bfloat16.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return dot(a, b, acc, PREC)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z < 0.0, 0.0, z)  # keeps NaN
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _columns(u0, j0, nrows, L: tl.constexpr, S: tl.constexpr, BU: tl.constexpr, JB: tl.constexpr):
    """The outputs u l + j for u from u0 and j from j0 on, and which of them exist."""
    e = tl.arange(0, BU * JB)
    u, j = u0 + e // JB, j0 + e % JB
    # With all left blocks at hand the columns are adjacent; said so, the stores are wide.
    # So are masks without conditions that hold anyway.
    col = u0 * L + e if JB == L else u * L + j
    keep = col < nrows
    if L % JB != 0:
        keep &= j < L
    if JB != L and S % BU != 0:
        keep &= u < S
    return col, keep


@triton.jit
def _load_bias(
    bias, u0, j0, nrows, L: tl.constexpr, S: tl.constexpr, HAS_BIAS: tl.constexpr, BU: tl.constexpr, JB: tl.constexpr
):
    """The bias of some outputs as (BU JB,), zeros where there is none.

    Before the loop over tokens: in it, the compiler would keep as many copies in shared memory as tiles are in flight.
    """
    if HAS_BIAS:
        col, keep = _columns(u0, j0, nrows, L, S, BU, JB)
        return tl.load(bias + col, mask=keep, other=0.0)
    else:
        return tl.zeros((BU * JB,), tl.float32)


@triton.jit
def _store_outputs(
    y, bs, z, t, u0, j0, T, nrows, L: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TT: tl.constexpr, BU: tl.constexpr, JB: tl.constexpr,
):  # fmt: skip
    """Write ``act(z + bias)`` for z (TT, BU, JB), whose columns are u l + j for u from u0 and j from j0 on."""
    col, keep = _columns(u0, j0, nrows, L, S, BU, JB)
    z = tl.reshape(z, (TT, BU * JB)).to(tl.float32)
    if HAS_BIAS:
        z += bs.to(tl.float32)[None, :]
    z = _activate(z, ACT).to(y.dtype.element_ty)
    tl.store(y + t[:, None] * nrows + col[None, :], z, mask=(t < T)[:, None] & keep[None, :])


@triton.jit
def small(
    x, left, right, bias, y, T, n, nrows, x_batch, x_token,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BU: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A few tokens: one program a left block and token, in ordinary arithmetic, TT tokens one after the other.

    For decoding, where the time is that of reading the factors once and of one launch.
    """
    j = tl.program_id(0)
    g = tl.program_id(2).to(tl.int64)
    x += g * x_batch
    right += g * K * Q * P
    left += g * L * S * R
    b = tl.arange(0, BP)
    u = tl.arange(0, BU)
    t = tl.program_id(1).to(tl.int64) * TT + tl.arange(0, TT)
    acc = tl.zeros((TT, BU), tl.float32)
    for t0 in tl.static_range(0, BR, BI):
        d = t0 + tl.arange(0, BI)
        i = (d * L + j) // Q
        a = (d * L + j) % Q
        col = i[:, None] * P + b[None, :]
        live = (d < R)[:, None] & (b < P)[None, :]
        rs = tl.load(right + (i * Q + a)[:, None] * P + b[None, :], mask=live, other=0.0).to(tl.float32)
        ls = tl.load(
            left + (j * S + u)[:, None] * R + d[None, :], mask=(u < S)[:, None] & (d < R)[None, :], other=0.0
        ).to(tl.float32)  # (BU, BI)
        xs = tl.load(
            x + t[:, None, None] * x_token + col[None, :, :],
            mask=(t < T)[:, None, None] & (live & (col < n))[None, :, :],
            other=0.0,
        ).to(tl.float32)
        h = tl.sum(xs * rs[None, :, :], 2).to(left.dtype.element_ty).to(tl.float32)  # (TT, BI)
        acc += tl.sum(h[:, None, :] * ls[None, :, :], 2)
    out = u * L + j
    keep = (u < S) & (out < nrows)
    if HAS_BIAS:
        acc += tl.load(bias + g * nrows + out, mask=keep, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACT)
    at = y + g * T * nrows + t[:, None] * nrows + out[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(t < T)[:, None] & keep[None, :])


@triton.jit
def _right_tile(
    x, right, h, T, n, tiles, x_token, span, slot, i, a,
    L: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TT: tl.constexpr, TX: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
    PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows a of right block i on the TX tokens of a span, into TX / TT tiles of the hidden layout from slot on."""
    lane = tl.arange(0, TX)
    t = span * TX + lane
    acc = tl.zeros((BA, TX), tl.float32)
    for b0 in tl.range(0, P, BP, num_stages=STAGES):
        b = b0 + tl.arange(0, BP)
        col = i * P + b
        xs = tl.load(
            x + t[:, None] * x_token + col[None, :],
            mask=(t < T)[:, None] & ((b < P) & (col < n))[None, :],
            other=0.0,
        )
        rs = tl.load(right + (i * Q + a[:, None]) * P + b[None, :], mask=(a < Q)[:, None] & (b < P)[None, :], other=0.0)
        acc = _dot(rs, tl.trans(xs), acc, PREC, UPCAST)
    hid = i * Q + a
    row = (hid % L) * R + hid // L
    tile = slot + lane // TT
    at = h + row[:, None] * TT + (tile * (L * R * TT) + lane % TT)[None, :]
    tl.store(at, acc.to(h.dtype.element_ty), mask=(a < Q)[:, None] & (tile < tiles)[None, :])


@triton.jit
def right_stage(
    x, right, h, T, n, tiles, x_batch, x_token,
    L: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TT: tl.constexpr, TX: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
    PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``h = right x`` into the hidden layout: one program a right block (BA of its rows) and span of TX tokens."""
    chunks: tl.constexpr = (Q + BA - 1) // BA
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    span = (pid // (K * chunks)).to(tl.int64)
    _right_tile(
        x + g * x_batch, right + g * K * Q * P, h + g * tiles * L * R * TT, T, n, tiles, x_token, span,
        span * (TX // TT), pid // chunks % K, (pid % chunks) * BA + tl.arange(0, BA),
        L, R, Q, P, TT, TX, BA, BP, STAGES, PREC, UPCAST,
    )  # fmt: skip


@triton.jit
def _left_block(
    h, left, j, u, lane, L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, BU: tl.constexpr,
    BR: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BU, TT) outputs of left block j before the epilogue."""
    acc = tl.zeros((BU, TT), tl.float32)
    for d0 in tl.range(0, R, BR, num_stages=STAGES):
        d = d0 + tl.arange(0, BR)
        hs = tl.load(
            h + (j * R + d)[:, None] * TT + lane[None, :], mask=(d < R)[:, None], other=0.0, cache_modifier=".cg"
        )
        ls = tl.load(left + (j * S + u)[:, None] * R + d[None, :], mask=(u < S)[:, None] & (d < R)[None, :], other=0.0)
        acc = _dot(ls, hs, acc, PREC, UPCAST)
    return acc


@triton.jit
def _left_blocks(
    h, left, bias, j, STEP: tl.constexpr, COUNT: tl.constexpr, u, lane, nrows, L: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, TT: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, OUT: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Left blocks j, j + STEP, ... side by side: (BU, TT, 2, ..., 2), the lowest bit of the block last."""
    if COUNT == 1:
        # Past the last block: the last one again, not stored.
        j = tl.minimum(j, L - 1)
        z = _left_block(h, left, j, u, lane, L, S, R, TT, BU, BR, STAGES, PREC, UPCAST)
        if HAS_BIAS:
            out = u * L + j
            z += tl.load(bias + out, mask=(u < S) & (out < nrows), other=0.0).to(tl.float32)[:, None]
        return _activate(z, ACT).to(OUT)
    else:
        half: tl.constexpr = COUNT // 2
        a = _left_blocks(
            h, left, bias, j, 2 * STEP, half, u, lane, nrows, L, S, R, TT, BU, BR, STAGES, ACT, HAS_BIAS, OUT, PREC,
            UPCAST,
        )  # fmt: skip
        b = _left_blocks(
            h, left, bias, j + STEP, 2 * STEP, half, u, lane, nrows, L, S, R, TT, BU, BR, STAGES, ACT, HAS_BIAS, OUT,
            PREC, UPCAST,
        )  # fmt: skip
        return tl.join(a, b)


@triton.jit
def _left_tile(
    h, left, bias, y, T, nrows, tile, j0, u0,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    TT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr, BATCHED: tl.constexpr,
    STAGES: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows u of left blocks j0, ..., j0 + JB - 1 on a token tile whose hidden entries begin at h.

    BATCHED: one three-dimensional product (the older matrix instructions, pipelined loads); otherwise JB products
    (wgmma where the tile is large enough), interleaved by joins.
    """
    j = j0 + tl.arange(0, JB)
    u = u0 + tl.arange(0, BU)
    lane = tl.arange(0, TT)
    t = tile * TT + lane
    if BATCHED:
        acc = tl.zeros((JB, BU, TT), tl.float32)
        for d0 in tl.range(0, R, BR, num_stages=STAGES):
            d = d0 + tl.arange(0, BR)
            hs = tl.load(
                h + (j[:, None, None] * R + d[None, :, None]) * TT + lane[None, None, :],
                mask=(j < L)[:, None, None] & (d < R)[None, :, None],
                other=0.0,
                cache_modifier=".cg",
            )  # (JB, BR, TT)
            ls = tl.load(
                left + (j[:, None, None] * S + u[None, :, None]) * R + d[None, None, :],
                mask=(j < L)[:, None, None] & (u < S)[None, :, None] & (d < R)[None, None, :],
                other=0.0,
            )  # (JB, BU, BR)
            acc = _dot(ls, hs, acc, PREC, UPCAST)
        z = tl.permute(acc, (2, 1, 0))
        bs = _load_bias(bias, u0, j0, nrows, L, S, HAS_BIAS, BU, JB)
        _store_outputs(y, bs, z, t, u0, j0, T, nrows, L, S, ACT, HAS_BIAS, TT, BU, JB)
    else:
        z = _left_blocks(
            h, left, bias, j0, 1, JB, u, lane, nrows, L, S, R, TT, BU, BR, STAGES, ACT, HAS_BIAS, y.dtype.element_ty,
            PREC, UPCAST,
        )  # fmt: skip
        z = tl.permute(tl.reshape(z, (BU, TT, JB)), (1, 0, 2))
        _store_outputs(y, bias, z, t, u0, j0, T, nrows, L, S, "", False, TT, BU, JB)


@triton.jit
def left_stage(
    h, left, bias, y, T, nrows, tiles,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    TT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr, BATCHED: tl.constexpr,
    STAGES: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``y = left h`` out of the hidden layout: one program JB left blocks, BU of their rows, and a token tile."""
    groups: tl.constexpr = (L + JB - 1) // JB
    chunks: tl.constexpr = (S + BU - 1) // BU
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    tile = (pid // (groups * chunks)).to(tl.int64)
    _left_tile(
        h + (g * tiles + tile) * L * R * TT, left + g * L * S * R, bias + g * nrows, y + g * T * nrows, T, nrows, tile,
        pid // chunks % groups * JB, (pid % chunks) * BU,
        L, S, R, TT, JB, BU, BR, BATCHED, STAGES, ACT, HAS_BIAS, PREC, UPCAST,
    )  # fmt: skip
