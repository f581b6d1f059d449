"""Products of large blocks by cuBLAS between folded permutations.

With q = c l, rows j, l + j, ... of a right block are a strided view of it: products that write each left block's hidden
entries contiguously need no permutation of data. Only the outputs are interleaved by a kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat_kernels.launches import Launch, launch
from structmat_kernels.monarch import backward as kb
from structmat_kernels.sizes import cdiv, pad, power

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


#: Tokens that one program of these kernels takes.
PART = 64


def _tiles(L: int, S: int) -> dict[str, int]:
    # Between 16 and 32 left blocks all at once: rows of them are adjacent in memory.
    JB = 32 if 16 < L < 32 else min(16, power(L))
    return {"TT": 16, "JB": JB, "BU": min(1024 // JB, pad(S))}


def _columns(L: int, S: int) -> int:
    tile = _tiles(L, S)
    return cdiv(L, tile["JB"]) * cdiv(S, tile["BU"])


def interleave(z: Tensor, bias: Tensor, nrows: int, activation: str, has_bias: bool) -> Tensor:
    """``activation(y + bias)`` of the outputs (G, l, T, s)."""
    G, L, T, S = z.shape
    y = torch.empty((G, T, nrows), dtype=z.dtype, device=z.device)
    more = {"ACT": activation, "HAS_BIAS": has_bias, "num_warps": 4}
    grid = (cdiv(T, 16) * _columns(L, S), G)
    launch(kb.interleave, grid, (z, bias, y), (T, nrows), L=L, S=S, **_tiles(L, S), **more)
    return y


def deinterleaving(T: int, nrows: int, strides: tuple[int, ...], L: int, S: int, G: int, want_b: bool) -> Launch:
    """The launch (gy, out, sums) that writes the gradient (G, T, nrows) of the outputs as (G, l, T, s).

    ``want_b``: and its sums over every PART tokens as (parts, G, nrows).
    """
    odd = nrows % 16 or S % 8  # masks take registers
    more = {"REPEAT": PART // 16, "WANT_B": want_b, "num_warps": 8 if odd else 4}
    grid = (cdiv(T, PART) * _columns(L, S), G)
    return Launch(kb.deinterleave, grid, (T, nrows, G, *strides), L=L, S=S, **_tiles(L, S), **more)


@functools.lru_cache(256)
def _deinterleaving(device: torch.device, dtype: torch.dtype, *sizes: Any) -> Launch:
    return deinterleaving(*sizes, want_b=False)


def _deinterleave(gy: Tensor, L: int, S: int) -> Tensor:
    G, T, nrows = gy.shape
    out = torch.empty((G, L, T, S), dtype=gy.dtype, device=gy.device)
    if out.numel():
        gy = gy if gy.stride(-1) == 1 else gy.contiguous()
        _deinterleaving(gy.device, gy.dtype, T, nrows, (gy.stride(0), gy.stride(1)), L, S, G)(gy, out, out)
    return out


def _view(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], start: int = 0) -> Tensor:
    """One view instead of a chain: each costs as much host time as a small kernel runs."""
    return t.as_strided(shape, strides, t.storage_offset() + start)


def _blocks(x: Tensor, K: int, P: int) -> Tensor:
    """One batch entry (T, n) as (k, T, p)."""
    T, n = x.shape
    if n < K * P:
        x = F.pad(x, (0, K * P - n))
    return _view(x, (K, T, P), (P, x.stride(0), 1))


def _hidden(xk: Tensor, right: Tensor, L: int) -> Tensor:
    """(l, T, k c) hidden entries of one batch entry; right (k, q, p) is contiguous."""
    K, T, P = xk.shape
    Q = right.shape[1]
    c = Q // L
    h = torch.empty((L, T, K * c), dtype=xk.dtype, device=xk.device)
    for j in range(L):
        # Rows j, l + j, ... of every right block.
        rows = _view(right, (K, P, c), (Q * P, 1, L * P), j * P)
        torch.bmm(xk, rows, out=_view(h, (K, T, c), (c, K * c, 1), j * T * K * c))
    return h


def forward(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor, *, nrows: int, activation: str, has_bias: bool
) -> Tensor:
    """See launch.forward; l divides q."""
    lead = x.shape[:-1]
    if left.ndim == 3:
        x, left, right = x.reshape(1, -1, x.shape[-1]), left.unsqueeze(0), right.unsqueeze(0)
    G, T, _ = x.shape
    L, S, _ = left.shape[1:]
    K, _, P = right.shape[1:]
    out = torch.empty((G, L, T, S), dtype=x.dtype, device=x.device)
    for g in range(G):
        h = _hidden(_blocks(x[g], K, P), right[g], L)
        torch.bmm(h, left[g].mT, out=out[g])
    return interleave(out, bias, nrows, activation, has_bias).view(*lead, nrows)


def backward(
    gy: Tensor, x: Tensor, left: Tensor, right: Tensor, ncols: int, want_x: bool, want_w: bool, lead: torch.Size
) -> Three:
    """See launch_backward.backward; l divides q. Operands are as ``launch.rows`` leaves them."""
    batched = left.ndim == 4
    if not batched:
        gy, x = gy.reshape(1, -1, gy.shape[-1]), x.reshape(1, -1, x.shape[-1])
        left, right = left.unsqueeze(0), right.unsqueeze(0)
    gx, gleft, gright = _backward(gy, x, left, right, ncols, want_x, want_w)
    gx = None if gx is None else gx.view(*lead, ncols)
    if batched or gleft is None or gright is None:
        return gx, gleft, gright
    return gx, gleft[0], gright[0]


def _backward(gy: Tensor, x: Tensor, left: Tensor, right: Tensor, ncols: int, want_x: bool, want_w: bool) -> Three:
    G, T, _ = gy.shape
    L, S, _ = left.shape[1:]
    K, Q, P = right.shape[1:]
    c = Q // L
    gx = torch.empty((G, T, ncols), dtype=gy.dtype, device=gy.device) if want_x else None
    gleft, gright = (torch.empty_like(left), torch.empty_like(right)) if want_w else (None, None)
    gyj = _deinterleave(gy, L, S)
    for g in range(G):
        gh = torch.empty((T, K, L * c), dtype=gy.dtype, device=gy.device)
        for i in range(K):
            columns = _view(left[g], (L, S, c), (S * K * c, K * c, 1), i * c)
            torch.bmm(gyj[g], columns, out=_view(gh, (L, T, c), (c, K * L * c, 1), i * L * c))
        ghk = gh.transpose(0, 1)  # (k, T, (l, c))
        if gleft is not None and gright is not None:
            xk = _blocks(x[g], K, P)
            torch.bmm(gyj[g].mT, _hidden(xk, right[g], L), out=gleft[g])
            found = torch.bmm(ghk.mT, xk)  # (k, (l, c), p)
            gright[g] = _view(found, (K, c, L, P), (Q * P, P, c * P, 1)).flatten(1, 2)
        if gx is not None:
            folded = _view(right[g], (K, L, c, P), (Q * P, P, L * P, 1)).flatten(1, 2)  # (k, (l, c), p)
            if ncols == K * P:
                torch.bmm(ghk, folded, out=_view(gx[g], (K, T, P), (P, ncols, 1)))
            else:
                gx[g] = torch.bmm(ghk, folded).transpose(0, 1).flatten(1)[:, :ncols]
    return gx, gleft, gright
