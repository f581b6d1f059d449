"""What Vandermonde and Cauchy matrices share: nodes that are never rounded to half precision."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._autocast import autocast_dtype
from structmat._checks import check_inexact, check_tensor
from structmat.base import StructuredMatrix

HALF = (torch.float16, torch.bfloat16)


def check_nodes(name: str, nodes: Tensor) -> None:
    """Raise unless nodes is a non-empty floating-point or complex tensor with a dimension."""
    check_tensor(name, nodes, 1)
    check_inexact(name, nodes)
    if nodes.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one entry, got shape {tuple(nodes.shape)}")


def products_of_differences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Phase and logarithm of the modulus of ``prod_k (x_i - y_k)`` in double precision, differences of 0 left out."""
    d = x.unsqueeze(-1) - y.unsqueeze(-2)
    d = torch.where(d == 0, torch.ones_like(d), d).to(torch.complex128 if d.is_complex() else torch.float64)
    return d.sgn().prod(-1), d.abs().log().sum(-1)


def full_precision(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, also in an autocast region, which would cast a solve's operands."""
    if autocast_dtype(a.device) is None:
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class NodeMatrix(StructuredMatrix):
    """A matrix whose entries are functions of nodes, with a static field ``dtype`` that says what it multiplies.

    A node's rounding error grows in the entries (a power's by its exponent, a small difference's without bound): where
    other classes round their factors to float16 or bfloat16, as in an autocast region, this one keeps float32 nodes,
    computes in float32 and rounds the result. Nodes that are given in half precision are taken as they are.
    """

    def _to(self, device: Any, dtype: torch.dtype | None) -> Self:
        moved = super()._to(device, torch.float32 if dtype in HALF else dtype)
        object.__setattr__(moved, "dtype", self.dtype if dtype is None else dtype)
        return moved
