"""Krylov products of subdiagonal operators: ``sum_k c_k A^k g`` and its transpose, by divide and conquer.

``(A^k g)[i] = a[i - k] ... a[i - 1] g[i - k]``: a Toeplitz matrix of the c's, times entry by entry the matrix of the
products ``P[i, j] = a[j] ... a[i - 1]``. Where j is left and i right of a cut, P is a prefix product from the cut times
a suffix product to it: of rank 1, so that each level of a tree of cuts is one batched convolution. Blocks at its leaves
are multiplied out. Products of entries are taken by doubling, never by quotients: no number overflows unless an entry
of a power of A does, and gradients exist at zeros. With a corner the sequence is continued to the left, periodically.

Shapes: a (*batch, m - 1 or, with a corner, m), g (*batch, r, m), c (*batch, tokens, r, count), count <= m.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.matrices.displacement._convolution import good_size, transform, untransform

#: Longest block that is multiplied out.
LEAF = 32


def _sizes(m: int, count: int, corner: bool) -> tuple[int, int, int]:
    """How many entries the sequence is continued by, the leaves' length, and their number, a power of two."""
    lead = count - 1 if corner else 0
    leaves = 1
    while leaves * LEAF < m + lead:
        leaves *= 2
    return lead, -(-(m + lead) // leaves), leaves


def _segments(t: Tensor, m: int, lead: int, leaf: int, leaves: int) -> Tensor:
    """The last dimension from -lead on, with zeros to the end, in segments: (*batch, leaves, leaf)."""
    if lead:
        t = torch.cat([t[..., m - lead :], t], -1)
    return F.pad(t, (0, leaf * leaves - t.shape[-1])).unflatten(-1, (leaves, leaf))


def _down(t: Tensor, steps: int) -> Tensor:
    return F.pad(t[..., :-steps], (steps, 0))


def _local(links: Tensor, g: Tensor, count: int) -> Tensor:
    """``A^k g`` for k < count within the segments: links (*batch, S, leaf - 1), g (*batch, r, S, leaf).

    Returns:
        Shape (*batch, r, count, S, leaf).
    """
    power = F.pad(links, (1, 0)).unsqueeze(-3).unsqueeze(-3)  # A^k moves by k and multiplies by this
    columns, k = g.unsqueeze(-3), 1
    batch = torch.broadcast_shapes(columns.shape[:-4], power.shape[:-4])
    columns = columns.expand(*batch, *columns.shape[-4:])
    while k < count:
        columns = torch.cat([columns, power * _down(columns, k)], -3)
        power, k = power * _down(power, k), 2 * k
    return columns[..., :count, :, :]


def _levels(a: Tensor, leaf: int, leaves: int, count: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For every level: half of a node's length s, how far its cut reaches w, and the products to and from the cut.

    Of segments (*batch, S, s) the products are (*batch, S / 2, w): of the last w entries of a left half up to the cut,
    and from the cut to each of the first w entries of the right half.
    """
    # Within a leaf, by doubling: products from its start to i, and from i to its end.
    before, after = _scan(F.pad(a[..., :-1], (1, 0), value=1.0)), _scan(a.flip(-1)).flip(-1)
    s = leaf
    while s < leaf * leaves and count > 1:
        w = min(s, count)
        left, right = after.unflatten(-2, (-1, 2)).unbind(-2)
        first, second = before.unflatten(-2, (-1, 2)).unbind(-2)
        yield s, w, left[..., s - w :], second[..., :w]
        before = torch.cat([first, left[..., :1] * second], -1)
        after = torch.cat([left * right[..., :1], right], -1)
        s *= 2


def _scan(t: Tensor) -> Tensor:
    """Products of the first i + 1 entries; cumprod's gradient divides by them."""
    step = 1
    while step < t.shape[-1]:
        t = torch.cat([t[..., :step], t[..., step:] * t[..., :-step]], -1)
        step *= 2
    return t


def krylov_sum(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """``sum_j,k c[j, k] A^k g_j``: shape (*batch, tokens, m)."""
    m, count = g.shape[-1], c.shape[-1]
    lead, leaf, leaves = _sizes(m, count, a.shape[-1] == m)
    a, g = (_segments(t, m, lead, leaf, leaves) for t in (a, g))
    near = min(leaf, count)
    y = torch.einsum("...trk,...rksi->...tsi", c[..., :near], _local(a[..., :-1], g, near)).flatten(-2)
    for s, w, to_cut, from_cut in _levels(a, leaf, leaves, count):
        left = g.flatten(-2).unflatten(-1, (-1, 2, s))[..., 0, s - w :]
        size = good_size(2 * w)
        sums = torch.einsum(
            "...trf,...rpf->...tpf",
            transform(c[..., : 2 * w], size),
            transform(to_cut.unsqueeze(-3) * left, size),
        )
        right = untransform(sums, size, y.dtype)[..., w : 2 * w] * from_cut.unsqueeze(-3)
        y = y + F.pad(right, (s, s - w)).flatten(-2)
    return y[..., lead : lead + m]


def krylov_coefficients(a: Tensor, h: Tensor, x: Tensor, count: int) -> Tensor:
    """``h_j^T A^k x`` for k < count and x of shape (*batch, tokens, m): shape (*batch, tokens, r, count)."""
    m = h.shape[-1]
    lead, leaf, leaves = _sizes(m, count, a.shape[-1] == m)
    a, x = (_segments(t, m, lead, leaf, leaves) for t in (a, x))
    h = F.pad(h, (lead, leaf * leaves - m - lead)).unflatten(-1, (leaves, leaf))  # the continuation is input only
    near = min(leaf, count)
    local = _local(a[..., :-1].flip(-1), h.flip(-1), near)
    z = F.pad(torch.einsum("...tsi,...rksi->...trk", x.flip(-1), local), (0, count - near))
    for s, w, to_cut, from_cut in _levels(a, leaf, leaves, count):
        left = x.flatten(-2).unflatten(-1, (-1, 2, s))[..., 0, s - w :]
        right = h.flatten(-2).unflatten(-1, (-1, 2, s))[..., 1, :w]
        size = good_size(2 * w)
        # Entry i behind the cut and j + 1 before it are i + j + 1 apart.
        sums = torch.einsum(
            "...tpf,...rpf->...trf",
            transform((to_cut.unsqueeze(-3) * left).flip(-1), size),
            transform(from_cut.unsqueeze(-3) * right, size),
        )
        apart = untransform(sums, size, z.dtype)[..., : min(2 * w - 1, count - 1)]
        z = z + F.pad(apart, (1, count - 1 - apart.shape[-1]))
    return z


def krylov_flops(m: int, r: int, count: int, corner: bool, complex: bool) -> int:
    """Operations of either function for one vector; of complex numbers, complex ones."""
    _, leaf, leaves = _sizes(m, count, corner)
    total, s = (3 * r + 1) * min(leaf, count) * leaf * leaves, leaf
    while s < leaf * leaves and count > 1:
        pairs, size = leaf * leaves // (2 * s), good_size(2 * min(s, count))
        logs = (1.25 if complex else 2.5) * size * size.bit_length()
        total += int((pairs + r) * logs) + (2 if complex else 4) * pairs * (r + 1) * (size + 2)
        total += 2 * min(s, count) * pairs
        s *= 2
    return total
