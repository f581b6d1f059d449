"""Other people's compression of a layer, written anew to compare with: truncated SVDs and unstructured pruning.

Each takes W (m, n), the layer's uncentred `structmat.Moments` and a number of parameters, and keeps at most so many. A
low-rank matrix of rank r counts r (m + n); of a pruned matrix the entries that are not zero count, and neither where
they lie nor that the matrix is stored and multiplied as a dense one. All decompose in float64. Biases are the caller's:
the papers leave them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structmat import LowRank, Moments
from structmat.projection.truncated import truncated_svd, work_dtype


def svd(W: Tensor, moments: Moments, params: int) -> LowRank:
    """The best low-rank matrix in Frobenius norm (Eckart & Young 1936); the moments are not looked at."""
    return _weighted(W, params, None)


def asvd(W: Tensor, moments: Moments, params: int, alpha: float = 0.5, magnitudes: Tensor | None = None) -> LowRank:
    """ASVD (Yuan et al. 2023, arXiv:2312.05821): the columns are scaled by `mean |x_j|^alpha` before the SVD.

    Without the search for each layer's rank that the paper adds.

    Args:
        W: shape (m, n).
        moments: of the inputs.
        params: how many to keep, at least m + n.
        alpha: the power; 0.5 is the paper's, 0 the plain SVD.
        magnitudes: E|x_j|, shape (n,). None takes (E x_j^2)^(1/2), which moments hold: for Gaussian inputs the same
            up to a factor that changes nothing.
    """
    scale = moments.inputs.diagonal().real.sqrt() if magnitudes is None else magnitudes
    # An input that is always zero must not make the scaling singular.
    scale = scale.clamp(min=1e-6 * scale.max()) ** alpha
    return _weighted(W, params, torch.diag(scale).to(work_dtype(W)))


def svd_llm(W: Tensor, moments: Moments, params: int) -> LowRank:
    """SVD-LLM (Wang et al. 2024, arXiv:2403.07378): the SVD of W L, where L L^H = E[x x^H] is a Cholesky factorisation.

    The best low-rank matrix for E|(W - M) x|^2. Where the moments are singular, their diagonal is raised just enough,
    as the authors do. Without the paper's gradient steps afterwards.
    """
    inputs = moments.inputs.to(work_dtype(W))
    factor, failed = torch.linalg.cholesky_ex(inputs)
    if failed:
        lowest = torch.linalg.eigvalsh(inputs)[0].clamp(max=0)
        shift = 1e-6 * inputs.diagonal().real.mean() - lowest
        factor = torch.linalg.cholesky(inputs + shift * torch.eye(len(inputs), dtype=inputs.dtype, device=W.device))
    return _weighted(W, params, factor)


def magnitude_pruned(W: Tensor, moments: Moments, params: int) -> Tensor:
    """W with its largest entries kept and the others zero, as `torch.nn.utils.prune.l1_unstructured` makes it."""
    _check(W, params, 1)
    kept = W.abs().flatten().topk(min(params, W.numel())).indices
    return torch.zeros_like(W).flatten().index_copy(0, kept, W.flatten()[kept]).view_as(W)


def wanda(W: Tensor, moments: Moments, params: int) -> Tensor:
    """Wanda (Sun et al. 2023, arXiv:2306.11695): each row keeps its entries of largest `|W_ij| (E x_j^2)^(1/2)`.

    All rows keep equally many, `params // m`.
    """
    _check(W, params, W.shape[0])
    scores = W.abs() * moments.inputs.diagonal().real.sqrt().to(W.abs())
    kept = scores.topk(min(params // W.shape[0], W.shape[1])).indices
    return torch.zeros_like(W).scatter(1, kept, W.gather(1, kept))


#: By the name that the tables give them.
METHODS: dict[str, Callable[[Tensor, Moments, int], LowRank | Tensor]] = {
    "SVD": svd,
    "ASVD": asvd,
    "SVD-LLM": svd_llm,
    "magnitude pruning": magnitude_pruned,
    "Wanda": wanda,
}


def _weighted(W: Tensor, params: int, factor: Tensor | None) -> LowRank:
    """The M of the largest rank that `params` allow which makes |(W - M) factor|_F smallest; factor is triangular."""
    _check(W, params, sum(W.shape))
    m, n = W.shape
    rank = min(params // (m + n), m, n)
    exact = W.to(work_dtype(W))
    left, right, _ = truncated_svd(exact if factor is None else exact @ factor, rank)
    if factor is not None:
        right = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return LowRank(left.to(W.dtype), right.to(W.dtype))


def _check(W: Tensor, params: int, least: int) -> None:
    if W.ndim != 2:
        raise ValueError(f"W must have shape (m, n), got {tuple(W.shape)}")
    if params < least:
        raise ValueError(f"params must be at least {least} for W of shape {tuple(W.shape)}, got {params}")
