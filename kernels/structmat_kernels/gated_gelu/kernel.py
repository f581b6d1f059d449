"""The gated unit in Triton: one pass over memory, forwards and backwards.

Forwards 3 h numbers a row move, backwards 5 h: both halves of the gradient are written where they belong, so that
nothing has to be put together.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import launching
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: Entries of the output that a program makes: 16 a thread, two loads of 16 bytes of each half.
TILE = 2048


@triton.jit
def _normal(a):
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))


@triton.jit
def _places(rows, h, BR: tl.constexpr, BC: tl.constexpr):
    across = tl.cdiv(h, BC)
    pid = tl.program_id(0)
    row = (pid // across).to(tl.int64) * BR + tl.arange(0, BR)
    col = pid % across * BC + tl.arange(0, BC)
    return row[:, None], col[None, :], (row < rows)[:, None] & (col < h)[None, :]


@triton.jit
def _forward(x_ptr, y_ptr, rows, h, x_row, BR: tl.constexpr, BC: tl.constexpr):
    """BR rows and BC columns of the output."""
    row, col, mask = _places(rows, h, BR, BC)
    at = x_ptr + row * x_row + col
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * h + col, (a * _normal(a) * b).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_ptr, x_ptr, to_ptr, rows, h, grad_row, x_row, BR: tl.constexpr, BC: tl.constexpr):
    """The same of both halves of the gradient."""
    row, col, mask = _places(rows, h, BR, BC)
    at = x_ptr + row * x_row + col
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + h, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + row * grad_row + col, mask=mask, other=0.0).to(tl.float32)
    normal = _normal(a)
    density = tl.exp(-0.5 * a * a) * 0.3989422804014327
    to = to_ptr + row * (2 * h) + col
    tl.store(to, (g * b * (normal + a * density)).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to + h, (g * a * normal).to(to_ptr.dtype.element_ty), mask=mask)


def config(h: int) -> Config:
    """Rows and columns of a program."""
    columns = min(TILE // 2, power(h))
    return {"BR": TILE // columns, "BC": columns, "num_warps": 4}


def _rows(t: Tensor) -> Tensor:
    """(rows, columns) with columns next to each other."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def forward(x: Tensor) -> Tensor:
    """y of shape (*batch, h) for x of shape (*batch, 2 h)."""
    h = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], h), dtype=x.dtype, device=x.device)
    if y.numel():
        x, c = _rows(x), config(h)
        with launching(x):
            grid = (cdiv(x.shape[0], c["BR"]) * cdiv(h, c["BC"]),)
            launch(_forward, grid, (x, y), (x.shape[0], h, x.stride(0)), **c)
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, contiguous."""
    h = x.shape[-1] // 2
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gx.numel():
        x, grad, c = _rows(x), _rows(grad), config(h)
        with launching(x):
            grid = (cdiv(x.shape[0], c["BR"]) * cdiv(h, c["BC"]),)
            launch(_backward, grid, (grad, x, gx), (x.shape[0], h, grad.stride(0), x.stride(0)), **c)
    return gx
