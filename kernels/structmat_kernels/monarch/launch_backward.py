"""Launches of the backward kernels: which path, which tiles, which scratch."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend
from structmat_kernels.monarch import backward as kb
from structmat_kernels.monarch import resident_backward as kr
from structmat_kernels.monarch.launch import (
    WIDEST,
    _blocks,
    _cublas_hidden,
    _meta,
    _processors,
    _sizes,
    hidden,
    rows_first,
)
from structmat_kernels.sizes import cdiv, pad, power
from structmat_kernels.tuning import Config, lookup

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


# Bytes of shared memory that the resident kernel takes with 32 blocks of 32x32, its largest.
RESIDENT = 224 << 10


def _shared_memory(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else RESIDENT


def _fits_resident(z: dict[str, int]) -> bool:
    """Whether a part of q left blocks fits: its sums registers, factors and tiles (of 16 tokens) shared memory."""
    if z["L"] % z["Q"] or 2 * z["Q"] < pad(z["Q"]):
        return False
    S, R, Q, P = (pad(z[name]) for name in "SRQP")
    tiles = 16 * (R * P + S * Q + max(S * Q, R * Q, R * P))
    return Q * R * max(S, P) <= 32768 and 2 * (Q * R * (S + P) + tiles) <= RESIDENT


def choose_backward(left: Tensor, right: Tensor, tokens: int) -> Config:
    """The configuration of the gradients: measured where the table has the shape, by rule elsewhere.

    Paths: "resident" (one kernel; q divides l, small blocks), "strided" (the left kernel reads gy as it lies; not
    faster than "general" on an H100), "general".
    """
    z = _sizes(left, right)
    found = lookup("monarch_backward", left, tuple(z.values()), tokens)
    if found:
        return found
    half = left.element_size() == 2
    way = {"HOLD": True, "SPREAD": True}
    if half and _fits_resident(z) and _shared_memory(left) >= RESIDENT:
        return {"path": "resident", "TT": 16, "STAGES": 2, "num_warps": 16, "CTAS": 1, "SHARE": 0.4} | way
    wide = max(z["S"], z["R"], z["Q"], z["P"]) > 64
    stages = {"TX": 64, "STAGES": 3 if half else 1, "num_warps": 8 if wide else 4, "programs": 256}
    first = {"TX": 64, "BA": 64, "RSTAGES": 2, "right_warps": 4}
    c = {"path": "general", "TT": 64} | {k: stages[k] for k in ("STAGES", "num_warps", "programs")}
    return c | {"hidden": first, "right": stages}


def _split(tiles: int, programs: int, target: int) -> int:
    """Programs for each of ``programs`` pieces of work on ``tiles`` tiles, about ``target`` in all."""
    return max(1, min(tiles, target // max(programs, 1)))


def deinterleave(gy: Tensor, L: int, S: int) -> Tensor:
    """The gradient of the outputs as (G, l, T, s)."""
    G, T, nrows = gy.shape
    gy = rows_first(gy)
    out = torch.empty((G, L, T, S), dtype=gy.dtype, device=gy.device)
    tile = {"TT": 16, "JB": min(16, power(L)), "BU": min(64, pad(S))}
    grid = (cdiv(T, 16) * cdiv(L, tile["JB"]) * cdiv(S, tile["BU"]), G)
    kb.deinterleave[grid](gy, out, T, nrows, gy.stride(0), gy.stride(1), L=L, S=S, **tile, num_warps=4)
    return out


def backward(
    gy: Tensor,
    x: Tensor | None,
    left: Tensor,
    right: Tensor,
    ncols: int,
    want_x: bool,
    want_w: bool,
    config: Config | None = None,
    h: Tensor | None = None,
) -> Gradients | None:
    """Gradients (x, left, right) of canonical operands, None for what is not wanted or where no kernel serves.

    Without ``want_w``, x is not read: this is the transposed product. ``h``: the hidden entries (G, token tiles, l, r,
    tile) where the forward product kept them; computed again otherwise.
    """
    G, T, _ = gy.shape
    z = _sizes(left, right)
    if max(z["S"], z["R"], z["Q"], z["P"]) > WIDEST:
        return _cublas_backward(gy, x, left, right, ncols, want_x, want_w) if z["Q"] % z["L"] == 0 else None
    left, right, gy = left.contiguous(), right.contiguous(), rows_first(gy)
    if T == 0 or G == 0:
        gx = gy.new_empty((G, T, ncols)) if want_x else None
        return gx, torch.zeros_like(left) if want_w else None, torch.zeros_like(right) if want_w else None
    c = config or choose_backward(left, right, T)
    # What is not wanted is neither read nor written: any tensor stands for it.
    x = rows_first(x) if want_w and x is not None else gy
    gx = torch.empty((G, T, ncols), dtype=gy.dtype, device=gy.device) if want_x else gy
    run = _resident if c["path"] == "resident" else _stages
    sums = run(gy, x, left, right, gx, h, want_x, want_w, c)
    gleft, gright = (torch.empty_like(left), torch.empty_like(right)) if want_w else (None, None)
    if gleft is not None and gright is not None:
        _reduce(*sums, gleft, gright)
    return gx if want_x else None, gleft, gright


def _reduce(lefts: Tensor, rights: Tensor, gleft: Tensor, gright: Tensor) -> None:
    """Add up partial sums, both in one launch."""
    N, M = gleft.numel(), gright.numel()
    BLOCK = 128 if max(N, M) <= 1 << 17 else 512
    blocks = cdiv(N, BLOCK)
    args = (lefts, gleft, rights, gright, blocks, N, M, lefts.shape[0], rights.shape[0])
    kr.reduce[(blocks + cdiv(M, BLOCK),)](*args, BLOCK=BLOCK, ROWS=2048 // BLOCK, num_warps=4)


def _resident(
    gy: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    gx: Tensor,
    h: Tensor | None,
    want_x: bool,
    want_w: bool,
    c: Config,
) -> tuple[Tensor, Tensor]:
    G, T, nrows = gy.shape
    z = _sizes(left, right)
    L, S, R, K, Q, P = z.values()
    parts, tiles = L // Q, cdiv(T, c["TT"])
    programs = cdiv(_processors(gy) * c["CTAS"], parts * G)
    lefts = max(1, min(tiles, round(programs * c["SHARE"]))) if want_w else 0
    rights = max(1, min(tiles, programs - lefts))
    gleft = torch.empty((lefts, G, L, S, R) if want_w else 1, dtype=torch.float32, device=gy.device)
    gright = torch.empty((rights, G, K, Q, P) if want_w else 1, dtype=torch.float32, device=gy.device)
    ncols = gx.shape[-1] if want_x else x.shape[-1]
    shape = {"TT": c["TT"], "JB": pad(Q), "BI": pad(R), "BP": pad(P), "BU": pad(S), **_way(c)}
    args = (gy, x, left, right, gx, gleft, gright, T, ncols, nrows, tiles, lefts, rights, G)
    strides = (gy.stride(0), gy.stride(1), x.stride(0), x.stride(1))
    kr.resident_backward[(parts * (lefts + rights), G)](
        *args, *strides, **z, **shape, STAGES=c["STAGES"], WANT_X=want_x, WANT_W=want_w, **_meta(gy),
        num_warps=c["num_warps"],
    )  # fmt: skip
    return gleft, gright


def _way(c: Config) -> dict[str, bool]:
    """How gy comes from memory to the products; by an instruction that the interpreter does not know."""
    return {"HOLD": c["HOLD"] and not backend.INTERPRETED, "SPREAD": c["SPREAD"]}


def _stages(
    gy: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    gx: Tensor,
    h: Tensor | None,
    want_x: bool,
    want_w: bool,
    c: Config,
) -> tuple[Tensor, Tensor]:
    G, T, nrows = gy.shape
    L, S, R, K, Q, P = _sizes(left, right).values()
    TT = c["TT"] if h is None else h.shape[-1]
    if want_w and h is None:
        h = hidden(x, right, L, R, c["hidden"] | {"TT": TT})
    tiles = cdiv(T, TT)
    kept = gy if h is None else h
    gh = torch.empty((G, tiles, L, R, TT), dtype=gy.dtype, device=gy.device)
    more = {"STAGES": c["STAGES"], "WANT_W": want_w} | _meta(gy) | {"num_warps": c["num_warps"]}
    if c["path"] == "strided":
        JB, BR = c["JB"], min(c["BR"], pad(R))
        pieces = cdiv(L, JB) * cdiv(R, BR)
        walkers = _split(tiles, pieces * G, max(_processors(gy) * c["CTAS"], pieces * G))
        gleft = torch.empty((walkers, G, L, S, R) if want_w else 1, dtype=torch.float32, device=gy.device)
        args = (gy, left, kept, gh, gleft, T, nrows, tiles, walkers, G, gy.stride(0), gy.stride(1))
        shape = {"L": L, "S": S, "R": R, "TT": TT, "JB": JB, "BU": pad(S), "BR": BR, **_way(c)}
        kr.strided_left[(pieces * walkers, G)](*args, **shape, **more)
    else:
        walkers = _split(tiles, G * L, c["programs"])
        gleft = torch.empty((walkers, G, L, S, R) if want_w else 1, dtype=torch.float32, device=gy.device)
        args = (deinterleave(gy, L, S), left, kept, gh, gleft, T, tiles, walkers, G)
        shape = {"L": L, "S": S, "R": R, "TT": TT, "BS": pad(S), "BR": pad(R), "WANT_H": True}
        kb.left_backward[(L, walkers, G)](*args, **shape, **more)
    c = c["right"]
    TX = max(c["TX"], TT)
    spans = cdiv(T, TX)
    walkers = _split(spans, G * K, c["programs"])
    gright = torch.empty((walkers, G, K, Q, P) if want_w else 1, dtype=torch.float32, device=gy.device)
    ncols = gx.shape[-1] if want_x else x.shape[-1]
    kb.right_backward[(K, walkers, G)](
        gh, right, x, gx, gright, T, ncols, tiles, spans, walkers, G, x.stride(0), x.stride(1), L=L, R=R, K=K, Q=Q, P=P,
        TT=TT, TX=TX, BQ=pad(Q), BP=pad(P), STAGES=c["STAGES"], WANT_X=want_x, WANT_W=want_w, **_meta(gy),
        num_warps=c["num_warps"],
    )  # fmt: skip
    return gleft, gright


# ---------------------------------------------------------------- large blocks: see launch.py


def _cublas_backward(
    gy: Tensor, x: Tensor | None, left: Tensor, right: Tensor, ncols: int, want_x: bool, want_w: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    G, T, _ = gy.shape
    L, S, _, K, Q, P = _sizes(left, right).values()
    c = Q // L
    gx = torch.empty((G, T, ncols), dtype=gy.dtype, device=gy.device) if want_x else None
    gleft, gright = (torch.empty_like(left), torch.empty_like(right)) if want_w else (None, None)
    gyj = deinterleave(gy, L, S) if gy.numel() else gy.new_empty((G, L, T, S))
    for g in range(G):
        gh = torch.empty((T, K, L, c), dtype=gy.dtype, device=gy.device)
        lefts = left[g].unflatten(2, (K, c))  # (l, s, k, c)
        for i in range(K):
            torch.bmm(gyj[g], lefts[:, :, i], out=gh[:, i].transpose(0, 1))
        ghk = gh.flatten(2).transpose(0, 1)  # (k, T, (l, c))
        if gleft is not None and gright is not None and x is not None:
            xk = _blocks(rows_first(x[g]), K, P)
            h = _cublas_hidden(xk, right[g], L)
            torch.bmm(gyj[g].mT, h.flatten(2), out=gleft[g])
            gright[g] = torch.bmm(ghk.mT, xk).unflatten(1, (L, c)).transpose(1, 2).flatten(1, 2)
        if gx is not None:
            folded = right[g].unflatten(1, (c, L)).transpose(1, 2).flatten(1, 2)  # (k, (l, c), p)
            if ncols == K * P:
                torch.bmm(ghk, folded, out=gx[g].unflatten(1, (K, P)).transpose(0, 1))
            else:
                gx[g] = torch.bmm(ghk, folded).transpose(0, 1).flatten(1)[:, :ncols]
    return gx, gleft, gright
