"""Krylov matrices and powers of the operators that have them in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int, check_same, check_tensor
from structmat.base import StructuredMatrix
from structmat.lazy import compose
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement.hankel import Hankel
from structmat.matrices.displacement.operators import Shift
from structmat.matrices.displacement.toeplitz import Toeplitz
from structmat.matrices.displacement.vandermonde import Vandermonde


def krylov(A: Shift | Diagonal, g: Tensor, count: int | None = None) -> StructuredMatrix:
    """The Krylov matrix ``[g, A g, ..., A^(count-1) g]`` of a shift or a diagonal, never formed.

    Of Z_f it is a :class:`~structmat.Toeplitz` matrix (for count = n the f-circulant with first column g), of its
    transpose a :class:`~structmat.Hankel` matrix, of a diagonal ``diag(g)`` times a :class:`~structmat.Vandermonde`
    matrix. Its ``matvec`` evaluates a polynomial of the operator at g, ``mT.matvec`` gives all ``g^T (A^T)^k v``.

    Args:
        A: n x n, a :class:`~structmat.Shift` or a :class:`~structmat.Diagonal`.
        g: shape (*batch, n), dtype and device of A.
        count: number of columns, n by default.

    Raises:
        TypeError: if A is another operator, or dtypes differ.
        ValueError: if g has another size, or count < 1.

    Example:
        >>> import torch
        >>> from structmat.matrices.displacement import Shift, krylov
        >>> krylov(Shift(3, f=2.0), torch.tensor([1.0, 5.0, 7.0]), 4).to_dense()
        tensor([[ 1., 14., 10.,  2.],
                [ 5.,  1., 14., 10.],
                [ 7.,  5.,  1., 14.]])
    """
    if not isinstance(A, (Shift, Diagonal)):
        raise TypeError(f"A must be a Shift or a Diagonal, got {type(A).__name__}")
    check_tensor("g", g, 1)
    n = A.shape[-1]
    if g.shape[-1] != n:
        raise ValueError(f"g must have {n} entries for {A!r}, got shape {tuple(g.shape)}")
    count = n if count is None else check_int("count", count)
    check_same("g", g, "A", A.diag if isinstance(A, Diagonal) else torch.empty(0, dtype=A.dtype, device=A.device))
    if isinstance(A, Diagonal):
        return compose(Diagonal(g), Vandermonde(A.diag, count))
    # f^q g, ..., f g, g: of which every column is a window.
    times = -(-(count - 1) // n)
    if A.up:
        entries = torch.cat([A.f**q * g for q in range(times + 1)], -1)[..., : n + count - 1]
        return Hankel.from_entries(entries, n)
    entries = torch.cat([A.f**q * g for q in range(times, -1, -1)], -1)
    return Toeplitz.from_diagonals(entries[..., entries.shape[-1] - (n + count - 1) :], n)


def shift_power(A: Any, k: int) -> Toeplitz:
    """``A^k`` for k >= 0 of a shift, a Toeplitz matrix with at most two diagonals that are not zero; O(n).

    Raises:
        TypeError: if A is not a shift, or k not an integer.
        ValueError: if k < 0.

    Example:
        >>> from structmat.matrices.displacement import Shift, shift_power
        >>> shift_power(Shift(3, f=2.0), 4).to_dense()
        tensor([[0., 0., 4.],
                [2., 0., 0.],
                [0., 2., 0.]])
    """
    if not isinstance(A, Shift):
        raise TypeError(f"A must be a Shift, got {type(A).__name__}")
    turns, rest = divmod(check_int("k", k, 0), A.n)
    place = torch.arange(1 - A.n, A.n, device=A.device)  # i - j, from the top right corner
    diagonals = (place == rest).to(A.dtype) * A.f**turns + (place == rest - A.n).to(A.dtype) * A.f ** (turns + 1)
    power = Toeplitz.from_diagonals(diagonals, A.n)
    return power.mT if A.up else power
