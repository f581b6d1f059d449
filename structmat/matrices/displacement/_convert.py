"""Conversions between kinds of low displacement rank."""

from __future__ import annotations

from typing import Any

import torch

from structmat.lazy import Product
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement.eigenvectors import ShiftEigenvectors
from structmat.matrices.displacement.operators import Shift
from structmat.matrices.permutation import Permutation


def convert(M: Any, kind: str) -> Product:
    """See :meth:`LDR.convert`."""
    if kind not in ("cauchy", "vandermonde", "toeplitz"):
        raise ValueError(f'kind must be "cauchy", "vandermonde" or "toeplitz", got {kind!r}')
    A, B = M.A, M.B
    if kind == "toeplitz":
        if not (isinstance(A, Shift) and isinstance(B, Shift)):
            raise ValueError(f"a {type(M).__name__} has not two shifts, of which a Toeplitz-like matrix is made")
        if A.up == B.up:
            return Product((M,))
        # Of M J: A (M J) - (M J) (J B J) = G (J H)^T.
        reversal = Permutation(torch.arange(B.n - 1, -1, -1, device=M.device), M.dtype)
        return Product((M._make(A, B.mT, M.left, M.right.flip(-2)), reversal))
    if not M.dtype.is_complex and any(isinstance(o, Shift) for o in ((A, B) if kind == "cauchy" else (A,))):
        raise TypeError(
            f"the eigenvectors of shifts are complex and the matrix has dtype {M.dtype}: convert it with "
            f".to({M.dtype.to_complex()})"
        )
    left, right, G, H = (), (), M.left, M.right
    if isinstance(A, Shift):
        U = _eigenvectors(A, M)
        G, left, A = U.inverse()._linear(G.mT).mT, (U,), Diagonal(U.values())
    if isinstance(B, Shift) and kind == "cauchy":
        U = _eigenvectors(B, M)
        H, right, B = U.mT._linear(H.mT).mT, (U.inverse(),), Diagonal(U.values())
    return Product((*left, M._make(A, B, G, H), *right))


def _eigenvectors(shift: Shift, M: Any) -> ShiftEigenvectors:
    if shift.f == 0:
        raise ValueError("a shift with corner 0 has one eigenvector only: take other corners with with_shifts first")
    U = ShiftEigenvectors(shift.n, shift.f, dtype=M.dtype, place=str(M.device))
    # Z_f = U diag(v) U^-1, hence Z_f^T = U^-T diag(v) U^T.
    return U.inverse().mT if shift.up else U
