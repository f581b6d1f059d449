"""Projection in the metric of a layer's data: sums of blocks of bounded rank, one block after the other.

Every class whose matrices are sums of dense or low-rank blocks at given places (low rank, block diagonal, block
sparse, Monarch, Pixelfly, and their sums) is fitted by one method, block coordinate descent: given all other blocks the
best one is known in closed form, by the truncated singular value decomposition in the metric of its rows and columns.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from structmat.projection.truncated import GRAM_SHARE_SINGLE, truncated_svd

# A sweep that takes off less than this share of the squared error is the last one: on the layers of MiniLM that is
# after about twelve, within 3 % of the error that sixty sweeps reach.
_SMALLEST_STEP = 5e-3
SWEEPS = 60


@dataclasses.dataclass
class Blocks:
    """Blocks of one size in the same columns and in disjoint rows: each is ``left @ right``, or ``left`` alone.

    Args:
        rows: (count, s), indices.
        cols: (p), indices.
        left: (count, s, rank), or (count, s, p) without right.
        right: (count, rank, p), or None for blocks of any rank.
        keep: (count), the rank of each block where it is below that of the factors.
    """

    rows: Tensor
    cols: Tensor
    left: Tensor
    right: Tensor | None = None
    keep: Tensor | None = None

    def product(self, index: slice = slice(None)) -> Tensor:
        """The blocks (count, s, p)."""
        return self.left[index] if self.right is None else self.left[index] @ self.right[index]


@dataclasses.dataclass(frozen=True)
class Metric:
    """The norm ``|T^(1/2) E S^(1/2)|_F`` for errors E of shape (m, n); S and T Hermitian, double precision.

    Args:
        S: (n, n), the inputs' second moments.
        T: (m, m), the output gradients', or None for the identity.
    """

    S: Tensor
    T: Tensor | None = None

    def damped(self, share: float) -> Metric:
        """With ``share`` of the mean of its diagonal added to each diagonal: directions that no input showed count."""
        return Metric(_damped(self.S, share), None if self.T is None else _damped(self.T, share))

    def to(self, dtype: torch.dtype) -> Metric:
        """The same in another precision."""
        return self if dtype == self.S.dtype else Metric(self.S.to(dtype), None if self.T is None else self.T.to(dtype))

    def squared(self, E: Tensor) -> float:
        """The square of the norm of E (m, n), of the metric's dtype."""
        weighted = E @ self.S if self.T is None else self.T @ E @ self.S
        return max(torch.sum((E.conj() * weighted).real).item(), 0.0)

    def padded(self, m: int, n: int) -> Metric:
        """For matrices with further rows and columns, in which nothing is expected and nothing gained."""
        return Metric(_padded(self.S, n), None if self.T is None else _padded(self.T, m))


def _damped(moments: Tensor, share: float) -> Tensor:
    mean = moments.diagonal().real.mean()
    return moments + torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * (share * mean)


def _padded(moments: Tensor, size: int) -> Tensor:
    if size == len(moments):
        return moments
    mean = moments.diagonal().real.mean()
    wide = torch.eye(size, dtype=moments.dtype, device=moments.device) * torch.where(mean > 0, mean, 1)
    wide[: len(moments), : len(moments)] = moments
    return wide


def cholesky(moments: Tensor) -> Tensor:
    """The lower factor of moments; raises unless they are positive definite."""
    factor, failed = torch.linalg.cholesky_ex(moments)
    if failed.any():
        raise ValueError(
            "the moments are singular to rounding: there are fewer inputs than columns, or some never vary. Raise "
            "damping"
        )
    return factor


@torch.no_grad()
def descend(W: Tensor, terms: list[Blocks], metric: Metric, sweeps: int = SWEEPS) -> float:
    """Improve blocks in place until their sum is nearest to W that one block at a time can make it.

    Each step replaces a block by the best one for what all others leave: with ``S = L L^H`` and ``T = K K^H`` of its
    columns and rows, ``K^-H [A] L^-1`` where [A] is the truncated singular value decomposition (Eckart and Young) of
    ``A = K^H X L`` and X the best block of full rank. So no step increases the error. A single block (low rank) is at
    its optimum after one step, as are blocks of full rank with T = 1. Blocks in the same columns are independent where
    T = 1, and are decomposed as a batch.

    Args:
        W: (m, n), double precision.
        terms: the blocks, double precision, inside of (m, n).
        metric: of the same sizes, positive definite.
        sweeps: most sweeps over all terms.

    Returns:
        The square of the norm of what is left.

    Raises:
        ValueError: if the metric is singular on some block.

    Cost: 2 m n^2 operations a sweep, 2 m n (m + n) with T for each term; and the decompositions of all blocks.
    """
    return metric.squared(improve(W, terms, metric, sweeps)[0])


