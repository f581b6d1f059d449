"""Random factors: uniform entries of a given standard deviation, as ``nn.Linear`` draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def uniform_(t: Tensor, std: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``t`` in place with uniform numbers of standard deviation ``std`` (complex: in modulus), mean zero.

    Args:
        t: floating-point or complex tensor; left alone on the meta device.
        std: a number or a real tensor that broadcasts against t.
        generator: source of randomness.
    """
    if t.is_complex():
        parts = torch.empty((*t.shape, 2), dtype=t.real.dtype, device=t.device)
        return t.copy_(torch.view_as_complex(uniform_(parts, 1.0, generator))).mul_(std / math.sqrt(2))
    bound = math.sqrt(3)
    return t.uniform_(-bound, bound, generator=generator).mul_(std)
