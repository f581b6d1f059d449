"""Björck and Pereyra's solvers for square Vandermonde systems, over the last dimension of many right-hand sides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.no_grad()
def leja_order(nodes: Tensor) -> Tensor:
    """Indices, shape (*batch, n): the largest node first, then always the one of the largest product of distances.

    Divided differences in that order keep their digits where others lose all of them, as for roots of unity in turn.
    """
    places = torch.arange(nodes.shape[-1], device=nodes.device)
    score, order = nodes.abs(), []
    logs, taken = torch.zeros_like(score), torch.zeros_like(score, dtype=torch.bool)
    for _ in range(nodes.shape[-1]):
        order.append(score.argmax(-1, keepdim=True))
        taken = taken | (places == order[-1])
        logs = logs + (nodes - nodes.gather(-1, order[-1])).abs().log()
        # A node that was taken does not come again, even where others coincide with it.
        score = torch.where(taken, -torch.inf, logs.nan_to_num(nan=-1e30, neginf=-1e30))
    return torch.cat(order, -1)


def _reorder(rows: Tensor, order: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(rows.shape[:-2], order.shape[:-1])
    index = order.unsqueeze(-2).expand(*batch, *rows.shape[-2:])
    return rows.expand(*batch, *rows.shape[-2:]).gather(-1, index)


def _differences(nodes: Tensor, step: int) -> Tensor:
    """``nodes[i + step] - nodes[i]``, shape (*batch, 1, n - step)."""
    return (nodes[..., step:] - nodes[..., : nodes.shape[-1] - step]).unsqueeze(-2)


def interpolate(nodes: Tensor, values: Tensor) -> Tensor:
    """The coefficients of the polynomials with given values at the nodes: ``V a = f``.

    Args:
        nodes: distinct, shape (*batch, n).
        values: shape (*batch, k, n).

    Returns:
        Shape (*batch, k, n).
    """
    order = leja_order(nodes)
    x, n = nodes.gather(-1, order), nodes.shape[-1]
    divided, newton = _reorder(values, order), []
    for k in range(n):
        newton.append(divided[..., :1])
        if k < n - 1:
            divided = (divided[..., 1:] - divided[..., :-1]) / _differences(x, k + 1)
    found = newton[-1]
    for k in reversed(range(n - 1)):  # times (z - x_k), plus newton_k
        found = torch.cat([newton[k], found], -1) - x[..., None, k : k + 1] * pad(found, (0, 1))
    return found


def moments(nodes: Tensor, values: Tensor) -> Tensor:
    """Weights of the nodes with which their powers sum to given values: ``V^T a = b``; as :func:`interpolate`."""
    order = leja_order(nodes)
    x, n = nodes.gather(-1, order), nodes.shape[-1]
    rest, newton = values, []
    for k in range(n):
        newton.append(rest[..., :1])
        rest = rest[..., 1:] - x[..., None, k : k + 1] * rest[..., :-1]
    found = newton[-1]
    for k in reversed(range(n - 1)):
        tail = found / _differences(x, k + 1)
        found = torch.cat([newton[k].expand(*tail.shape[:-1], 1), tail], -1) - pad(tail, (0, 1))
    return _reorder(found, order.argsort(-1))
