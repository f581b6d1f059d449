"""Triton kernels of the gradients for blocks that are larger than a tile.

Each is a product of matrices whose rows or columns lie where the permutation of the Monarch matrix puts them: tokens
are the fastest dimension of the hidden entries, [token tile][left block][entry][token].
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.monarch.kernel import _dot


@triton.jit
def hidden_gradient(
    gyj, left, gh, T, tiles,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``gh = left^T gy`` into the hidden layout, of gy by left blocks (l, T, s): BR entries of TX tokens a program."""
    chunks: tl.constexpr = (R + BR - 1) // BR
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    j = pid // chunks % L
    d = pid % chunks * BR + tl.arange(0, BR)
    t = (pid // (chunks * L)).to(tl.int64) * TX + tl.arange(0, TX)
    gyj += (g * L + j) * T * S
    left += (g * L + j) * S * R
    acc = tl.zeros((BR, TX), tl.float32)
    for u0 in tl.range(0, S, BK, num_stages=STAGES):
        u = u0 + tl.arange(0, BK)
        gs = tl.load(gyj + t[:, None] * S + u[None, :], mask=(t < T)[:, None] & (u < S)[None, :], other=0.0)
        ls = tl.load(left + u[:, None] * R + d[None, :], mask=(u < S)[:, None] & (d < R)[None, :], other=0.0)
        acc = _dot(tl.trans(ls), tl.trans(gs), acc, PREC, UPCAST)
    tile = t // TT
    at = gh + ((g * tiles + tile) * (L * R * TT) + t % TT)[None, :] + ((j * R + d) * TT)[:, None]
    tl.store(at, acc.to(gh.dtype.element_ty), mask=(d < R)[:, None] & (tile < tiles)[None, :])


@triton.jit
def input_gradient(
    gh, right, gx, T, n, tiles,
    L: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, TT: tl.constexpr,
    TX: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``gx = right^T gh``: BP inputs of one right block for TX tokens a program."""
    chunks: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    i = pid // chunks % K
    b = pid % chunks * BP + tl.arange(0, BP)
    t = (pid // (chunks * K)).to(tl.int64) * TX + tl.arange(0, TX)
    tile = t // TT
    token = (g * tiles + tile) * (L * R * TT) + t % TT
    right += (g * K + i) * Q * P
    acc = tl.zeros((TX, BP), tl.float32)
    for a0 in tl.range(0, Q, BK, num_stages=STAGES):
        a = a0 + tl.arange(0, BK)
        hid = i * Q + a
        row = (hid % L * R + hid // L) * TT
        hs = tl.load(gh + row[:, None] + token[None, :], mask=(a < Q)[:, None] & (tile < tiles)[None, :], other=0.0)
        rs = tl.load(right + a[:, None] * P + b[None, :], mask=(a < Q)[:, None] & (b < P)[None, :], other=0.0)
        acc = _dot(tl.trans(hs), rs, acc, PREC, UPCAST)
    col = i * P + b
    live = (b < P) & (col < n)
    tl.store(
        gx + (g * T + t)[:, None] * n + col[None, :],
        acc.to(gx.dtype.element_ty),
        mask=(t < T)[:, None] & live[None, :],
    )


@triton.jit
def left_sums(
    gyj, h, partial, T, tiles, walkers, batches,
    L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, TT: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of ``gy h^T``: BS x BR entries of left block j over every ``walkers``-th tile of tokens."""
    rows: tl.constexpr = (S + BS - 1) // BS
    cols: tl.constexpr = (R + BR - 1) // BR
    pid = tl.program_id(0)
    walker = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    j = pid // (rows * cols)
    u = pid // cols % rows * BS + tl.arange(0, BS)
    d = pid % cols * BR + tl.arange(0, BR)
    lane = tl.arange(0, TT)
    gyj += (g * L + j) * T * S
    acc = tl.zeros((BS, BR), tl.float32)
    for tile in tl.range(walker, tiles, walkers, num_stages=STAGES):
        t = tile * TT + lane.to(tl.int64)
        gs = tl.load(gyj + t[:, None] * S + u[None, :], mask=(t < T)[:, None] & (u < S)[None, :], other=0.0)
        at = h + (((g * tiles + tile) * L + j) * R + d[:, None]) * TT + lane[None, :]
        hs = tl.load(at, mask=(d < R)[:, None], other=0.0)
        acc = _dot(tl.trans(gs), tl.trans(hs), acc, PREC, UPCAST)
    at = partial + ((walker.to(tl.int64) * batches + g) * L + j) * S * R + u[:, None] * R + d[None, :]
    tl.store(at, acc, mask=(u < S)[:, None] & (d < R)[None, :])


@triton.jit
def right_sums(
    gh, x, partial, T, n, tiles, walkers, batches, x_batch, x_token,
    L: tl.constexpr, R: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, TT: tl.constexpr,
    BQ: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of ``gh x^T``: BQ x BP entries of right block i over every ``walkers``-th tile of tokens."""
    rows: tl.constexpr = (Q + BQ - 1) // BQ
    cols: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    walker = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    i = pid // (rows * cols)
    a = pid // cols % rows * BQ + tl.arange(0, BQ)
    b = pid % cols * BP + tl.arange(0, BP)
    lane = tl.arange(0, TT)
    hid = i * Q + a
    row = (hid % L * R + hid // L) * TT
    col = i * P + b
    live = (b < P) & (col < n)
    x += g * x_batch
    acc = tl.zeros((BQ, BP), tl.float32)
    for tile in tl.range(walker, tiles, walkers, num_stages=STAGES):
        t = tile * TT + lane.to(tl.int64)
        gs = tl.load(
            gh + (g * tiles + tile) * (L * R * TT) + row[:, None] + lane[None, :], mask=(a < Q)[:, None], other=0.0
        )
        xs = tl.load(x + t[:, None] * x_token + col[None, :], mask=(t < T)[:, None] & live[None, :], other=0.0)
        acc = _dot(gs, xs, acc, PREC, UPCAST)
    at = partial + ((walker.to(tl.int64) * batches + g) * K + i) * Q * P + a[:, None] * P + b[None, :]
    tl.store(at, acc, mask=(a < Q)[:, None] & (b < P)[None, :])
