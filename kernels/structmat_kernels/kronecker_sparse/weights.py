"""Triton kernels for the gradient of the blocks.

``dW[A, D, o, b] = sum_t g[t, (A q + o) d + D] x[t, (A p + b) d + D]``. The tokens are cut into splits, each summed in
float32 by one program into its own partial result (out: splits, G, a, d, q, p, contiguous); a sum over the splits
follows. No atomics: equal inputs give equal bits.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.dots import dot
from structmat_kernels.kronecker_sparse.product import decode


@triton.jit
def lanes(
    g_ptr, x_ptr, out_ptr, tokens, a, d, steps, g_batch, g_token, x_batch, x_token,
    P: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Multiply-adds on the CUDA cores, for tiny blocks."""
    groups = tl.cdiv(d, BD)
    col = tl.program_id(0) % (a * groups)
    split = tl.program_id(0) // (a * groups)
    batch = tl.program_id(1).to(tl.int64)
    A = col // groups
    D = (col % groups) * BD + tl.arange(0, BD)
    live = d > D
    first = split.to(tl.int64) * steps * BT
    accs = ()
    for _i in tl.static_range(Q * P):
        accs = accs + (tl.zeros((BT, BD), tl.float32),)  # noqa: RUF005
    for step in range(steps):
        t = first + step * BT + tl.arange(0, BT)
        keep = (t < tokens)[:, None] & live[None, :]
        x_ptrs = x_ptr + batch * x_batch + t[:, None] * x_token + (A * P * d + D)[None, :]
        g_ptrs = g_ptr + batch * g_batch + t[:, None] * g_token + (A * Q * d + D)[None, :]
        xs = ()
        for b in tl.static_range(P):
            xs = xs + (tl.load(x_ptrs + b * d, mask=keep, other=0.0).to(tl.float32),)  # noqa: RUF005
        new = ()
        for o in tl.static_range(Q):
            g = tl.load(g_ptrs + o * d, mask=keep, other=0.0).to(tl.float32)
            for b in tl.static_range(P):
                new = new + (tl.fma(g, xs[b], accs[o * P + b]),)  # noqa: RUF005
        accs = new
    where = out_ptr + (split * tl.num_programs(1) + batch) * (a * d * Q * P) + (A * d + D) * (Q * P)
    for o in tl.static_range(Q):
        for b in tl.static_range(P):
            value = tl.sum(accs[o * P + b], 0)
            tl.store(where + o * P + b, value.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def tile(
    g_ptr, x_ptr, out_ptr, tokens, n, m, a, d, steps, g_batch, g_token, x_batch, x_token,
    P: tl.constexpr, Q: tl.constexpr, SA: tl.constexpr, SD: tl.constexpr, WHOLE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Matrix units: a dense tile of g^T x, of which the entries with equal A and D are kept."""
    TILES_I: tl.constexpr = (SA * Q * SD + BN - 1) // BN
    TILES_J: tl.constexpr = (SA * P * SD + BK - 1) // BK
    groups = tl.cdiv(d, SD)
    cols = tl.cdiv(a, SA) * groups * TILES_I * TILES_J
    col = tl.program_id(0) % cols
    split = tl.program_id(0) // cols
    batch = tl.program_id(1).to(tl.int64)
    part = col % (TILES_I * TILES_J)
    A0 = col // (TILES_I * TILES_J) // groups * SA
    D0 = col // (TILES_I * TILES_J) % groups * SD
    iA, io, iD, i_off, i_live = decode((part // TILES_J) * BN + tl.arange(0, BN), A0, D0, a, d, m, Q, SA, SD, WHOLE)
    jA, jb, jD, j_off, j_live = decode((part % TILES_J) * BK + tl.arange(0, BK), A0, D0, a, d, n, P, SA, SD, WHOLE)
    acc = tl.zeros((BN, BK), tl.float32)
    first = split.to(tl.int64) * steps * BT
    for step in range(steps):
        t = first + step * BT + tl.arange(0, BT)
        g_ptrs = g_ptr + batch * g_batch + t[:, None] * g_token + i_off[None, :]
        x_ptrs = x_ptr + batch * x_batch + t[:, None] * x_token + j_off[None, :]
        g = tl.load(g_ptrs, mask=(t < tokens)[:, None] & i_live[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=(t < tokens)[:, None] & j_live[None, :], other=0.0)
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = dot(tl.trans(g), x, acc, PRECISION)
    # Inputs beyond n and outputs beyond m were read as zeros: their entries exist, and are written as zeros.
    iB = (part // TILES_J) * BN + tl.arange(0, BN) < SA * Q * SD
    jB = (part % TILES_J) * BK + tl.arange(0, BK) < SA * P * SD
    same = (
        (iA[:, None] == jA[None, :]) & (iD[:, None] == jD[None, :]) & ((iA < a) & (iD < d) & iB)[:, None] & jB[None, :]
    )
    where = out_ptr + (split * tl.num_programs(1) + batch) * (a * d * Q * P)
    where += (((iA * d + iD) * Q + io) * P)[:, None] + jb[None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=same)


@triton.jit
def batched(
    g_ptr, x_ptr, out_ptr, tokens, n, m, a, d, steps, g_batch, g_token, x_batch, x_token,
    P: tl.constexpr, Q: tl.constexpr, SD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """SD neighbouring D as the batch of a three-dimensional product."""
    TILES_I: tl.constexpr = (Q + BN - 1) // BN
    TILES_J: tl.constexpr = (P + BK - 1) // BK
    groups = tl.cdiv(d, SD)
    cols = a * groups * TILES_I * TILES_J
    col = tl.program_id(0) % cols
    split = tl.program_id(0) // cols
    batch = tl.program_id(1).to(tl.int64)
    part = col % (TILES_I * TILES_J)
    A = col // (TILES_I * TILES_J) // groups
    D = col // (TILES_I * TILES_J) % groups * SD + tl.arange(0, SD)
    o = (part // TILES_J) * BN + tl.arange(0, BN)
    b = (part % TILES_J) * BK + tl.arange(0, BK)
    g_off = A * Q * d + o[:, None] * d + D[None, :]
    x_off = A * P * d + b[:, None] * d + D[None, :]
    g_live = (o < Q)[:, None] & (d > D)[None, :] & (g_off < m)
    x_live = (b < P)[:, None] & (d > D)[None, :] & (x_off < n)
    acc = tl.zeros((SD, BN, BK), tl.float32)
    first = split.to(tl.int64) * steps * BT
    for step in range(steps):
        t = first + step * BT + tl.arange(0, BT)
        g_ptrs = g_ptr + batch * g_batch + t[:, None, None] * g_token + g_off[None, :, :]
        x_ptrs = x_ptr + batch * x_batch + t[:, None, None] * x_token + x_off[None, :, :]
        g = tl.load(g_ptrs, mask=(t < tokens)[:, None, None] & g_live[None, :, :], other=0.0)
        x = tl.load(x_ptrs, mask=(t < tokens)[:, None, None] & x_live[None, :, :], other=0.0)
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = dot(tl.permute(g, (2, 1, 0)), tl.permute(x, (2, 0, 1)), acc, PRECISION)
    where = out_ptr + (split * tl.num_programs(1) + batch) * (a * d * Q * P)
    where += ((A * d + D)[:, None, None] * Q + o[None, :, None]) * P + b[None, None, :]
    mask = (d > D)[:, None, None] & (o < Q)[None, :, None] & (b < P)[None, None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=mask)
