"""Triton kernels of the block-sparse product with fused low rank.

Traffic decides the tiles. A program multiplies a tile of tokens with one block row: it reads every block of x that the
row touches, so that a tile of t tokens x b outputs does 2 t b / (2 (t + b)) operations per byte from L2: 28 for b = 32,
51 for 64, 85 for 128 at t = 256. At n = 4096, T = 8192, density 1/8 that is 1.2, 0.67 and 0.40 GB against 0.13 GB from
DRAM, so the L2 is the bound. Programs of one tile of tokens are neighbours: their x (2 MB at t = 256) stays in L2.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (Triton's annotations describe the host, not what is inside a kernel.)
from __future__ import annotations

import triton
import triton.language as tl

from structmat_kernels.dots import dot


@triton.jit
def pack(values, packed, members, nnz, BO: tl.constexpr, BI: tl.constexpr, QO: tl.constexpr, QI: tl.constexpr,
          SIZE: tl.constexpr):  # fmt: skip
    """Super-blocks (QO BO x QI BI) of a super-block's blocks, zeros where there is none; one block a program."""
    place = tl.program_id(0)
    coarse = place // (QO * QI)
    a, b = (place // QI) % QO, place % QI
    member = tl.load(members + place)
    e = tl.arange(0, SIZE)
    group = tl.program_id(1).to(tl.int64)
    source = values + (group * nnz + member) * (BO * BI) + e
    target = packed + (group * (tl.num_programs(0) // (QO * QI)) + coarse) * (QO * BO * QI * BI)
    block = tl.load(source, mask=e < tl.where(member >= 0, BO * BI, 0), other=0)
    tl.store(target + (a * BO + e // BI) * (QI * BI) + b * BI + e % BI, block, mask=e < BO * BI)


@triton.jit
def low_rank(
    x, side, partial, t, counters, tile, part, T, n_in, x_token,
    RANK: tl.constexpr, PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, RP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One of PARTS spans of features of t = x V^T for one tile of tokens; who comes last adds the spans, in order."""
    token = tile.to(tl.int64) * BT + tl.arange(0, BT)
    read = tl.minimum(token, T - 1)
    r = tl.arange(0, RP)
    span = tl.cdiv(tl.cdiv(n_in, PARTS), BK) * BK
    begin = part * span
    end = tl.minimum(begin + span, n_in)
    acc = tl.zeros((BT, RP), tl.float32)
    for start in tl.range(begin, end, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        steps = k[:, None] * RANK if TRANSPOSED else k[:, None]
        place = side + steps + (r[None, :] if TRANSPOSED else r[None, :] * n_in)
        if EVEN and RANK == RP:
            xs = tl.load(x + read[:, None] * x_token + k[None, :])
            vs = tl.load(place)
        else:
            xs = tl.load(x + read[:, None] * x_token + k[None, :], mask=(k < end)[None, :], other=0)
            vs = tl.load(place, mask=(k < end)[:, None] & (r < RANK)[None, :], other=0)
        if UPCAST:
            xs = xs.to(tl.float32)
            vs = vs.to(tl.float32)
        acc = dot(xs, vs, acc, PRECISION)
    cell = tl.arange(0, BT)[:, None] * RP + r[None, :]
    mine = partial + tile.to(tl.int64) * (PARTS * BT * RP) + cell
    tl.store(mine + part * (BT * RP), acc)
    tl.debug_barrier()
    if tl.atomic_add(counters + 2 * tile, 1, sem="acq_rel") == PARTS - 1:
        total = tl.zeros((BT, RP), tl.float32)
        for p in range(PARTS):
            total += tl.load(mine + p * (BT * RP))
        tl.store(t + tile.to(tl.int64) * (BT * RP) + cell, total.to(t.dtype.element_ty))
        tl.debug_barrier()
        tl.atomic_xchg(counters + 2 * tile + 1, 1, sem="release")


@triton.jit
def product(
    x, w, t, lr, side, partial, counters, bias, gamma, y, offsets, index, positions, scale,
    T, n_in, n_out, rows, tiles, x_group, x_token, w_group, t_group, lr_group, bias_group, gamma_group,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, GAMMA: tl.constexpr,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """y = scale gamma x B^T + t U^T + bias for one tile of tokens and one block row (or column, if TRANSPOSED).

    With PARTS, programs of their own make t = x V^T in the same launch, while x is in the L2: they go AHEAD tiles of
    tokens before the block rows that wait for them. A waiting program's t is always made by programs of smaller
    numbers, which the device starts first, so that they finish.
    """
    LD: tl.constexpr = RANK if PARTS == 0 else (RANK + BR - 1) // BR * BR
    pid = tl.program_id(0)
    early = pid - AHEAD * PARTS
    slot = early % (rows + PARTS)
    number = early // (rows + PARTS)
    if PARTS > 0 and ((early < 0) | (slot >= rows)):
        part = tl.where(early < 0, pid % max(PARTS, 1), slot - rows)
        number = tl.where(early < 0, pid // max(PARTS, 1), number + AHEAD)
        if number < tiles:
            low_rank(x, side, partial, t, counters, number, part, T, n_in, x_token,
                     RANK, PARTS, TRANSPOSED, EVEN, BT, BK, LD, STAGES, PRECISION, UPCAST)  # fmt: skip
    else:
        row = slot
        tile = number % tiles
        group = (number // tiles).to(tl.int64)
        token = tile.to(tl.int64) * BT + tl.arange(0, BT)
        read = tl.minimum(token, T - 1)  # rows past the end repeat the last one: they are not stored
        x_rows = x + group * x_group + read[:, None] * x_token
        k = tl.arange(0, BK)
        o = tl.arange(0, BN)
        out = row * HEIGHT + o
        keep = (o < HEIGHT) & (out < n_out)
        w += group * w_group
        first = tl.load(offsets + row)
        last = tl.load(offsets + row + 1)
        acc = tl.zeros((BT, BN), tl.float32)
        STEPS: tl.constexpr = (WIDTH + BK - 1) // BK
        # The next block's place is loaded one step early: loads through a table that is read in the same step would
        # halve the number of tiles in flight.
        column = tl.load(index + first, mask=first < last, other=0)
        position = tl.load(positions + first, mask=first < last, other=0) if TRANSPOSED else first
        for step in tl.range(first * STEPS, last * STEPS, num_stages=STAGES):
            kk = (step % STEPS) * BK + k
            source = column * WIDTH + kk
            w_block = w + position.to(tl.int64) * (WIDTH * HEIGHT)
            following = tl.minimum((step + 1) // STEPS, last - 1)
            column = tl.load(index + following)
            position = tl.load(positions + following) if TRANSPOSED else following
            if TRANSPOSED:
                w_tile = w_block + kk[:, None] * HEIGHT + o[None, :]
            else:
                w_tile = w_block + kk[:, None] + o[None, :] * WIDTH
            if EVEN:
                xs = tl.load(x_rows + source[None, :])
                ws = tl.load(w_tile)
            else:  # both masked: what lies outside may be NaN
                inside = (kk < WIDTH) & (source < n_in)
                xs = tl.load(x_rows + source[None, :], mask=inside[None, :], other=0)
                ws = tl.load(w_tile, mask=inside[:, None] & (o < HEIGHT)[None, :], other=0)
            if UPCAST:
                xs = xs.to(tl.float32)
                ws = ws.to(tl.float32)
            acc = dot(xs, ws, acc, PRECISION)
        acc *= scale
        if GAMMA:
            acc *= tl.load(gamma + group * gamma_group).to(tl.float32)
        if RANK > 0:  # the low rank is one more block, of width RANK
            lr += group * lr_group
            if PARTS > 0:
                flag = counters + 2 * tile + 1
                ready = tl.atomic_add(flag, 0, sem="acquire")
                while ready == 0:
                    ready = tl.atomic_add(flag, 0, sem="acquire")
                t_rows = t + token[:, None] * LD
            else:
                t_rows = t + group * t_group + read[:, None] * LD
            for r in tl.static_range(0, RANK, BR):
                kk = r + tl.arange(0, BR)
                inside = kk < RANK
                if TRANSPOSED:
                    place = lr + kk[:, None] * n_out + out[None, :]
                else:
                    place = lr + kk[:, None] + out[None, :] * RANK
                ts = tl.load(t_rows + kk[None, :], mask=inside[None, :], other=0)
                us = tl.load(place, mask=inside[:, None] & keep[None, :], other=0)
                if UPCAST:
                    ts = ts.to(tl.float32)
                    us = us.to(tl.float32)
                acc = dot(ts, us, acc, PRECISION)
        if BIAS:
            acc += tl.load(bias + group * bias_group + out, mask=keep, other=0).to(tl.float32)[None, :]
        y_tile = y + (group * T + token[:, None]) * n_out + out[None, :]
        tl.store(y_tile, acc.to(y.dtype.element_ty), mask=(token < T)[:, None] & keep[None, :])


@triton.jit
def sampled(
    left, right, out, offsets, columns, members, gamma, scale,
    T, m, n, nnz, rows, splits, span, left_group, left_token, right_group, right_token, gamma_group,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, QO: tl.constexpr, QI: tl.constexpr, GAMMA: tl.constexpr,
    EVEN: tl.constexpr, PACK: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale gamma left^T right at PACK neighbouring blocks of one block row, over one span of tokens."""
    pid = tl.program_id(0)
    row = pid % rows
    split = (pid // rows) % splits
    group = (pid // (rows * splits)).to(tl.int64)
    groups = tl.num_programs(0) // (rows * splits)
    first = tl.load(offsets + row) + tl.program_id(1) * PACK
    last = tl.load(offsets + row + 1)
    if first < last:
        j = tl.arange(0, PACK * BI)
        position = tl.minimum(first + j // BI, last - 1)  # a missing block repeats the last one: it is not stored
        i = j % BI
        column = tl.load(columns + position) * WIDTH + i
        # Neighbours within a block are neighbours in memory; the compiler cannot see it through the table.
        RUN: tl.constexpr = BI if WIDTH == BI else 1
        column = tl.multiple_of(tl.max_contiguous(column, RUN), RUN)
        o = tl.arange(0, BO)
        line = row * HEIGHT + o
        left_columns = left + group * left_group + line[None, :]
        right_columns = right + group * right_group + column[None, :]
        acc = tl.zeros((BO, PACK * BI) if SWAP else (PACK * BI, BO), tl.float32)
        begin = split * span
        end = tl.minimum(begin + span, T)
        for start in tl.range(begin, end, BK, num_stages=STAGES):
            token = start + tl.arange(0, BK).to(tl.int64)
            live = (token < end)[:, None]
            if EVEN:
                a = tl.load(left_columns + token[:, None] * left_token, mask=live, other=0)
                b = tl.load(right_columns + token[:, None] * right_token, mask=live, other=0)
            else:
                a = tl.load(left_columns + token[:, None] * left_token,
                            mask=live & ((o < HEIGHT) & (line < m))[None, :], other=0)  # fmt: skip
                b = tl.load(right_columns + token[:, None] * right_token,
                            mask=live & ((i < WIDTH) & (column < n))[None, :], other=0)  # fmt: skip
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            # Wide matrix instructions take at least 64 rows: the gathered columns give them where blocks are small.
            acc = dot(tl.trans(a), b, acc, PRECISION) if SWAP else dot(tl.trans(b), a, acc, PRECISION)
        if not SWAP:
            acc = tl.trans(acc)
        acc *= scale
        if GAMMA:
            acc *= tl.load(gamma + group * gamma_group).to(tl.float32)
        keep = (o < HEIGHT)[:, None] & ((i < WIDTH) & (first + j // BI < last))[None, :]
        out += (split.to(tl.int64) * groups + group) * nnz * (HEIGHT // QO * (WIDTH // QI))
        if QO * QI == 1:
            place = out + position.to(tl.int64)[None, :] * (HEIGHT * WIDTH) + o[:, None] * WIDTH + i[None, :]
        else:  # a super-block's blocks go where they belong
            SO: tl.constexpr = HEIGHT // QO
            SI: tl.constexpr = WIDTH // QI
            member = members + position[None, :] * (QO * QI) + (o // SO)[:, None] * QI + (i // SI)[None, :]
            number = tl.load(member, mask=keep, other=-1)
            keep = keep & (number >= 0)
            place = out + number.to(tl.int64) * (SO * SI) + (o % SO)[:, None] * SI + (i % SI)[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=keep)
