"""Low-rank matrices times given weights, entry by entry: alternating least squares for displacement structure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Sweeps end when one lowers the error by less than this share.
PROGRESS = 1e-4


def fit_cauchy_like(
    W: Tensor, weights: Tensor, starts: list[tuple[Tensor, Tensor]], sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """G and H with ``|W - weights * (G H^T)|_F`` small, never above the best of the starts and of zero.

    ``weights * (G H^T)`` is Cauchy-like for weights ``1 / (s_i - t_j)``. It is linear in G for a fixed H, and its rows
    are independent: r equations each. Sweeps of alternating least squares from every start, of which the best after
    three goes on; each lowers the error. O(m n r^2) operations a sweep.

    Args:
        W: shape (m, n), float64 or complex128.
        weights: shape (m, n), not zero.
        starts: pairs of shapes (m, r) and (n, r).
        sweeps: at most so many; 0 takes the best start as it is.

    Returns:
        G (m, r), H (n, r) and the norm of the difference.
    """
    P, V = weights.abs().square(), weights.conj() * W

    def error(G: Tensor, H: Tensor) -> Tensor:
        return torch.linalg.vector_norm(W - weights * (G @ H.mT))

    zero = torch.zeros_like(starts[0][0]), torch.zeros_like(starts[0][1])
    best = min(((error(*s), *s) for s in [*starts, zero]), key=lambda f: float(f[0]))
    trials = [run(V, P, error, start, min(3, sweeps)) for start in starts]
    first = min(trials, key=lambda f: float(f[0]))
    last = run(V, P, error, first[1:], sweeps - 3) if sweeps > 3 else first
    found = min((best, first, last), key=lambda f: float(f[0]))
    return found[1], found[2], found[0]


def run(
    V: Tensor, P: Tensor, error: Callable[[Tensor, Tensor], Tensor], start: tuple[Tensor, ...], sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of a start's sweeps."""
    G, H = start
    best = (error(G, H), G, H)
    for sweep in range(sweeps):
        G, H = _update(V, P, H)
        H, G = _update(V.mT, P.mT, G)
        found = error(G, H)
        # Rounding alone raises it, at a fixed point. The first sweep repairs a start, whatever its error.
        stop = sweep > 0 and not found < (1 - PROGRESS) * best[0]
        if found < best[0]:
            best = (found, G, H)
        if stop:
            break
    return best


def _update(V: Tensor, P: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """The best G for the span of H, of which an orthonormal basis is returned; V = conj(weights) W, P = |weights|^2."""
    H = torch.linalg.qr(H)[0]
    r = H.shape[-1]
    pairs = (H.conj().unsqueeze(-1) * H.unsqueeze(-2)).flatten(-2)
    grams = (P.to(pairs.dtype) @ pairs).unflatten(-1, (r, r))
    # Weights may be so uneven that a row hardly sees some directions.
    trace = grams.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
    eye = torch.eye(r, dtype=grams.dtype, device=grams.device)
    system = grams + (torch.finfo(grams.dtype).eps * trace + torch.finfo(P.dtype).tiny) * eye
    return torch.linalg.solve(system, (V @ H.conj()).unsqueeze(-1)).squeeze(-1), H
