"""The transposing copy in Triton: square tiles that are turned round on the chip, so that reads and writes are wide."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import launching
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config


@triton.jit
def _transpose(
    x_ptr, other_ptr, y_ptr, rows, cols, x_b, x_r, x_c, other_b, other_r, other_c,
    ADD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BR rows and BC columns of one matrix."""
    # Triton gives the load and the store layouts of their own, each along its contiguous dimension, and goes from one
    # to the other through shared memory.
    up, across = tl.cdiv(rows, BR), tl.cdiv(cols, BC)
    pid = tl.program_id(0)
    b = (pid // across // up).to(tl.int64)
    r = (pid // across % up).to(tl.int64) * BR + tl.arange(0, BR)
    c = (pid % across).to(tl.int64) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    t = tl.load(x_ptr + b * x_b + r[:, None] * x_r + c[None, :] * x_c, mask=mask, other=0.0)
    if ADD:
        more = tl.load(other_ptr + b * other_b + r[:, None] * other_r + c[None, :] * other_c, mask=mask, other=0.0)
        t = (t.to(tl.float32) + more.to(tl.float32)).to(t.dtype)  # rounded as the sum is that nothing else follows
    y_ptr += b * rows * cols
    tl.store(y_ptr + c[None, :] * rows + r[:, None], t.to(y_ptr.dtype.element_ty), mask=mask)


def config(rows: int, cols: int, dtype: torch.dtype) -> Config:
    """Tiles whose rows and columns are whole cache lines, 32 entries a thread (16 of float32)."""
    BR, BC = min(64, power(rows)), min(64, power(cols))
    full = 8 if dtype == torch.float32 else 4
    return {"BR": BR, "BC": BC, "num_warps": max(1, full * BR * BC // 4096)}


def transpose(x: Tensor, other: Tensor | None, dtype: torch.dtype, config: Config | None = None) -> Tensor:
    """(batch, columns, rows) of a dtype, contiguous, for x and other of shape (batch, rows, columns), any strides."""
    batch, rows, cols = x.shape
    y = torch.empty((batch, cols, rows), dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    c = config or _config(rows, cols, x.dtype)
    grid = (batch * cdiv(rows, c["BR"]) * cdiv(cols, c["BC"]),)
    second = x if other is None else other
    with launching(x):
        scalars = (rows, cols, *x.stride(), *second.stride())
        launch(_transpose, grid, (x, second, y), scalars, ADD=other is not None, **c)
    return y


_config = config
