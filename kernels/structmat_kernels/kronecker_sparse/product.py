"""Triton kernels for products with a Kronecker-sparse factor: three ways for three regimes.

All take x (G, tokens, n) with any batch and token strides, blocks (G, a, d, q, p) with any strides (so that the
transposed product is the same kernel with q and p exchanged) and write y (G, tokens, m), contiguous. n and m may be
smaller than a p d and a q d: missing inputs are zeros, and outputs from m on are dropped.

Neighbouring programs compute neighbouring columns of the same tokens: pieces of 32 bytes that share a DRAM burst are
asked for together.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.dots import dot


@triton.jit
def lanes(
    x_ptr, w_ptr, y_ptr, tokens, m, a, d, x_batch, x_token, w_batch, w_a, w_d, w_q, w_p,
    P: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Multiply-adds on the CUDA cores, for tiny blocks: a program has BD neighbouring D of one A, and BT tokens."""
    groups = tl.cdiv(d, BD)
    col = tl.program_id(0) % (a * groups)
    g = tl.program_id(1).to(tl.int64)
    A = col // groups
    D = (col % groups) * BD + tl.arange(0, BD)
    t = (tl.program_id(0) // (a * groups)).to(tl.int64) * BT + tl.arange(0, BT)
    live = d > D
    keep = (t < tokens)[:, None] & live[None, :]
    x_ptrs = x_ptr + g * x_batch + t[:, None] * x_token + (A * P * d + D)[None, :]
    y_ptrs = y_ptr + (g * tokens + t)[:, None] * m + (A * Q * d + D)[None, :]
    w_ptrs = w_ptr + g * w_batch + A * w_a + D * w_d
    xs = ()
    for b in tl.static_range(P):
        xs = xs + (tl.load(x_ptrs + b * d, mask=keep, other=0.0),)  # noqa: RUF005 (not Python)
    for o in tl.static_range(Q):
        acc = tl.zeros((BT, BD), tl.float32)
        for b in tl.static_range(P):
            w = tl.load(w_ptrs + o * w_q + b * w_p, mask=live, other=0.0).to(tl.float32)
            acc = tl.fma(xs[b].to(tl.float32), tl.broadcast_to(w[None, :], (BT, BD)), acc)
        tl.store(y_ptrs + o * d, acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def decode(local, A0, D0, a, d, limit, S: tl.constexpr, SA: tl.constexpr, SD: tl.constexpr, WHOLE: tl.constexpr):
    """Position ``local`` of a tile of SA values of A, S of b (or o) and SD of D: A, b, D, offset in the row, live."""
    A = A0 + local // (S * SD)
    b = (local // SD) % S
    D = D0 + local % SD
    if WHOLE:  # SD = d: neighbours stay neighbours, and limit <= a S d bounds A, so that accesses are seen to be wide
        offset = A0 * (S * SD) + local
        live = (local < SA * S * SD) & (offset < limit)
    else:
        offset = A * S * d + b * d + D
        live = (local < SA * S * SD) & (a > A) & (d > D) & (offset < limit)
    return A, b, D, offset, live


@triton.jit
def tile(
    x_ptr, w_ptr, y_ptr, tokens, n, m, a, d, steps, x_batch, x_token, w_batch, w_a, w_d, w_q, w_p,
    P: tl.constexpr, Q: tl.constexpr, SA: tl.constexpr, SD: tl.constexpr, WHOLE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Matrix units on small blocks, gathered into a dense tile (zero where A or D differ), and on dense blocks (d = 1).

    The zeros cost arithmetic that is free: 64-wide tiles are 2 * 64 operations for 4 bytes of traffic, where the
    machine does 250. A value that is not finite spreads to the outputs of its tile.
    """
    CHUNKS: tl.constexpr = (SA * P * SD + BK - 1) // BK
    TILES: tl.constexpr = (SA * Q * SD + BN - 1) // BN
    groups = tl.cdiv(d, SD)
    cols = tl.cdiv(a, SA) * groups * TILES
    col = tl.program_id(0) % cols
    g = tl.program_id(1).to(tl.int64)
    A0 = col // TILES // groups * SA
    D0 = col // TILES % groups * SD
    iA, io, iD, i_off, i_live = decode((col % TILES) * BN + tl.arange(0, BN), A0, D0, a, d, m, Q, SA, SD, WHOLE)
    jA, jb, jD, j_off, j_live = decode(tl.arange(0, BK), A0, D0, a, d, n, P, SA, SD, WHOLE)
    w_ptrs = w_ptr + g * w_batch + (iA * w_a + iD * w_d + io * w_q)[None, :]
    if CHUNKS == 1:  # the weights stay, tokens pass by
        same = (iA[None, :] == jA[:, None]) & (iD[None, :] == jD[:, None]) & i_live[None, :] & j_live[:, None]
        w = tl.load(w_ptrs + (jb * w_p)[:, None], mask=same, other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        first = (tl.program_id(0) // cols).to(tl.int64) * steps * BT
        for step in range(steps):
            t = first + step * BT + tl.arange(0, BT)
            x_ptrs = x_ptr + g * x_batch + t[:, None] * x_token + j_off[None, :]
            x = tl.load(x_ptrs, mask=(t < tokens)[:, None] & j_live[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            acc = dot(x, w, tl.zeros((BT, BN), tl.float32), PRECISION)
            y_ptrs = y_ptr + (g * tokens + t)[:, None] * m + i_off[None, :]
            tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & i_live[None, :])
    else:
        t = (tl.program_id(0) // cols).to(tl.int64) * BT + tl.arange(0, BT)
        acc = tl.zeros((BT, BN), tl.float32)
        x_ptrs = x_ptr + g * x_batch + t[:, None] * x_token
        for chunk in range(CHUNKS):
            jA, jb, jD, j_off, j_live = decode(chunk * BK + tl.arange(0, BK), A0, D0, a, d, n, P, SA, SD, WHOLE)
            same = i_live[None, :] & j_live[:, None]
            if SA * SD > 1:
                same = same & (iA[None, :] == jA[:, None]) & (iD[None, :] == jD[:, None])
            x = tl.load(x_ptrs + j_off[None, :], mask=(t < tokens)[:, None] & j_live[None, :], other=0.0)
            w = tl.load(w_ptrs + (jb * w_p)[:, None], mask=same, other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = dot(x, w, acc, PRECISION)
        y_ptrs = y_ptr + (g * tokens + t)[:, None] * m + i_off[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & i_live[None, :])


@triton.jit
def batched(
    x_ptr, w_ptr, y_ptr, tokens, n, m, a, d, x_batch, x_token, w_batch, w_a, w_d, w_q, w_p,
    P: tl.constexpr, Q: tl.constexpr, SD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Larger blocks with d > 1: SD neighbouring D are the batch of a three-dimensional product."""
    TILES: tl.constexpr = (Q + BN - 1) // BN
    groups = tl.cdiv(d, SD)
    cols = a * groups * TILES
    col = tl.program_id(0) % cols
    g = tl.program_id(1).to(tl.int64)
    A = col // TILES // groups
    D = col // TILES % groups * SD + tl.arange(0, SD)
    o = (col % TILES) * BN + tl.arange(0, BN)
    t = (tl.program_id(0) // cols).to(tl.int64) * BT + tl.arange(0, BT)
    x_ptrs = x_ptr + g * x_batch + t[:, None, None] * x_token
    w_ptrs = w_ptr + g * w_batch + A * w_a + D[:, None, None] * w_d + o[None, None, :] * w_q
    acc = tl.zeros((SD, BT, BN), tl.float32)
    for chunk in range(0, P, BK):
        b = chunk + tl.arange(0, BK)
        x_off = A * P * d + b[:, None] * d + D[None, :]
        x_live = (b < P)[:, None] & (d > D)[None, :] & (x_off < n)
        x = tl.load(x_ptrs + x_off[None, :, :], mask=(t < tokens)[:, None, None] & x_live[None, :, :], other=0.0)
        w_live = (d > D)[:, None, None] & (b < P)[None, :, None] & (o < Q)[None, None, :]
        w = tl.load(w_ptrs + b[None, :, None] * w_p, mask=w_live, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = dot(tl.permute(x, (2, 0, 1)), w, acc, PRECISION)
    y_off = A * Q * d + o[:, None] * d + D[None, :]
    y_live = (o < Q)[:, None] & (d > D)[None, :] & (y_off < m)
    y = tl.permute(acc.to(y_ptr.dtype.element_ty), (1, 2, 0))
    y_ptrs = y_ptr + (g * tokens + t)[:, None, None] * m + y_off[None, :, :]
    tl.store(y_ptrs, y, mask=(t < tokens)[:, None, None] & y_live[None, :, :])
