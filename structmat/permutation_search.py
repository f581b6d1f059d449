"""The search for an order of hidden units in which the matrices on both sides of them have more structure.

Hidden units are rows of some matrices and columns of others. Where the structure puts a unit, its row (column) lies in
a space of few dimensions that it shares with others there: the rows that a slice of a Monarch matrix holds share its
right factor. So this is a clustering of units by spaces, in clusters of given sizes; it is done as k-spaces clustering
does (Bradley & Mangasarian 2000): spaces are fitted to the units, and units assigned to spaces, in turns, here in the
metric of data, and by a linear assignment.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.calibrated import _blocks, fit, metric_of
from structmat.config import Config
from structmat.projection.moments import Moments
from structmat.projection.weighted import Blocks, Metric

# Most units that one linear assignment takes, whose time grows with the cube; of more, random parts one by one.
_MOST = 2048
# Most rounds of fitting and assigning, and the share of the error below which a round is the last one.
_ROUNDS = 12
_SMALLEST_GAIN = 1e-3
# Sweeps of the fits that the rounds compare.
_SWEEPS = 4


@dataclasses.dataclass(frozen=True)
class Member:
    """A matrix with the hidden units as rows, or as columns.

    Args:
        weight: (m, n), double precision.
        moments: of its layer, or None for plain errors.
        config: what it is to become.
        columns: whether the units are its columns.
        whole: whether heads move in it as they are: query and key projections.
    """

    weight: Tensor
    moments: Moments | None
    config: Config
    columns: bool
    whole: bool = False

    def permuted(self, order: Tensor) -> Member:
        """With the units ``order[0], order[1], ...`` at the places 0, 1, ..."""
        weight = self.weight[:, order] if self.columns else self.weight[order]
        moments = None if self.moments is None else permuted_moments(self.moments, order, self.columns)
        return dataclasses.replace(self, weight=weight, moments=moments)


def permuted_moments(moments: Moments, order: Tensor, columns: bool) -> Moments:
    """The moments of a layer whose inputs (``columns``) or outputs have been put into another order."""
    order = order.to(moments.mean.device)
    if columns:
        return dataclasses.replace(moments, inputs=moments.inputs[order][:, order], mean=moments.mean[order])
    outputs = moments.outputs
    return moments if outputs is None else dataclasses.replace(moments, outputs=outputs[order][:, order])


def head_order(order: Tensor, heads: int) -> Tensor:
    """Of an order that keeps heads together, the one that moves the heads and nothing inside of them."""
    size = len(order) // heads
    first = order.view(heads, size)[:, 0] // size * size
    return (first[:, None] + torch.arange(size, device=order.device)).flatten()


@torch.no_grad()
def search_order(members: list[Member], heads: int | None, move_heads: bool, damping: float, seed: int) -> Tensor:
    """An order of the units in which the members' squared relative errors have a smaller sum; or the order as it is.

    Args:
        members: matrices that share the units.
        heads: units stay together in so many groups of consecutive ones; None for all units free.
        move_heads: whether the groups may change places.
        damping: of the moments.
        seed: of the parts into which many units are divided.

    Returns:
        The units by their new places, an integer tensor on the CPU.

    Cost: for each of at most 12 rounds a short fit of every member and a linear assignment.
    """
    units = members[0].weight.shape[1 if members[0].columns else 0]
    rng, whole = np.random.default_rng(seed), [member.whole for member in members]
    order = torch.arange(units)
    if all(whole):  # heads of queries and keys alone: there is nothing that they come with
        return order
    error, fitted = _fitted(members, order, heads, damping)
    best = error, order
    places = [_spaces_of(member, value)[0] for member, value in zip(members, fitted, strict=True)]
    close = [_clusters(member, group, damping, rng) for member, group in zip(members, places, strict=True)]
    for spectral in (False, True):
        penalty = 0.0
        for turn in range(_ROUNDS):
            if spectral and turn == 0:
                priced = list(zip(places, close, strict=True))
            else:
                now = [_in_order(member, order, heads) for member in members]
                priced = [_prices(member, value, damping) for member, value in zip(now, fitted, strict=True)]
            move = _assign(priced, whole, penalty, heads, move_heads, rng)
            trial = torch.arange(units)[move] if spectral and turn == 0 else order[move]
            if torch.equal(trial, order):
                break
            after, values = _fitted(members, trial, heads, damping)
            if after < error or (spectral and turn == 0):
                gain, order, error, fitted = error - after, trial, after, values
                if 0 < gain < _SMALLEST_GAIN * error:
                    break
            else:  # all moved at once, though columns depend on each other: fewer moves
                penalty = 4 * penalty or 0.1 * sum(p.mean().item() for _, p in priced)
        if error < best[0]:
            best = error, order
    return best[1]


def _in_order(member: Member, order: Tensor, heads: int | None) -> Member:
    order = order.to(member.weight.device)
    return member.permuted(head_order(order, heads) if member.whole and heads else order)


def _fitted(
    members: list[Member], order: Tensor, heads: int | None, damping: float
) -> tuple[float, list[StructuredMatrix]]:
    """The sum of squared relative errors, and the matrices."""
    total, values = 0.0, []
    for member in (_in_order(m, order, heads) for m in members):
        value = member.config._project(member.weight)[0]
        if member.moments is not None:
            value = fit(value, member.weight, member.moments, damping, _SWEEPS)
        metric = _metric(member, damping)
        total += _squared(metric, member.weight - value.to_dense()) / (_squared(metric, member.weight) or 1.0)
        values.append(value)
    return total, values


def _metric(member: Member, damping: float) -> Metric | None:
    return None if member.moments is None else metric_of(member.moments, member.weight).damped(damping)


def _squared(metric: Metric | None, E: Tensor) -> float:
    return torch.linalg.vector_norm(E).item() ** 2 if metric is None else metric.squared(E)


# ---------------------------------------------------------------- what a unit would cost in another place
def _prices(member: Member, value: StructuredMatrix, damping: float) -> tuple[Tensor, Tensor]:
    """Of every place its group, (N), and of every unit what its row would miss in each group, (N, groups).

    That is the least that its own error and its correlations with the errors of others, as they are now, can be made
    by a row in the group's space.
    """
    metric, W = _metric(member, damping), member.weight
    group, spaces = _spaces_of(member, value)
    M = value.to_dense()
    whole = _squared(metric, W) or 1.0
    own, other = (None, None) if metric is None else (metric.T, metric.S)
    if member.columns:  # tr(T E S E^H) = tr(S^T E^T T^T conj(E))
        own, other = (None, None) if metric is None else (metric.S.mT, None if metric.T is None else metric.T.mT)
        W, M = W.mT, M.mT
    if own is None:
        target, size = W, torch.ones(len(W), dtype=torch.float64, device=W.device)
    else:
        size = own.diagonal().real
        target = M + own @ (W - M) / torch.where(size > 0, size, 1)[:, None]
    weighted = target if other is None else target @ other
    norm = torch.sum((weighted * target.conj()).real, -1)
    prices = [size * (norm - _explained(weighted, space, other)) / whole for space in spaces]
    return group, torch.stack(prices, -1).cpu()


def _clusters(member: Member, group: Tensor, damping: float, rng: np.random.Generator) -> Tensor:
    """Of every unit its distances from the centres of clusters as large as the groups, found by spectral clustering.

    Source: Ng, Jordan & Weiss 2002, "On spectral clustering"; affinities are squared cosines, large in a common space.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse.linalg import eigsh

    count, units = int(group.max()) + 1, len(group)
    if member.whole or count == 1 or units > _MOST or units <= count + 1:
        return torch.zeros(units, count, dtype=torch.float64)
    metric, rows = _metric(member, damping), member.weight
    if metric is not None and not member.columns:
        rows = rows @ torch.linalg.cholesky(metric.S)
    rows = torch.nn.functional.normalize((rows.mT if member.columns else rows).to(rows.dtype), dim=-1)
    near = (rows @ rows.mH).abs().square().cpu().numpy()
    scale = np.maximum(near.sum(1), 1e-300) ** -0.5  # a row of zeros is near to nothing
    vectors = eigsh(scale[:, None] * near * scale, count, v0=np.ones(units))[1]
    points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    chosen = [int(rng.integers(units))]
    while len(chosen) < count:  # the farthest one from those there are
        chosen.append(int(((points[:, None] - points[chosen]) ** 2).sum(-1).min(1).argmax()))
    centres, places, distances = points[chosen], group.numpy(), np.zeros((units, count))
    for _ in range(_ROUNDS):
        distances = ((points[:, None] - centres) ** 2).sum(-1)
        held = places[linear_sum_assignment(distances[:, places])[1]]
        moved = np.stack([points[held == g].mean(0) for g in range(count)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return torch.from_numpy(distances)


def _spaces_of(member: Member, value: StructuredMatrix) -> tuple[Tensor, list[Tensor]]:
    parts = _blocks(value)
    assert parts is not None
    m, n = member.weight.shape
    units, width = (n, m) if member.columns else (m, n)
    group, spaces = _spaces(parts.blocks, units, width, parts.size, member.columns)
    return group.cpu(), spaces


def _explained(weighted: Tensor, space: Tensor, other: Tensor | None) -> Tensor:
    """The squared norms of the projections on a space, spanned by rows, of vectors already times the metric."""
    gram = (space if other is None else space @ other) @ space.mH
    values, vectors = torch.linalg.eigh(gram)
    good = values > 1e-12 * values.amax() if len(values) else values > 0
    inner = weighted @ space.mH @ vectors[:, good]
    return torch.sum(inner.abs().square() / values[good], -1)


def _spaces(
    blocks: list[Blocks], units: int, width: int, size: tuple[int, int], columns: bool
) -> tuple[Tensor, list[Tensor]]:
    """The groups of places of which rows (columns) lie in the same space, and of each group vectors that span it."""
    device, long = blocks[0].rows.device, size[1 if columns else 0]
    # Which part of each block a place belongs to, -1 for none.
    belongs = torch.full((len(blocks), long), -1, device=device)
    for b, block in enumerate(blocks):
        if columns:
            belongs[b, block.cols] = 0
        else:
            count = len(block.rows)
            belongs[b, block.rows] = torch.arange(count, device=device)[:, None].expand_as(block.rows)
    kinds, group = torch.unique(belongs[:, :units], dim=1, return_inverse=True)
    return group, [_span(blocks, kind.tolist(), size[0 if columns else 1], columns)[:, :width] for kind in kinds.mT]


def _span(blocks: list[Blocks], kind: list[int], width: int, columns: bool) -> Tensor:
    vectors = []
    for block, part in zip(blocks, kind, strict=True):
        if part < 0:
            continue
        pieces = [(rows, left.mT) for rows, left in zip(block.rows, block.left, strict=True)] if columns else []
        if not columns and block.right is not None:
            pieces = [(block.cols, block.right[part])]
        if block.right is None:  # a dense block: everything in its columns (rows)
            places = block.rows.flatten() if columns else block.cols
            pieces = [(places, torch.eye(len(places), dtype=block.left.dtype, device=block.left.device))]
        for places, piece in pieces:
            wide = piece.new_zeros(len(piece), width)
            wide[:, places] = piece
            vectors.append(wide)
    return torch.cat(vectors) if vectors else blocks[0].left.new_zeros(0, width)


# ---------------------------------------------------------------- the assignment
def _joined(priced: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Prices by cell, where a cell is the places that are in one group of every member; and the cell of each place."""
    kinds, cell = torch.unique(torch.stack([group for group, _ in priced]), dim=1, return_inverse=True)
    return torch.stack([price[:, kind] for (_, price), kind in zip(priced, kinds, strict=True)]).sum(0), cell


def _assign(
    priced: list[tuple[Tensor, Tensor]],
    whole: list[bool],
    penalty: float,
    heads: int | None,
    move_heads: bool,
    rng: np.random.Generator,
) -> Tensor:
    """The units, by their present places, in the order of their new ones: of the least sum of prices."""
    from scipy.optimize import linear_sum_assignment

    price, cell = _joined([p for p, w in zip(priced, whole, strict=True) if not w])
    units, tie = len(cell), 1e-9 * price.abs().mean().item()
    price[torch.arange(units), cell] -= penalty + tie  # what is not gained by moving stays
    if heads is None:
        target = cell.clone()
        for part in np.array_split(rng.permutation(units), -(-units // _MOST)):
            places = cell[part]
            rows, columns = linear_sum_assignment(price[part][:, places].numpy())
            target[part[rows]] = places[columns]
        return _places(cell, target)
    size = units // heads
    costs, inner = np.full((heads, heads), np.inf), {}
    for a in range(heads):
        for b in range(heads) if move_heads else [a]:
            here, there = slice(a * size, a * size + size), slice(b * size, b * size + size)
            matrix = price[here][:, cell[there]].numpy()
            rows, columns = linear_sum_assignment(matrix)
            alone = torch.from_numpy(rows[columns.argsort()])
            inner[a, b] = _places(cell[here], cell[there][columns]) if a == b else alone
            costs[a, b] = matrix[rows, columns].sum() - (tie if a == b else 0)
            for (group, prices), w in zip(priced, whole, strict=True):
                if w:
                    costs[a, b] += prices[here].gather(1, group[there][:, None]).sum().item()
    heads_in, heads_out = linear_sum_assignment(np.where(np.isinf(costs), 1e300, costs))
    move = torch.empty(units, dtype=torch.long)
    for a, b in zip(heads_in.tolist(), heads_out.tolist(), strict=True):
        move[b * size : b * size + size] = a * size + inner[a, b]
    return move


def _places(cell: Tensor, target: Tensor) -> Tensor:
    """An order that brings every unit into its target cell, and leaves those where they are that are in it."""
    move = torch.arange(len(cell))
    leaving = (cell != target).nonzero()[:, 0]
    arriving = leaving[target[leaving].argsort(stable=True)]
    move[leaving[cell[leaving].argsort(stable=True)]] = arriving
    return move
