"""Blocks plus low rank, fitted to a matrix: alternating least squares over what the blocks miss.

The blocks stand at given places, or where the matrix wants them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_int, check_tensor
from structmat.layouts.layout import blocks_of
from structmat.projection.truncated import truncated_svd, work_dtype

# A sweep that takes off less than this share of the squared error is the last one.
_SMALLEST_STEP = 1e-4
# Sweeps between two choices of the blocks, and the most choices.
_SWEEPS_A_CHOICE, _CHOICES = 4, 60
# Eigenvalues of normal matrices, of at most 1, below which a direction is not seen outside of the blocks.
_UNSEEN = 1e-9
# Squares of pivots, below which a pseudo-inverse looks for such directions.
_WELL_SEEN = 1e-4


def _norm(W: Tensor) -> Tensor:
    return torch.linalg.vector_norm(W, dim=(-2, -1))


@torch.no_grad()
def project_pixelfly(
    W: Tensor, mask: Tensor, block: tuple[int, int], rank: int, sweeps: int = 200
) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right factors whose product is near to W outside of the blocks of ``mask``, where W is left as it is.

    The sum of blocks S and low rank L that is nearest to W has S = W - L on the blocks: what remains is to complete
    a matrix of low rank, known outside. Both orders are starts, low rank first (of W) and blocks first (low rank of W
    without them), and the better end is taken: each alone ends in a local minimum now and then. Given the right factor
    the rows of the left one solve least squares problems, of one matrix for every block row; and so the other way. No
    sweep increases the error; the last one is where its square falls by less than 1e-4 of it. Sums of generic factors
    that the rest of the matrix determines are found to rounding.

    Args:
        W: shape (*batch, m, n), floating point or complex, finite.
        mask: (ceil(m / bo), ceil(n / bi)), bool: the blocks.
        block: bo and bi.
        rank: of the product, from 0 to min(m, n).
        sweeps: most sweeps.

    Returns:
        left (*batch, m, rank) and right (*batch, rank, n), in double precision, singular values split evenly; and the
        norm of the error (*batch): never above that of the best low-rank matrix alone, or of the blocks alone.

    Raises:
        ValueError: if the rank is out of range, or W has NaN or infinite entries.

    Cost: two truncated singular value decompositions; for each start 8 m n rank operations a sweep, and of every block
    row and column the decomposition of a rank x rank matrix. Source: Chen et al. 2021, "Scatterbrain", for the sum.

    Example:
        >>> import torch
        >>> from structmat.projection import project_pixelfly
        >>> g = torch.Generator().manual_seed(0)
        >>> u, S = torch.randn(16, 1, generator=g).double(), torch.randn(4, 4, 4, generator=g).double()
        >>> L = u @ u.mT
        >>> W = L + torch.block_diag(*S)
        >>> left, right, lost = project_pixelfly(W, torch.eye(4, dtype=torch.bool), (4, 4), 1)
        >>> (left @ right - L).norm().item() < 1e-10, lost.item() < 1e-10
        (True, True)
    """
    flat, size = _scaled(W, rank)
    m, n = W.shape[-2:]
    mask = mask.to(W.device)
    free = ~_entries(mask, block, m, n)
    outside = flat * free
    if rank == 0:
        left, right, lost = flat[..., :0], flat[:, :0], _norm(outside)
    else:
        low_left, low_right, _ = truncated_svd(flat, rank)
        other_left, other_right, _ = truncated_svd(outside, rank)
        left, right, lost = _alternate(outside, free, ~mask, block, low_left, low_right, sweeps)
        *other, other_lost = _alternate(outside, free, ~mask, block, other_left, other_right, sweeps)
        # Of two that are equally near the second, whose factors hold nothing of the blocks that they need not.
        better = (other_lost <= lost * (1 + 1e-9) + 1e-13 * _norm(outside)).view(-1, 1, 1)
        left, right = torch.where(better, other[0], left), torch.where(better, other[1], right)
        left, right, lost = *_balanced(left, right), torch.where(better.flatten(), other_lost, lost)
    return _unscaled(left, right, lost, size, W.shape[:-2])


