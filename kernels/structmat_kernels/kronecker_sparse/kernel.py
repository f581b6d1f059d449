"""Launchers of the Kronecker-sparse kernels, and the choice of kernel and tile sizes."""

# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend, tuning
from structmat_kernels.kronecker_sparse import product as _product
from structmat_kernels.kronecker_sparse import weights as _weights
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: The least size of a dimension of tl.dot.
DOT = 16


def _clamp(n: int, low: int, high: int) -> int:
    return max(low, min(power(n), high))


def _kind(a: int, d: int, q: int, p: int, dtype: torch.dtype) -> Config:
    """Which kernel, and how many neighbouring A and D a program takes.

    - tile: small d, so that whole rows of whole blocks are a piece of memory (64 wide in half precision; 32 in float32,
      whose IEEE products are multiply-adds, zeros included). The same for 8 x 8 blocks of half precision at any d.
    - lanes: blocks of at most 8 x 8 with neighbouring D in neighbouring lanes.
    - batched: everything else, with as many neighbouring D as fill a sector of 32 bytes.
    """
    big, half = max(q, p), dtype != torch.float32
    sector = 16 if half else 8
    width = 64 if half else 32
    if d == 1 or big * d <= (128 if half else 32):
        return {"kind": "tile", "SA": max(1, min(width // (big * d), power(a))), "SD": d}
    if big <= 8:
        if half and big > 4 and d >= sector:
            return {"kind": "tile", "SA": 1, "SD": sector}
        return {"kind": "lanes"}
    return {"kind": "batched", "SD": min(sector, power(d))}


def config(tokens: int, a: int, d: int, q: int, p: int, dtype: torch.dtype) -> Config:
    """Kernel and tile sizes of the product; every one of them may be overridden by a measured one."""
    c = _kind(a, d, q, p, dtype)
    half = dtype != torch.float32
    rows = _clamp(tokens, DOT, 128 if half else 64)
    if c["kind"] == "lanes":
        # A thread holds the p inputs of 16 to 32 places; 128 to 170 registers.
        BD = min(power(d), 64 if half else 32)
        places = 4096 if max(q, p) <= 2 else 2048 if half or max(q, p) <= 4 else 1024
        return c | {"BT": max(1, min(power(tokens), places // BD)), "BD": BD, "num_warps": 4}
    if c["kind"] == "batched":
        BN = _clamp(q, DOT, 64 if half else 32)
        return c | {"BT": min(rows, 32), "BK": DOT, "BN": BN, "num_warps": 16 if BN == 64 else 8, "num_stages": 3}
    depth, across = (c["SA"] * c["SD"] * s for s in (p, q))
    if half:  # up to 128 x 128 the weights stay in shared memory while tokens pass by
        BK, BN = _clamp(depth, DOT, 128 if depth <= 128 else 64), _clamp(across, DOT, 128)
    else:
        BK, BN = _clamp(depth, DOT, 32), _clamp(across, DOT, 64)
    tiles = cdiv(a, c["SA"]) * cdiv(d, c["SD"]) * cdiv(across, BN) * cdiv(tokens, rows)
    steps = max(1, min(8, tiles // 1024)) if depth <= BK else 1
    warps = 8 if max(BK, BN) > (64 if half else 32) else 4
    return c | {"BT": rows, "BK": BK, "BN": BN, "steps": steps, "num_warps": warps, "num_stages": 3}


def weights_config(tokens: int, a: int, d: int, q: int, p: int, dtype: torch.dtype) -> Config:
    """Kernel, tile sizes and number of splits of the weight gradient."""
    c = _kind(a, d, q, p, dtype)
    half = dtype != torch.float32
    if c["kind"] == "lanes" and (half or q * p > 16):  # the accumulators of lanes are q p registers a place
        widest = max(16, 64 // power(max(q, p))) if half else max(8, 32 // power(max(q, p)))
        c = {"kind": "tile", "SA": 1, "SD": min(power(d), widest)}
    if c["kind"] == "lanes":
        BD = min(power(d), 32)
        BT = 512 // BD
        return c | {"BT": BT, "BD": BD, "num_warps": 4} | _splits(tokens, BT, a * cdiv(d, BD), q, p, a * d)
    if c["kind"] == "batched":
        BT, BK, BN = DOT, _clamp(p, DOT, 32), _clamp(q, DOT, 32)
        c |= {"num_warps": 8, "num_stages": 2}
        cols = a * cdiv(d, c["SD"]) * cdiv(q, BN) * cdiv(p, BK)
    else:
        depth, across = (c["SA"] * c["SD"] * s for s in (p, q))
        most = 128 if half else 64
        BT, BK, BN = _clamp(tokens, DOT, 64 if half else 32), _clamp(depth, DOT, most), _clamp(across, DOT, most)
        c |= {"num_warps": 8 if max(BK, BN) > (64 if half else 32) else 4, "num_stages": 3}
        cols = cdiv(a, c["SA"]) * cdiv(d, c["SD"]) * cdiv(across, BN) * cdiv(depth, BK)
    return c | {"BT": BT, "BK": BK, "BN": BN} | _splits(tokens, BT, cols, q, p, a * d)


def _splits(tokens: int, BT: int, cols: int, q: int, p: int, blocks: int) -> Config:
    """Four programs a multiprocessor, but a quarter of the operands' traffic for the partial results, and 64 MB."""
    tiles = cdiv(tokens, BT)
    bound = min(tokens * (q + p) // (16 * q * p), (1 << 24) // (blocks * q * p))
    splits = max(1, min(cdiv(4 * 132, cols), tiles, bound))
    steps = cdiv(tiles, splits)
    return {"steps": steps, "splits": cdiv(tiles, steps)}


def product(x: Tensor, blocks: Tensor, m: int, config: Config | None = None, op: str = "kronecker_sparse") -> Tensor:
    """The product of x (G, tokens, n) with blocks (G, a, d, q, p), n <= a p d: the first m of the a q d results.

    n < a p d and m < a q d are for d = 1 only. The transposed product is ``product(y, blocks.mT, n)``.
    """
    G, tokens, n = x.shape
    a, d, q, p = blocks.shape[1:]
    y = torch.empty((G, tokens, m), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.stride(2) != 1:
        x = x.contiguous()
    c = config or tuning.lookup(op, x.device, x.dtype, (a, d, q, p), tokens) or _config(tokens, a, d, q, p, x.dtype)
    if c["kind"] == "lanes" and q * p > 4:  # D fastest, for wide loads: a copy of the blocks, which are small here
        blocks = blocks.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    sizes = (x.stride(0), x.stride(1), *blocks.stride())
    dots = {"PRECISION": backend.dot_precision(x.dtype), "UPCAST": backend.INTERPRETED and x.dtype != torch.float32}
    options = {k: c[k] for k in ("num_warps", "num_stages") if k in c} | {"P": p, "Q": q}
    with backend.launching(x):
        if c["kind"] == "lanes":
            grid = (a * cdiv(d, c["BD"]) * cdiv(tokens, c["BT"]), G)
            sizes = (tokens, m, a, d, *sizes)
            launch(_product.lanes, grid, (x, blocks, y), sizes, BT=c["BT"], BD=c["BD"], **options)
            return y
        dots |= {k: c[k] for k in ("BT", "BK", "BN", "SD")}
        if c["kind"] == "tile":
            cols = cdiv(a, c["SA"]) * cdiv(d, c["SD"]) * cdiv(c["SA"] * q * c["SD"], c["BN"])
            grid = (cols * cdiv(tokens, c["BT"] * c["steps"]), G)
            sizes = (tokens, n, m, a, d, c["steps"], *sizes)
            dots |= {"SA": c["SA"], "WHOLE": c["SD"] == d}
            launch(_product.tile, grid, (x, blocks, y), sizes, **dots, **options)
        else:
            grid = (a * cdiv(d, c["SD"]) * cdiv(q, c["BN"]) * cdiv(tokens, c["BT"]), G)
            launch(_product.batched, grid, (x, blocks, y), (tokens, n, m, a, d, *sizes), **dots, **options)
    return y


def weights(grad: Tensor, x: Tensor, blocks: Tensor, config: Config | None = None, op: str = "") -> Tensor:
    """The gradient of blocks (whose values it does not need), for grad (G, tokens, m) and x (G, tokens, n)."""
    G, tokens, n = x.shape
    m = grad.shape[2]
    a, d, q, p = blocks.shape[1:]
    if blocks.numel() == 0 or tokens == 0 or n == 0 or m == 0:
        return torch.zeros(blocks.shape, dtype=x.dtype, device=x.device)
    x = x if x.stride(2) == 1 else x.contiguous()
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    found = tuning.lookup(f"{op or 'kronecker_sparse'}_weights", x.device, x.dtype, (a, d, q, p), tokens)
    c = config or found or weights_config(tokens, a, d, q, p, x.dtype)
    splits, steps = c["splits"], c["steps"]
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, G, a, d, q, p), dtype=dtype, device=x.device)
    strides = (grad.stride(0), grad.stride(1), x.stride(0), x.stride(1))
    dots = {"PRECISION": backend.dot_precision(x.dtype), "UPCAST": backend.INTERPRETED and x.dtype != torch.float32}
    options = {k: c[k] for k in ("num_warps", "num_stages") if k in c} | {"P": p, "Q": q}
    with backend.launching(x):
        if c["kind"] == "lanes":
            grid = (a * cdiv(d, c["BD"]) * splits, G)
            sizes = (tokens, a, d, steps, *strides)
            launch(_weights.lanes, grid, (grad, x, out), sizes, BT=c["BT"], BD=c["BD"], **options)
        else:
            dots |= {k: c[k] for k in ("BT", "BK", "BN", "SD")}
            sa = c.get("SA", 1)
            wide = c["SD"] if c["kind"] == "tile" else 1
            cols = cdiv(a, sa) * cdiv(d, c["SD"]) * cdiv(sa * q * wide, c["BN"]) * cdiv(sa * p * wide, c["BK"])
            kernel = _weights.tile if c["kind"] == "tile" else _weights.batched
            dots |= {"SA": sa, "WHOLE": c["SD"] == d} if c["kind"] == "tile" else {}
            sizes = (tokens, n, m, a, d, steps, *strides)
            launch(kernel, (cols * splits, G), (grad, x, out), sizes, **dots, **options)
    return out[0] if splits == 1 else out.sum(0, dtype=torch.float32).to(x.dtype)


_config = config
