"""The projection of a matrix on what a config allows, with the proof of its quality."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_tensor
from structmat.base import StructuredMatrix
from structmat.calibrated import calibrated_errors, metric_of
from structmat.config import Config
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype

# Entries taken to double precision at a time when norms are measured.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Projection:
    """A structured matrix with the proof of its quality.

    Attributes:
        matrix: the projection.
        error: the achieved ``|W - M|_F / |W|_F``, measured in double precision on the returned factors.
        bound: no matrix of this structure has a smaller error; where the projection is optimal, ``error`` equals it up
            to rounding to the dtype. None for a class that does not certify its projection.
        config: what was asked for.
        guarantee: where the projection is not optimal, what ``error`` cannot exceed but for rounding; else None.
        calibrated_error: with moments, ``|T^(1/2) (W - M) S^(1/2)|_F / |T^(1/2) W S^(1/2)|_F`` where S and T are the
            second moments of inputs and of output gradients, without damping; else None.
        plain_calibrated_error: the same of the projection without moments, from which the search started.
    """

    matrix: StructuredMatrix
    error: float
    bound: float | None
    config: Config
    guarantee: float | None = None
    calibrated_error: float | None = None
    plain_calibrated_error: float | None = None


@torch.no_grad()
def residual_norm(W: Tensor, A: StructuredMatrix) -> Tensor:
    """``|W - A|_F`` over the whole batch, in double precision, a few rows at a time.

    Args:
        W: shape (*batch, m, n).
        A: a matrix of the same shape.
    """
    double = work_dtype(W)
    value = A.to(double).mT
    m, n = W.shape[-2:]
    step = max(1, _CHUNK // max(n * math.prod(W.shape[:-2]), 1))
    total = torch.zeros((), dtype=double.to_real(), device=W.device)
    for start in range(0, m, step):
        rows = torch.zeros(min(step, m - start), m, dtype=double, device=W.device)
        rows.diagonal(start).fill_(1)
        total += (W[..., start : start + step, :].to(double) - value.linear(rows)).abs().square().sum()
    return total.sqrt()


@torch.no_grad()
def project(W: Tensor, config: Config, moments: Moments | None = None, damping: float = 0.1) -> Projection:
    """The best approximation of W that a config allows, with its error and the bound that certifies it.

    With ``moments`` of the layer's inputs x the outputs count, not the entries: what is made small is
    ``E |(W - M) x|^2``, or ``E |T^(1/2) (W - M) x|^2`` with the moments T of its output gradients too. Low rank has a
    closed form (whitened singular value decomposition; Wang et al. 2024, "SVD-LLM"), and so have block-diagonal and
    block-sparse matrices (least squares, row by row); Monarch matrices, Pixelfly matrices and sums are improved block
    by block, each block exactly, and all others by L-BFGS, from the plain projection. The result is never worse than
    the plain one in the damped metric.

    Args:
        W: shape (*batch, m, n), floating point or complex, finite; (m, n) with moments.
        config: the structure and its size or budget.
        moments: of the layer's inputs, :class:`structmat.Moments`; see :func:`structmat.surgery.calibrate`.
        damping: how much a plain error counts beside the calibrated one: this share of the mean of the moments'
            diagonal is added to it. Directions that the calibration never saw are kept by it.

    Returns:
        The matrix with its relative Frobenius error (over the whole batch) and the lower bound of the structure; with
        moments, the calibrated errors too.

    Raises:
        BudgetError: if the budget cannot be met.
        TypeError: if W is not a floating-point or complex tensor.
        ValueError: if W has NaN or infinite entries, the structure does not exist for its size, moments are of other
            sizes than W, or are singular and the damping does not mend that.

    Example:
        >>> import torch, structmat
        >>> W = torch.ones(8, 12)
        >>> result = structmat.project(W, structmat.MonarchConfig(nblocks=2, rank=1))
        >>> result.matrix.num_params, result.error < 1e-6
        (40, True)
        >>> g = torch.Generator().manual_seed(0)
        >>> W, x = torch.randn(8, 12, generator=g), torch.randn(99, 12, generator=g) * torch.arange(12)
        >>> result = structmat.project(W, structmat.LowRankConfig(rank=4), structmat.Moments.of(x))
        >>> result.calibrated_error < result.plain_calibrated_error, result.error > result.bound
        (True, True)
    """
    check_tensor("W", W, 2)
    check_inexact("W", W)
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config such as MonarchConfig(nblocks=4), got {type(config).__name__}")
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments must be structmat.Moments, got {type(moments).__name__}")
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number, 0 or above, got {damping!r}")
    if not torch.isfinite(W).all():
        raise ValueError("W has NaN or infinite entries")
    W = W.detach()
    if moments is not None:
        if W.ndim != 2:
            raise ValueError(f"moments are of one matrix: W must have shape (m, n), got {tuple(W.shape)}")
        metric_of(moments, W)  # before any work, as all that can be wrong with the arguments
    matrix, lost, *most = config._project(W)
    rows = W.reshape(-1, W.shape[-1]).split(max(1, _CHUNK // W.shape[-1]))
    size = torch.stack([torch.linalg.vector_norm(r.to(work_dtype(W))) for r in rows]).norm()
    scale = size if size > 0 else torch.ones_like(size)
    bounds = [None if b is None else (torch.linalg.vector_norm(b) / scale).item() for b in (lost, *most)]
    found = Projection(matrix, (residual_norm(W, matrix) / scale).item(), bounds[0], config, *bounds[1:])
    if moments is None:
        return found
    fitted = config._calibrate(matrix, W, moments, damping)
    plain, after = calibrated_errors(W, [matrix, fitted], moments)
    error = (residual_norm(W, fitted) / scale).item()
    # What a guarantee promises of the plain projection is not promised of another matrix.
    return Projection(fitted, error, bounds[0], config, None, after, plain)
