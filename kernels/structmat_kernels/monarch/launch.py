"""From tensors to kernel launches: which path, which tiles, which scratch."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend
from structmat_kernels.monarch import backward as kb
from structmat_kernels.monarch import kernel as kf
from structmat_kernels.monarch import resident as kr
from structmat_kernels.sizes import cdiv, pad, power
from structmat_kernels.tuning import Config, lookup

# Blocks wider than this go to cuBLAS: its products of large blocks are nearer to the hardware's rate than ours.
WIDEST = 128


def rows_first(x: Tensor) -> Tensor:
    """x with unit stride in its features (any stride in tokens and batch)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _meta(x: Tensor) -> dict:
    return {"PREC": backend.dot_precision(x.dtype), "UPCAST": backend.INTERPRETED}


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _shared_memory(x: Tensor) -> int:
    """Bytes that one program can have."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 232_448


def _sizes(left: Tensor, right: Tensor) -> dict[str, int]:
    return dict(zip("LSRKQP", (*left.shape[-3:], *right.shape[-3:]), strict=True))


def choose(left: Tensor, right: Tensor, tokens: int) -> Config:
    """The configuration of the forward product: measured where the table has the shape, by rule elsewhere.

    The rules come from measurements on an H100 with blocks of 32 to 2048 (see docs/benchmarks).
    """
    L, S, R, K, Q, P = sizes = (*left.shape[-3:], *right.shape[-3:])
    found = lookup("monarch", left, sizes, tokens)
    if found:
        return found
    item, room, half = left.element_size(), _shared_memory(left), left.element_size() == 2
    if max(S, R, Q, P) > WIDEST:
        if Q % L == 0 and not (half and L <= 8 and max(S, R, Q, P) <= 512):
            return {"path": "cublas"}
        stages = 3 if half and room > 200_000 else 2
        tile = {"TX": 128, "BA": 128, "right_warps": 8, "RSTAGES": stages, "TT": 64, "BU": 64, "BR": 64 if half else 32}
        return {"path": "stages", "JB": 4, "BATCHED": False, "STAGES": stages, "num_warps": 4} | tile
    if tokens * K * P <= 16384 or (K * P <= 2048 and tokens <= 16):
        return {"path": "small", "TT": 1, "BI": 64, "num_warps": 8}
    stages = {"path": "stages", "BA": 64 if Q <= 64 else 128, "TX": 64, "right_warps": 4, "BATCHED": True}
    if tokens <= 128:
        tile = {"JB": 4, "BU": 16} if tokens <= 16 else {"JB": 8, "BU": 32}
        return stages | tile | {"TT": 16, "TX": 16, "BR": 64 if half else 32, "STAGES": 2, "num_warps": 4}
    BI, BP, BU = pad(R), pad(P), pad(S)
    for JB, warps in ((32, 16), (16, 8)):
        direct = Q % L == 0 or (Q % JB == 0 and L % JB == 0)
        needed = item * (JB * BI * (BP + BU) + 2 * BI * 16 * BP + JB * 16 * max(BI, BU))
        if direct and pad(L) >= JB and needed <= room:
            return {"path": "resident", "TT": 16, "JB": JB, "STAGES": 3, "num_warps": warps, "CTAS": 1}
    if L >= 16 and item * 16 * (BU * BI + 2 * BI * 16 + 16 * BU) <= room:
        return stages | {"TT": 16, "JB": 16, "BU": BU, "BR": BI, "STAGES": 3, "num_warps": 8, "CTAS": 1}
    if L < 16:
        return (
            stages
            | {"TT": 64, "JB": 16, "BU": 64, "BR": 64 if half else 32, "STAGES": 2, "num_warps": 4}
            | {"BATCHED": False}
        )
    large = half and room > 200_000
    tile = {"TT": 32, "BU": 64, "BR": 32, "STAGES": 3} if large else {"TT": 16, "BU": 32, "BR": 16, "STAGES": 2}
    return stages | tile | {"JB": 16, "num_warps": 8}


def forward(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str, config: Config | None = None
) -> Tensor | None:
    """``activation(x @ M.mT + bias)`` of canonical operands, or None where no kernel serves these sizes."""
    G, T, n = x.shape
    c = config or choose(left, right, T)
    if c["path"] == "reference":
        return None
    left, right, bias = left.contiguous(), right.contiguous(), bias.contiguous()
    if c["path"] == "cublas":
        return _cublas_forward(x, left, right, bias, nrows, activation)
    x = rows_first(x)
    y = torch.empty((G, T, nrows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    z = _sizes(left, right)
    L, S, R, _, _, P = z.values()
    epilogue = {"ACT": activation, "HAS_BIAS": bias.numel() > 0}
    strides = (x.stride(0), x.stride(1))
    warps = {"num_warps": c["num_warps"]}
    if c["path"] == "small":
        BI = min(c["BI"], pad(R))
        grid = (L, cdiv(T, c["TT"]), G)
        tiles = {"TT": c["TT"], "BI": BI, "BR": pad(R), "BP": pad(P), "BU": pad(S)}
        kf.small[grid](x, left, right, bias, y, T, n, nrows, *strides, **z, **tiles, **epilogue, **warps)
        return y
    if c["path"] == "resident":
        JB = min(c["JB"], pad(L))
        groups, tiles = cdiv(L, JB), cdiv(T, c["TT"])
        walkers = min(tiles, cdiv(_processors(x) * c["CTAS"], groups * G))
        shape = {"TT": c["TT"], "JB": JB, "BI": pad(R), "BP": pad(P), "BU": pad(S)}
        args = (x, left, right, bias, y, T, n, nrows, tiles, walkers, *strides)
        kr.resident[(groups * walkers, G)](*args, **z, **shape, STAGES=c["STAGES"], **epilogue, **_meta(x), **warps)
        return y
    TT, JB, BU = c["TT"], min(c["JB"], power(L)), min(c["BU"], pad(S))
    shared = {"TT": TT, "JB": JB, "BU": BU, "BR": min(c["BR"], pad(R))}
    shared |= {"BATCHED": c["BATCHED"], "STAGES": c["STAGES"]} | epilogue | _meta(x) | warps
    h = hidden(x, right, L, R, c)
    tiles = cdiv(T, TT)
    if "CTAS" in c:
        parts = cdiv(L, JB) * cdiv(S, BU)
        walkers = min(tiles, cdiv(_processors(x) * c["CTAS"], parts * G))
        shape = {"L": L, "S": S, "R": R, "TT": TT, "JB": JB, "BU": BU, "BR": pad(R), "STAGES": c["STAGES"]}
        args = (h, left, bias, y, T, nrows, tiles, walkers)
        kr.resident_left[(parts * walkers, G)](*args, **shape, **epilogue, **_meta(x), **warps)
        return y
    grid = (tiles * cdiv(L, JB) * cdiv(S, BU), G)
    kf.left_stage[grid](h, left, bias, y, T, nrows, tiles, L=L, S=S, R=R, **shared)
    return y


def hidden(x: Tensor, right: Tensor, L: int, R: int, c: Config) -> Tensor:
    """``right x`` in the hidden layout (G, token tiles, l, r, TT)."""
    G, T, n = x.shape
    K, Q, P = right.shape[-3:]
    TT, TX, BA = c["TT"], c.get("TX", c["TT"]), min(c["BA"], pad(Q))
    tiles = cdiv(T, TT)
    h = torch.empty((G, tiles, L, R, TT), dtype=x.dtype, device=x.device)
    grid = (cdiv(T, TX) * K * cdiv(Q, BA), G)
    shape = {"L": L, "R": R, "K": K, "Q": Q, "P": P, "TT": TT, "TX": TX, "BA": BA, "BP": min(64, pad(P))}
    shape |= {"STAGES": c.get("RSTAGES", 2)}
    args = (x, right, h, T, n, tiles, x.stride(0), x.stride(1))
    kf.right_stage[grid](*args, **shape, **_meta(x), num_warps=c.get("right_warps", 4))
    return h


def interleave(z: Tensor, bias: Tensor, nrows: int, activation: str) -> Tensor:
    """``activation(y + bias)`` of the outputs (G, l, T, s)."""
    G, L, T, S = z.shape
    y = torch.empty((G, T, nrows), dtype=z.dtype, device=z.device)
    tile = {"TT": 16, "JB": min(16, power(L)), "BU": min(64, pad(S))}
    grid = (cdiv(T, 16) * cdiv(L, tile["JB"]) * cdiv(S, tile["BU"]), G)
    more = {"ACT": activation, "HAS_BIAS": bias.numel() > 0}
    kb.interleave[grid](z, bias, y, T, nrows, L=L, S=S, **tile, **more, num_warps=4)
    return y


# ---------------------------------------------------------------- large blocks: cuBLAS between folded permutations
# With q = c l, rows j, l + j, ... of a right block are a strided view of it: products that write each left block's
# hidden entries contiguously need no permutation of data. Only the outputs are interleaved by a kernel.


def _blocks(x: Tensor, K: int, P: int) -> Tensor:
    """One batch entry (T, n) as (k, T, p)."""
    n = x.shape[1]
    if n < K * P:
        x = torch.nn.functional.pad(x, (0, K * P - n))
    return x.unflatten(1, (K, P)).transpose(0, 1)


def _cublas_hidden(xk: Tensor, right: Tensor, L: int) -> Tensor:
    """(l, T, k, c) hidden entries of one batch entry."""
    K, Q, _ = right.shape
    by_left = right.unflatten(1, (Q // L, L))  # (k, c, l, p)
    h = torch.empty((L, xk.shape[1], K, Q // L), dtype=xk.dtype, device=xk.device)
    for j in range(L):
        torch.bmm(xk, by_left[:, :, j].mT, out=h[j].transpose(0, 1))
    return h


def _cublas_forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str) -> Tensor:
    G, T, _ = x.shape
    L, S, _, K, _, P = _sizes(left, right).values()
    out = torch.empty((G, L, T, S), dtype=x.dtype, device=x.device)
    for g in range(G):
        h = _cublas_hidden(_blocks(rows_first(x[g]), K, P), right[g], L)
        torch.bmm(h.flatten(2), left[g].mT, out=out[g])
    return interleave(out, bias, nrows, activation) if out.numel() else x.new_empty((G, T, nrows))
