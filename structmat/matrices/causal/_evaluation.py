"""Values of a factored polynomial basis at N nodes: a Monarch matrix with one block-diagonal stage a digit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.matrices.butterfly import Butterfly
from structmat.matrices.monarch_p import MonarchP


def node_values(radix: Sequence[int], scheme: str, device: torch.device) -> list[Tensor]:
    """For every digit a the values of Y_a^d (roots of unity) or tau_d(Y_a) (Chebyshev) in double precision.

    Entry [A, e, d] is for the node whose digits from a on are e and A: shape (prod_{b>a} n_b, n_a, n_a). Nodes are
    kept as integers, angles in units of 2 pi / N_a or 2 pi / (4 N_a), N_a = prod_{b>=a} n_b: every value is exact to
    rounding. A node of level a has the angle of one of the n_a roots of the node of level a + 1.
    """
    # Here, because the transforms are built on the matrices.
    from structmat.transforms._build import turns

    parts = 4 if scheme == "chebyshev" else 1
    tables, size = [], 1
    nodes = torch.tensor([1 if scheme == "chebyshev" else 0], device=device)
    for n in reversed(radix):
        digit = torch.arange(n, device=device)
        # cos(pi (2 e + 1) / (2 n)), the roots of T_n, at the top; below, T_n(cos t) = cos(n t) = Y_{a+1}.
        step = 2 if scheme == "chebyshev" and size == 1 else parts * size
        nodes, size = nodes[:, None] + step * digit, size * n
        values = turns(nodes[..., None] * digit, parts * size)
        if scheme == "chebyshev":
            values = values.real * torch.where(digit == 0, 1.0, 2.0).double()
        tables.append(values)
        nodes = nodes.flatten()
    return tables[::-1]


def evaluation(blocks: Sequence[Tensor], scheme: str) -> Butterfly:
    """The matrix M whose entry (e, j) is q_j at node e, nodes in the order of their digits e_0 + e_1 n_0 + ...

    Args:
        blocks: for digit a the coefficients [j_<a, d, j_a] of phi_{j_a | j_<a}: shape
            (*batch, prod_{b<a} n_b, n_a, n_a).
        scheme: "fourier" (the N-th roots of unity; complex) or "chebyshev" (the roots of T_N; coefficients of tau_d).
    """
    radix = [b.shape[-1] for b in blocks]
    dtype = torch.promote_types(blocks[0].dtype, torch.complex64) if scheme == "fourier" else blocks[0].dtype
    stages = []
    for a, (table, coefs) in enumerate(zip(node_values(radix, scheme, blocks[0].device), blocks, strict=True)):
        values = torch.matmul(table.to(dtype).unsqueeze(-3), coefs.to(dtype).unsqueeze(-4))  # (*batch, A, j_<a, e, j)
        stages.append(values.reshape(*coefs.shape[:-3], math.prod(radix[a + 1 :]) * coefs.shape[-3], *coefs.shape[-2:]))
    return MonarchP(stages)
