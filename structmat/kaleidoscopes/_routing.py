"""Permutations as two passes of switches: Clos networks of any radices, of radix 2 the network of Beneš."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def route(perm: Tensor, radices: Sequence[int]) -> list[Tensor]:
    """Factors of the permutation matrix ``(P x)[i] = x[perm[i]]``, those of B and then those of B'^*: zeros and ones.

    A network of size N = r M has M switches of r inputs, r networks of size M, and M switches of r outputs. Element by
    element, input switches and output switches are joined by a bipartite graph in which every switch has r edges; its
    edges can be coloured with r colours, no two alike at one switch (König), and the colour is the network to take.

    Source: Beneš 1964; Clos 1953; König 1916.

    Args:
        perm: shape (*batch, N), on the CPU.
        radices: they multiply to N.

    Returns:
        2 k boolean tensors (*batch, a, r, r, d) for k radices. O(N log N) numbers; the work is O(N log^2 N) for radix
        2, in a constant number of operations on tensors for every level and doubling.
    """
    batch, size = perm.shape[:-1], perm.shape[-1]
    lefts, rights, networks = [], [], perm.reshape(-1, size)
    for r in radices:
        count, n = networks.shape
        rest = n // r
        network, out = torch.arange(count)[:, None], torch.arange(n)
        colour = _colours(network * rest + out % rest, network * rest + networks % rest, r)
        left = torch.zeros(count, r, r, rest, dtype=torch.bool)
        left[network, out // rest, colour, out % rest] = True
        right = torch.zeros_like(left)
        right[network, colour, networks // rest, networks % rest] = True
        inner = torch.empty(count, r, rest, dtype=torch.int64)
        inner[network, colour, out % rest] = networks % rest
        networks = inner.flatten(0, 1)
        shape = (*batch, size // n, r, r, rest)
        lefts.append(left.view(shape))
        rights.append(right.view(shape))
    return [*lefts, *reversed(rights)]


def route_inside_out(perm: Tensor, radices: Sequence[int]) -> list[Tensor]:
    """The factors of a permutation matrix with the passes the other way round: those of B'^* first, then those of B.

    Vectors with the digits of their indices read backwards have small strides for large ones: the networks turn.

    Args:
        perm: see :func:`route`.
        radices: see :func:`route`.

    Returns:
        2 k boolean tensors (*batch, a, r, r, d), the smallest d first and last.
    """
    backwards = radices[::-1]
    there, back = _reversed_digits(backwards), _reversed_digits(radices)
    factors = route(there[perm[..., back]], backwards)
    for i, values in enumerate(factors):
        level = min(i, len(factors) - 1 - i)
        a, d = _reversed_digits(backwards[:level]), _reversed_digits(backwards[level + 1 :])
        factors[i] = values[..., a, :, :, :][..., d].transpose(-4, -1)
    return factors


def _reversed_digits(radices: Sequence[int]) -> Tensor:
    """For every index in the reversed radices the one with the same digits, backwards, in the radices."""
    index = torch.arange(math.prod(radices)).view(tuple(radices))
    return index.permute(tuple(reversed(range(index.ndim)))).reshape(-1)


def _colours(left: Tensor, right: Tensor, degree: int) -> Tensor:
    """Colours 0 to degree - 1 of the edges of a bipartite graph of this degree at every vertex.

    Args:
        left: the vertex of every edge, numbers from 0 without gaps.
        right: the vertex on the other side.
        degree: of both sides.
    """
    shape, left, right = left.shape, left.reshape(-1), right.reshape(-1)
    colour = torch.zeros_like(left)
    if degree == 1 or not len(left):
        return colour.view(shape)
    if degree % 2:
        first = _matching(left, right)
        colour[~first] = 1 + _colours(left[~first], right[~first], degree - 1)
    else:
        half = _halves(left, right)
        count = len(left) // degree  # vertices; the two halves are graphs without common vertices
        colour = _colours(left + half * count, right + half * count, degree // 2) + half * (degree // 2)
    return colour.view(shape)


def _halves(left: Tensor, right: Tensor) -> Tensor:
    """0 or 1 for every edge, each as often at every vertex; degrees are even.

    Edges are paired at both ends. Along a -> left partner -> right partner of that, edges form cycles, of which each
    edge and its partner are on different ones, so that the smaller first edge of both decides.
    """
    left_partner, right_partner = _partners(left), _partners(right)
    step = right_partner[left_partner]
    least, jump = torch.arange(len(left)), step
    while True:  # cycles of up to 2^i edges after i rounds
        found = torch.minimum(least, least[jump])
        if torch.equal(found, least):
            break
        least, jump = found, jump[jump]
    return (least > least[left_partner]).long()


def _partners(vertex: Tensor) -> Tensor:
    """For every edge another one at the same vertex, in pairs."""
    order = vertex.argsort(stable=True).view(-1, 2)
    partner = torch.empty_like(vertex)
    partner[order] = order.flip(1)
    return partner


def _matching(left: Tensor, right: Tensor) -> Tensor:
    """Which edges are in a perfect matching: a boolean for every edge."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    ones = np.ones(len(left), dtype=np.int8)
    partner = maximum_bipartite_matching(csr_array((ones, (left.numpy(), right.numpy()))), perm_type="column")
    edge = torch.from_numpy(partner.astype(np.int64))[left] == right
    # Of several edges between the same two vertices the last one.
    chosen = torch.zeros(len(partner), dtype=torch.int64)
    chosen[left[edge]] = edge.nonzero().squeeze(1)
    return torch.zeros(len(left), dtype=torch.bool).index_fill(0, chosen, True)