@torch.no_grad()
def improve(W: Tensor, terms: list[Blocks], metric: Metric, sweeps: int) -> tuple[Tensor, float]:
    """As :func:`descend`; returns what is left, and the square of the norm of what was left before the first sweep."""
    rest = W.clone()
    for term in terms:
        _add(rest, term, slice(None), -term.product())
    before = error = metric.squared(rest)
    steps: list[tuple[Blocks, slice, Tensor]] = []
    for term in terms:
        # With T the rows of a term's blocks are coupled: one after the other.
        parts = [slice(None)] if metric.T is None else [slice(i, i + 1) for i in range(len(term.rows))]
        lower = cholesky(metric.S[term.cols[:, None], term.cols])
        steps += [(term, part, lower) for part in parts]
    for _ in range(sweeps):
        gained = sum(_step(rest, term, part, metric, lower) for term, part, lower in steps)
        error = max(error - gained, 0.0)
        if len(steps) == 1 or gained <= _SMALLEST_STEP * error:
            break
    return rest, before


@torch.no_grad()
def low_rank_losses(W: Tensor, metric: Metric, damping: float) -> tuple[Tensor, Tensor]:
    """What the best matrices of every rank miss of W, from one decomposition.

    They are the best in the damped metric: ``K^-H [K^H W L]_r L^-1`` as in :func:`descend`.

    Args:
        W: (m, n), double precision.
        metric: of the same sizes, not damped.
        damping: for :meth:`Metric.damped`.

    Returns:
        The squared norms in the metric, without damping, and the squared Frobenius norms, of what rank 0, 1, ...,
        min(m, n) leaves.

    Raises:
        ValueError: if the damped metric is singular.
    """
    damped = metric.damped(damping)
    lower = cholesky(damped.S)
    upper = None if damped.T is None else cholesky(damped.T).mH
    seen = (W if upper is None else upper @ W) @ lower
    # The singular vectors of the shorter side, from the smaller Gram matrix: several times faster than the whole
    # decomposition, and seen = seen V V^H to rounding whatever their order among tiny singular values.
    if W.shape[0] >= W.shape[1]:
        vectors = torch.linalg.eigh(seen.mH @ seen)[1].flip(-1)
        left, right = seen @ vectors, vectors.mH
    else:
        left = torch.linalg.eigh(seen @ seen.mH)[1].flip(-1)
        right = left.mH @ seen
    left, right = _back(left, upper), torch.linalg.solve_triangular(lower, right, upper=False, left=False)

    def tails(S: Tensor | None, T: Tensor | None) -> Tensor:
        # |sum_i p_i q_i|^2 over i >= r is the sum over i, j >= r of (p_j^H T p_i) (q_i S q_j^H).
        inner = (right if S is None else right @ S) @ right.mH
        outer = left.mH @ (left if T is None else T @ left)
        pairs = (outer.mT * inner).real.flip(0, 1)
        sums = pairs.cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
        return torch.cat([sums, sums.new_zeros(1)])

    return tails(metric.S, metric.T), tails(None, None)


def _step(rest: Tensor, term: Blocks, index: slice, metric: Metric, lower: Tensor) -> float:
    """Replace some blocks of a term by the best ones; by how much the squared error falls."""
    rows, old = term.rows[index], term.product(index)
    if metric.T is None:
        upper = None
        slope = (rest[rows.flatten()] @ metric.S[:, term.cols]).unflatten(0, rows.shape)
    else:
        upper = cholesky(metric.T[rows[0][:, None], rows[0]]).mH
        slope = (metric.T[rows[0]] @ rest @ metric.S[:, term.cols])[None]
        slope = torch.linalg.solve_triangular(upper.mH, slope, upper=False)
    change = torch.linalg.solve_triangular(lower.mH, slope, upper=True, left=False)
    target = (old if upper is None else upper @ old) @ lower + change
    gained = torch.sum(change.abs().square())
    if term.right is None:
        new = _back(torch.linalg.solve_triangular(lower, target, upper=False, left=False), upper)
        _add(rest, term, index, old - new)  # before the block, of which `old` is a view, is overwritten
        term.left[index] = new
    else:
        keep = None if term.keep is None else term.keep[index]
        left, right, lost = truncated_svd(target, term.right.shape[-2], keep, GRAM_SHARE_SINGLE)
        gained = gained - lost.square().sum()
        term.left[index] = _back(left, upper)
        term.right[index] = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
        _add(rest, term, index, old - term.product(index))
    return gained.item()


def _back(left: Tensor, upper: Tensor | None) -> Tensor:
    return left if upper is None else torch.linalg.solve_triangular(upper, left, upper=True)


def _add(rest: Tensor, term: Blocks, index: slice, blocks: Tensor) -> None:
    rows = term.rows[index].reshape(-1, 1)
    rest[rows, term.cols] += blocks.flatten(0, 1)