@torch.no_grad()
def project_free_blocks(
    W: Tensor, count: int, block: tuple[int, int], rank: int, sweeps: int = 200
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`project_pixelfly`, with the ``count`` blocks wherever they lower the error most: a robust low rank.

    Given the low rank L, the best blocks are those where W - L is largest; given the blocks, a few sweeps of least
    squares fit L outside of them. In turns, until the choice repeats itself; the error never grows. Low rank of W, W
    without its largest blocks, and ranks that grow from 1 are the starts, and the best end is taken, so that the error
    is not above that of the best low-rank matrix alone or of the largest blocks alone. All matrices of a batch share
    the blocks.

    Args:
        W: shape (*batch, m, n), floating point or complex, finite.
        count: how many blocks, at least 1.
        block: height and width of a block.
        rank: of the product, from 0 to min(m, n).
        sweeps: most sweeps for the last choice of blocks.

    Returns:
        The mask (ceil(m / bo), ceil(n / bi)) on the CPU; left, right and the norm of the error as
        :func:`project_pixelfly`.

    Source: Candès, Li, Ma and Wright 2011, "Robust principal component analysis?", for the problem, there convex and
    entry by entry; Netrapalli et al. 2014 for alternating projections with growing ranks.
    """
    flat, size = _scaled(W, rank)
    m, n = W.shape[-2:]
    # The blocks are shared: the matrices of a batch count by their true sizes.
    weights = (size / size.amax()).square() if flat.numel() else size

    def choose(rest: Tensor) -> Tensor:
        norms = (blocks_of(rest.abs().square(), block).sum((-2, -1)) * weights).sum(0)
        mask = torch.zeros(norms.numel(), dtype=torch.bool, device=W.device)
        mask[norms.flatten().argsort(descending=True, stable=True)[:count]] = True
        return mask.view(norms.shape)

    def fit(mask: Tensor, left: Tensor, right: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        free = ~_entries(mask, block, m, n)
        return _alternate(flat * free, free, ~mask, block, left, right, most)

    if rank == 0 or not flat.numel():
        mask = choose(flat)
        lost = _norm(flat * ~_entries(mask, block, m, n))
        left, right = flat.new_zeros(*flat.shape[:2], rank), flat.new_zeros(flat.shape[0], rank, n)
        return mask.cpu(), *_unscaled(left, right, lost, size, W.shape[:-2])
    largest = choose(flat)
    starts = [truncated_svd(flat, rank)[:2], truncated_svd(flat * ~_entries(largest, block, m, n), rank)[:2]]
    grown = flat[..., :0], flat[:, :0]
    for step in sorted({max(1, rank * k // 4) for k in range(1, 5)}):
        rest = flat - grown[0] @ grown[1]
        grown = truncated_svd(flat * ~_entries(choose(rest), block, m, n), step)[:2]
        mask = choose(flat - grown[0] @ grown[1])
        grown = fit(mask, *grown, _SWEEPS_A_CHOICE)[:2]
    best: tuple[float, Tensor, Tensor, Tensor, Tensor] | None = None
    for left, right in [*starts, grown]:
        mask, before = choose(flat - left @ right), None
        for _ in range(_CHOICES):
            left, right, _ = fit(mask, left, right, _SWEEPS_A_CHOICE)
            before, mask = mask, choose(flat - left @ right)
            if torch.equal(mask, before):
                break
        left, right, lost = fit(mask, left, right, sweeps)
        total = (lost.square() * weights.flatten()).sum().item()
        if best is None or total < best[0]:
            best = total, mask, left, right, lost
    assert best is not None
    _, mask, left, right, lost = best
    return mask.cpu(), *_unscaled(*_balanced(left, right), lost, size, W.shape[:-2])


def _scaled(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrices one after another, in double precision, with entries up to 1; and what they were divided by."""
    check_tensor("W", W, 2)
    m, n = W.shape[-2:]
    if check_int("rank", rank, 0) > min(m, n):
        raise ValueError(f"rank must be at most min(m, n) = {min(m, n)}, got {rank}")
    if not torch.isfinite(W).all():
        raise ValueError("W has NaN or infinite entries")
    flat = W.reshape(-1, m, n).to(work_dtype(W))
    size = flat.abs().amax((-2, -1), keepdim=True) if flat.numel() else flat.real.new_ones(flat.shape[0], 1, 1)
    size = torch.where(size > 0, size, 1)
    return flat / size, size


def _unscaled(
    left: Tensor, right: Tensor, lost: Tensor, size: Tensor, batch: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    scale = size.sqrt()
    return (
        (left * scale).reshape(*batch, *left.shape[-2:]),
        (right * scale).reshape(*batch, *right.shape[-2:]),
        (lost * size.flatten()).reshape(batch),
    )


def _entries(mask: Tensor, block: tuple[int, int], m: int, n: int) -> Tensor:
    return mask.repeat_interleave(block[0], 0)[:m].repeat_interleave(block[1], 1)[:, :n]


def _alternate(
    outside: Tensor, free: Tensor, cells: Tensor, block: tuple[int, int], left: Tensor, right: Tensor, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares for the left factor and the right one in turns; the factors of the least error, and it."""
    residual = outside - (left @ right) * free
    lost = _norm(residual)
    best = left, right
    floor = 1e-15 * _norm(outside)
    for _ in range(sweeps if outside.numel() else 0):
        before = lost
        for _ in range(2):  # the left factor; then, all transposed, the right one; and back
            q, r = torch.linalg.qr(right.mH)
            right, left = q.mH, left @ r.mH
            left = left + _rows(residual, right, cells, block)
            residual = outside - (left @ right) * free
            outside, residual, free, cells, block = outside.mT, residual.mT, free.mT, cells.mT, (block[1], block[0])
            left, right = right.mT, left.mT
        error = _norm(residual)
        better = (error < lost).view(-1, 1, 1)
        best = torch.where(better, left, best[0]), torch.where(better, right, best[1])
        lost = torch.minimum(lost, error)
        if ((lost <= floor) | (lost.square() >= (1 - _SMALLEST_STEP) * before.square())).all():
            break
    return *best, lost


def _rows(residual: Tensor, right: Tensor, cells: Tensor, block: tuple[int, int]) -> Tensor:
    """What to add to the left factor: the least squares solution of every row over the columns that it sees.

    As a correction it is exact where the factor is, whatever the errors of the inverses.
    """
    (bo, bi), (m, n) = block, residual.shape[-2:]
    mb, nb = cells.shape
    pieces = F.pad(right, (0, nb * bi - n)).unflatten(-1, (nb, bi)).movedim(-2, -3)  # (G, nb, r, bi)
    grams = pieces @ pieces.mH
    seen = torch.einsum("ij,gjrs->girs", cells.to(grams.dtype), grams)
    projected = F.pad(residual @ right.mH, (0, 0, 0, mb * bo - m)).unflatten(-2, (mb, bo))
    # A factorisation takes a twentieth of the time of a pseudo-inverse, and serves where all directions are seen.
    lower, failed = torch.linalg.cholesky_ex(seen)
    poor = (failed != 0) | (lower.diagonal(dim1=-2, dim2=-1).real.square().amin(-1) < _WELL_SEEN)
    if poor.any():
        lower[poor] = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    found = torch.cholesky_solve(projected.mH, lower).mH
    if poor.any():
        found[poor] = projected[poor] @ torch.linalg.pinv(seen[poor], atol=_UNSEEN, hermitian=True)
    return found.flatten(-3, -2)[:, :m]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with singular values split evenly."""
    (p, a), (q, b) = torch.linalg.qr(left), torch.linalg.qr(right.mH)
    u, s, vh = torch.linalg.svd(a @ b.mH, full_matrices=False)
    root = s.sqrt()
    return p @ (u * root.unsqueeze(-2)), root.unsqueeze(-1) * (vh @ q.mH)
