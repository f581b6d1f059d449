"""The decayed product in Triton: a product whose result is multiplied by the decay before it is written."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv
from structmat_kernels.tuning import Config

CONFIG: Config = {"BC": 128, "BL": 128, "BW": 32, "num_warps": 8, "num_stages": 3}


@triton.jit
def _product(
    weight_ptr, h_ptr, times_ptr, rates_ptr, y_ptr, channels, width, length, shift,
    PREC: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One program: BC channels and BL positions of one direction; all tensors contiguous."""
    down, across = tl.cdiv(channels, BC), tl.cdiv(length, BL)
    pid = tl.program_id(0)
    d = (pid // across // down).to(tl.int64)
    c = pid // across % down * BC + tl.arange(0, BC)
    i = pid % across * BL + tl.arange(0, BL)
    real_c, real_i = c < channels, i < length
    rows = weight_ptr + d * channels * width + c[:, None] * width
    cols = h_ptr + d * width * length + i[None, :]
    acc = tl.zeros((BC, BL), tl.float32)
    for start in range(0, width, BW):
        w = start + tl.arange(0, BW)
        real = w < width
        a = tl.load(rows + w[None, :], mask=real_c[:, None] & real[None, :], other=0.0)
        b = tl.load(cols + w[:, None].to(tl.int64) * length, mask=real[:, None] & real_i[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    t = tl.load(times_ptr + i, mask=real_i, other=0.0)
    rate = tl.load(rates_ptr + c, mask=real_c, other=0.0)
    acc *= tl.exp(-rate[:, None] * t[None, :]) + shift
    y_ptr += d * channels * length
    tl.store(y_ptr + c[:, None].to(tl.int64) * length + i[None, :], acc, mask=real_c[:, None] & real_i[None, :])


def decayed_product(
    weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float, config: Config | None = None
) -> Tensor:
    """The product of float32 operands, shapes as those of the reference."""
    directions, channels, width = weight.shape
    length = h.shape[2]
    y = torch.empty((directions, channels, length), dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    c = config or CONFIG
    grid = (directions * cdiv(channels, c["BC"]) * cdiv(length, c["BL"]),)
    tensors = tuple(t.contiguous() for t in (weight, h, times, rates))
    exact = torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if INTERPRETED else "tf32x3" if exact else "tf32"
    with launching(weight):
        launch(_product, grid, (*tensors, y), (channels, width, length, float(shift)), PREC=precision, **c)
    return y
