"""Solving with matrices of low displacement rank: FFTs make them Cauchy-like, and those are eliminated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structmat.linalg.cauchy import cauchy_like_solve
from structmat.matrices.displacement._convolution import LinAlgError
from structmat.matrices.displacement._ldr_products import polar
from structmat.matrices.displacement.operators import Shift


class Eigenbasis:
    """``Z_f = W diag(values) W^-1`` with ``W = D^-1 F^-1``, D = diag(phi^i), phi^n = f, and the DFT matrix F."""

    def __init__(self, shift: Shift, device: torch.device) -> None:
        n = shift.n
        radius, angle = polar(shift.f)
        i = torch.arange(n, device=device, dtype=torch.float64)
        self.phase = torch.polar(radius ** (i / n), angle * i / n)
        self.values = torch.polar(torch.full_like(i, radius ** (1 / n)), (angle - 2 * math.pi * i) / n)
        # Of the phases only: F cancels against that of the other operator, or has the determinant below.
        self.logdet = (math.log(radius) + 1j * angle) * (n - 1) / 2

    def inverse(self, x: Tensor) -> Tensor:
        """``W^-1 x`` for x of shape (*batch, n, k)."""
        return torch.fft.fft(self.phase.unsqueeze(-1) * x, dim=-2) if x.numel() else x

    def apply(self, x: Tensor) -> Tensor:
        """``W x``."""
        return torch.fft.ifft(x, dim=-2) / self.phase.unsqueeze(-1) if x.numel() else x

    def transposed(self, x: Tensor) -> Tensor:
        """``W^T x``."""
        return torch.fft.ifft(x / self.phase.unsqueeze(-1), dim=-2) if x.numel() else x

    def unitary(self, x: Tensor, back: bool = False, conjugate: bool = False) -> Tensor:
        """``U^H x`` with ``U = sqrt(n) W``, unitary if |f| is 1; ``U x`` if ``back``; of the conjugate of U."""
        if conjugate:
            return self.unitary(x.conj(), back).conj()
        phase = self.phase.unsqueeze(-1)
        if back:
            return torch.fft.ifft(x, dim=-2, norm="ortho") / phase
        return torch.fft.fft(phase * x, dim=-2, norm="ortho")


def fourier_logdet(n: int) -> complex:
    """Log det of the DFT matrix of size n, whose eigenvalues are sqrt(n) (1, -1, -i, i), so many times each."""
    minus, down, up = (n + 2) // 4, (n + 1) // 4, (n - 1) // 4
    return n / 2 * math.log(n) + 1j * math.pi * (minus - down / 2 + up / 2)


def eliminate(M: Any, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``M^-1 b``, and sign and logarithm of the absolute value of det M, of a square M.

    In double precision whatever M's: the elimination of a matrix in float32 then has the accuracy of its entries.

    Raises:
        ValueError: if M has NaN or infinite entries.
        torch.linalg.LinAlgError: if it is singular to double precision.
    """
    from structmat.matrices.displacement._algebra import with_shifts

    n, dtype = M.shape[-1], M.dtype
    if not all(bool(t.isfinite().all()) for t in M.tensors()):
        raise ValueError("the matrix has NaN or infinite entries in its generators or nodes")
    M = M.to(torch.complex128 if dtype.is_complex else torch.float64)
    if any(isinstance(o, Shift) and o.f == 0 for o in (M.A, M.B)):  # no eigenvectors: another corner, rank + 1
        M = with_shifts(M, *_corners(M))
    A, B, G, H, v = M.A, M.B, M.left, M.right, b.to(M.dtype)
    sign, logdet = 1.0, 0j
    if isinstance(A, Shift) and A.up:  # J M, see LDR._linear
        A, G, v, sign = A.mT, G.flip(-2), v.flip(-2), sign * (-1) ** (n * (n - 1) // 2)
    flipped = isinstance(B, Shift) and B.up
    if flipped:
        B, H, sign = B.mT, H.flip(-2), sign * (-1) ** (n * (n - 1) // 2)
    left = Eigenbasis(A, M.device) if isinstance(A, Shift) else None
    right = Eigenbasis(B, M.device) if isinstance(B, Shift) else None
    s, t = (getattr(o, "diag") if w is None else w.values for o, w in ((A, left), (B, right)))  # noqa: B009
    if left is not None:
        G, v, logdet = left.inverse(G), left.inverse(v), logdet - left.logdet
    if right is not None:
        H, logdet = right.transposed(H), logdet + right.logdet
    # M = W_A C W_B^-1: of two shifts the transforms' determinants cancel.
    logdet += fourier_logdet(n) * ((right is not None) - (left is not None))
    batch = torch.broadcast_shapes(M.shape[:-2], v.shape[:-2])
    kind = torch.promote_types(torch.promote_types(G.dtype, H.dtype), torch.promote_types(s.dtype, t.dtype))
    parts = [p.to(kind).expand(*batch, *p.shape[-k:]) for p, k in ((s, 1), (t, 1), (G, 2), (H, 2), (v, 2))]
    flat = [p.reshape(math.prod(batch), *p.shape[len(batch) :]) for p in parts]
    x, phase, size, ratio = cauchy_like_solve(*flat)
    if bool((~(ratio > n * torch.finfo(torch.float64).eps)).any()):
        least = float(ratio.nan_to_num(0.0).min())
        raise LinAlgError(
            f"the matrix is singular to double precision: the smallest pivot is {least:.1e} of the largest"
        )
    x = x.unflatten(0, batch) if batch else x.squeeze(0)
    if right is not None:
        x = right.apply(x)
    x = x.flip(-2) if flipped else x
    phase = phase * complex(math.cos(logdet.imag), math.sin(logdet.imag)) * sign
    phase, size = phase.reshape(batch), size.reshape(batch) + logdet.real
    if not dtype.is_complex:
        x, phase = (z.real if z.is_complex() else z for z in (x, phase))
        phase = phase.sign()
    return x.to(dtype), phase.to(dtype), size.to(torch.empty(0, dtype=dtype).abs().dtype)


def _corners(M: Any) -> tuple[float | complex | None, float | complex | None]:
    """A corner other than zero that makes no common eigenvalue, in place of that which is zero."""
    from structmat.matrices.displacement._pairs import far_corner

    def corner(operator: Any, other: Any) -> float | complex | None:
        if not isinstance(operator, Shift):
            return None
        if operator.f != 0:
            return operator.f
        return -other.f if isinstance(other, Shift) else far_corner(other.diag, operator.n, 0.0)

    return corner(M.A, M.B), corner(M.B, M.A)
