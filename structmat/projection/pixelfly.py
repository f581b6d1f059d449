"""Blocks of a fixed support plus low rank, fitted to a matrix: alternating least squares over what the blocks miss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_int, check_tensor
from structmat.projection.truncated import truncated_svd, work_dtype

# A sweep that takes off less than this share of the squared error is the last one.
_SMALLEST_STEP = 1e-4
# Eigenvalues of normal matrices, of at most 1, below which a direction is not seen outside of the blocks.
_UNSEEN = 1e-9


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
    check_tensor("W", W, 2)
    m, n = W.shape[-2:]
    if check_int("rank", rank, 0) > min(m, n):
        raise ValueError(f"rank must be at most min(m, n) = {min(m, n)}, got {rank}")
    if not torch.isfinite(W).all():
        raise ValueError("W has NaN or infinite entries")
    batch, (bo, bi) = W.shape[:-2], block
    flat = W.reshape(-1, m, n).to(work_dtype(W))
    size = flat.abs().amax((-2, -1), keepdim=True) if flat.numel() else flat.real.new_ones(flat.shape[0], 1, 1)
    size = torch.where(size > 0, size, 1)
    flat = flat / size
    mask = mask.to(W.device)
    free = ~mask.repeat_interleave(bo, 0)[:m].repeat_interleave(bi, 1)[:, :n]
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
    scale = size.sqrt()
    return (
        (left * scale).reshape(*batch, m, rank),
        (right * scale).reshape(*batch, rank, n),
        (lost * size.flatten()).reshape(batch),
    )


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
    inverse = torch.linalg.pinv(seen, atol=_UNSEEN, hermitian=True)
    projected = F.pad(residual @ right.mH, (0, 0, 0, mb * bo - m)).unflatten(-2, (mb, bo))
    return (projected @ inverse).flatten(-3, -2)[:, :m]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with singular values split evenly."""
    (p, a), (q, b) = torch.linalg.qr(left), torch.linalg.qr(right.mH)
    u, s, vh = torch.linalg.svd(a @ b.mH, full_matrices=False)
    root = s.sqrt()
    return p @ (u * root.unsqueeze(-2)), root.unsqueeze(-1) * (vh @ q.mH)
