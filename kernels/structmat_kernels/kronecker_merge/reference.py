"""Products of chained Kronecker-sparse factors in plain PyTorch: the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kronecker_merge(values: Sequence[Tensor], mirror: bool = False) -> Tensor:
    """The blocks of a product of factors that are chained with rank 1, in float32 at least.

    One path joins every input to every output, so that the product's entries are products of one entry of each factor:
    a broadcast multiplication a factor, no sums. The memory is in the result's order from the first one on.

    Args:
        values: of the factors from left to right, shapes (*batch, a_i, b_i, c_i, d_i), where a_i c_i = a_{i+1} and
            d_i = b_{i+1} d_{i+1}; in the mirror a_i = b_{i+1} a_{i+1} and c_i d_i = d_{i+1}.
        mirror: whether they are chained in the mirror.

    Returns:
        Shape (*batch, a, d, b, c) with a and d the smallest ones and b, c the products of all; of half precision
        float32.
    """
    a, d = values[-1 if mirror else 0].shape[-4], values[0 if mirror else -1].shape[-1]
    # The digits of an index: inputs met before are in a, outputs to come in d; in the mirror the other way round.
    pieces = [v.unflatten(-4, (a, -1)).unflatten(-1, (-1, d)) for v in values]  # (*batch, a, A, b, c, D, d)
    lead = tuple(range(pieces[0].ndim - 6))
    A, B, C, D = (len(lead) + i for i in (1, 2, 3, 4))
    outer = (*lead, len(lead), len(lead) + 5)
    # It is enough that the first factor is in float32.
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    product = pieces[0].permute(*outer, *((A, B, D, C) if mirror else (B, D, A, C)))
    product = product.to(dtype, memory_format=torch.contiguous_format).contiguous()  # one copy, with another dtype too
    product = product.flatten(-2)  # (*batch, a, d, outputs, outputs to come, inputs), in the mirror to come first
    for v in pieces[1:]:
        b = v.shape[B]
        if mirror:
            left = product.unflatten(-3, (-1, b))[..., None, :]
            product = left * v.permute(*outer, A, B, C, D)[..., None, :, :]
            product = product.flatten(-2).flatten(-3, -2)
        else:
            left = product.unflatten(-2, (b, -1))[..., None]
            product = left * v.permute(*outer, B, D, A, C)[..., None, :, :, :, :]
            product = product.flatten(-2).flatten(-4, -3)
    return product.squeeze(-3 if mirror else -2)


def shapes(radices: Sequence[tuple[int, int]], a: int, d: int, mirror: bool) -> list[tuple[int, int, int, int]]:
    """The factors' shapes (a_i, b_i, c_i, d_i), of their (b_i, c_i) and the smallest a and d."""
    found = []
    for i, (b, c) in enumerate(radices):
        before, after = radices[:i], radices[i + 1 :]
        # Lists: dynamo traces this, and no generator in a product.
        outer = math.prod([r[0] for r in after] if mirror else [r[1] for r in before])
        inner = math.prod([r[1] for r in before] if mirror else [r[0] for r in after])
        found.append((a * outer, b, c, d * inner))
    return found
