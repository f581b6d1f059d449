"""The nearest matrix of low displacement rank that alternating least squares finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.matrices.displacement._solve import Eigenbasis
from structmat.matrices.displacement.operators import Shift
from structmat.projection.cauchy import fit_cauchy_like


def project(W: Any, A: Any, B: Any, rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Generators (*batch, m, rank) and (*batch, n, rank) of a matrix near W under A and B.

    Shifts of corners of modulus 1 have orthogonal eigenvectors: in these bases norms stay, and M becomes Cauchy-like,
    which :func:`structmat.projection.fit_cauchy_like` fits. Generators of a real matrix stay real, since the
    least-squares problems are as symmetric as W is.

    Raises:
        TypeError: if W is not a floating-point or complex tensor.
        ValueError: if sizes do not match, the rank is out of range, a corner has another modulus, or W is not finite.
    """
    check_tensor("W", W, 2)
    check_inexact("W", W)
    m, n = W.shape[-2:]
    check_int("rank", rank)
    check_int("sweeps", sweeps, 0)
    if rank > min(m, n):
        raise ValueError(f"rank must be at most min(m, n) = {min(m, n)} for W of shape {tuple(W.shape)}, got {rank}")
    for name, operator in (("e", A), ("f", B)):
        if isinstance(operator, Shift) and abs(abs(operator.f) - 1) > 1e-12:
            raise ValueError(f"{name} must have modulus 1 for a projection, got {operator.f}")
    if not bool(W.isfinite().all()):
        raise ValueError("W has NaN or infinite entries")
    complex_ = W.dtype.is_complex
    work = W.detach().to(torch.complex128 if complex_ else torch.float64)
    A, B = (o._to(None, work.dtype) for o in (A, B))
    bases = [Eigenbasis(o, W.device) if isinstance(o, Shift) else None for o in (A, B)]
    s, t = (o.diag if w is None else w.values for o, w in zip((A, B), bases, strict=True))
    weights = (s.unsqueeze(-1) - t.unsqueeze(-2)).reciprocal()

    def change(M: Tensor, back: bool = False) -> Tensor:
        """A matrix in the eigenvectors' bases, of the same norm; or back, real if W is."""
        left, right = bases
        if left is not None:
            M = left.unitary(M, back)
        if right is not None:
            M = right.unitary(M.mT, back, conjugate=True).mT
        return M.real if back and M.is_complex() and not complex_ else M

    def start(M: Tensor) -> tuple[Tensor, Tensor]:
        """Generators of a displacement near M, which is one in the bases."""
        u, size, vh = torch.linalg.svd(change(M, back=True), full_matrices=False)
        G, H = u[:, :rank] * size[:rank], vh[:rank].mT
        return generators(G, H)

    def generators(G: Tensor, H: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        left, right = bases
        G = G if left is None else left.unitary(G, back)
        H = H if right is None else right.unitary(H, back, conjugate=True)
        return tuple(x.real if back and x.is_complex() and not complex_ else x for x in (G, H))  # pyright: ignore[reportReturnType]

    if W.numel() == 0:  # of an empty batch
        return W.new_zeros(*W.shape[:-2], m, rank), W.new_zeros(*W.shape[:-2], n, rank)
    found = []
    flat = work.reshape(-1, m, n)
    for i, one in enumerate(flat):
        C = change(one)
        w = weights if weights.ndim == 2 else weights.expand(*W.shape[:-2], m, n).reshape(-1, m, n)[i]
        # The displacement itself, which is exact for members; and one whose errors are weighted half as the matrix's.
        kind = torch.promote_types(C.dtype, w.dtype)
        starts = [tuple(x.to(kind) for x in start(M)) for M in (C / w, C / w * w.abs().sqrt())]
        G, H, _ = fit_cauchy_like(C.to(kind), w.to(kind), starts, sweeps)  # pyright: ignore[reportArgumentType]
        found.append(generators(G, H, back=True))
    G, H = (torch.stack(parts).reshape(*W.shape[:-2], -1, rank) for parts in zip(*found, strict=True))
    # Of equal size, column by column.
    g, h = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (G, H))
    scale = torch.where((g > 0) & (h > 0), (h / g).sqrt(), torch.ones_like(g))
    return (G * scale).to(W.dtype), (H / scale).to(W.dtype)
