"""Triton kernels that keep their blocks on chip: a few programs, each of which walks over many token tiles.

Reading the factors again for each tile of 16 tokens would cost more L2 traffic than the tokens themselves.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.monarch.kernel import _dot, _load_bias, _store_outputs


@triton.jit
def resident(
    x, left, right, bias, y, T, n, nrows, tiles, walkers, x_batch, x_token,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TT: tl.constexpr, JB: tl.constexpr, BI: tl.constexpr, BP: tl.constexpr, BU: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both factors in one program: JB of the l left blocks and the hidden entries t l + j that they read.

    For l dividing q, or JB dividing both: then, for each t, these entries are JB adjacent rows of one right block.
    Hidden entries never leave the chip; x is read once for each group of JB left blocks with the same right blocks.
    """
    groups: tl.constexpr = (L + JB - 1) // JB
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    j0 = (pid % groups) * JB
    j = j0 + tl.arange(0, JB)
    u = tl.arange(0, BU)
    b = tl.arange(0, BP)
    d = tl.arange(0, BI)
    lane = tl.arange(0, TT)
    x += g * x_batch
    right += g * K * Q * P
    left += g * L * S * R
    y += g * T * nrows
    i = (d * L + j0) // Q
    a = ((d * L + j0) % Q)[:, None] + tl.arange(0, JB)[None, :]
    rs = tl.load(
        right + (i[:, None, None] * Q + a[:, None, :]) * P + b[None, :, None],
        mask=(d < R)[:, None, None] & (j < L)[None, None, :] & (b < P)[None, :, None],
        other=0.0,
    )  # (BI, BP, JB)
    ls = tl.load(
        left + (j[:, None, None] * S + u[None, None, :]) * R + d[None, :, None],
        mask=(j < L)[:, None, None] & (u < S)[None, None, :] & (d < R)[None, :, None],
        other=0.0,
    )  # (JB, BI, BU)
    col = i[:, None] * P + b[None, :]  # (BI, BP)
    live = (d < R)[:, None] & (b < P)[None, :] & (col < n)
    bs = _load_bias(bias + g * nrows, 0, j0, nrows, L, S, HAS_BIAS, BU, JB)
    for tile in tl.range(pid // groups, tiles, walkers, num_stages=STAGES):
        t = tile * TT + lane.to(tl.int64)
        xs = tl.load(
            x + t[None, :, None] * x_token + col[:, None, :], mask=(t < T)[None, :, None] & live[:, None, :], other=0.0
        )  # (BI, TT, BP)
        h = _dot(xs, rs, tl.zeros((BI, TT, JB), tl.float32), PREC, UPCAST).to(left.dtype.element_ty)
        z = _dot(tl.permute(h, (2, 1, 0)), ls, tl.zeros((JB, TT, BU), tl.float32), PREC, UPCAST)
        _store_outputs(y, bs, tl.permute(z, (1, 2, 0)), t, 0, j0, T, nrows, L, S, ACT, HAS_BIAS, TT, BU, JB)


@triton.jit
def resident_left(
    h, left, bias, y, T, nrows, tiles, walkers,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    TT: tl.constexpr, JB: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The left stage of JB blocks and BU of their rows, with the blocks in shared memory."""
    groups: tl.constexpr = (L + JB - 1) // JB
    chunks: tl.constexpr = (S + BU - 1) // BU
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    j0 = pid // chunks % groups * JB
    u0 = (pid % chunks) * BU
    j = j0 + tl.arange(0, JB)
    u = u0 + tl.arange(0, BU)
    d = tl.arange(0, BR)
    lane = tl.arange(0, TT)
    left += g * L * S * R
    y += g * T * nrows
    ls = tl.load(
        left + (j[:, None, None] * S + u[None, :, None]) * R + d[None, None, :],
        mask=(j < L)[:, None, None] & (u < S)[None, :, None] & (d < R)[None, None, :],
        other=0.0,
    )  # (JB, BU, BR)
    bs = _load_bias(bias + g * nrows, u0, j0, nrows, L, S, HAS_BIAS, BU, JB)
    for tile in tl.range(pid // (groups * chunks), tiles, walkers, num_stages=STAGES):
        t = tile * TT + lane.to(tl.int64)
        hs = tl.load(
            h + (g * tiles + tile) * L * R * TT + (j[:, None, None] * R + d[None, :, None]) * TT + lane[None, None, :],
            mask=(j < L)[:, None, None] & (d < R)[None, :, None],
            other=0.0,
        )  # (JB, BR, TT)
        z = _dot(ls, hs, tl.zeros((JB, BU, TT), tl.float32), PREC, UPCAST)
        _store_outputs(y, bs, tl.permute(z, (2, 1, 0)), t, u0, j0, T, nrows, L, S, ACT, HAS_BIAS, TT, BU, JB)
