"""Toeplitz matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.linalg.implicit import implicit_solve
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._convolution import hankel_dense, toeplitz, toeplitz_flops
from structmat.matrices.displacement._toeplitz_solve import inverse_toeplitz, solve_toeplitz, toeplitz_like
from structmat.matrices.displacement.toeplitz_like import ToeplitzLike


def join_edges(column: Any, row: Any, reverse: bool) -> tuple[Tensor, int]:
    """Check the two vectors that scipy's constructors take; the m + n - 1 entries in order of the first one, and m.

    With ``reverse`` the row's entries but the first stand before the column's, last one first, else after them.
    """
    for name, edge in (("column", column), ("row", row)):
        check_tensor(name, edge, 1)
        check_inexact(name, edge)
        if edge.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one entry, got shape {tuple(edge.shape)}")
    check_same("row", row, "column", column)
    batch = check_broadcast("row", row.shape[:-1], "column", column.shape[:-1])
    column, rest = column.expand(*batch, column.shape[-1]), row[..., 1:].expand(*batch, row.shape[-1] - 1)
    return torch.cat([rest.flip(-1), column] if reverse else [column, rest], -1), column.shape[-1]


def antidiagonal_means(W: Tensor) -> Tensor:
    """The mean of ``W[i, j]`` over each i + j, shape (*batch, m + n - 1)."""
    m, n = W.shape[-2:]
    # Behind m zeros each, rows read as one sequence and cut into pieces of m + n - 1 move one to the right each.
    skewed = torch.nn.functional.pad(W, (0, m)).flatten(-2)[..., : m * (m + n - 1)].unflatten(-1, (m, m + n - 1))
    k = torch.arange(m + n - 1, device=W.device)
    counts = torch.minimum(torch.minimum(k + 1, m + n - 1 - k), torch.full_like(k, min(m, n)))
    return skewed.sum(-2) / counts


@matrix
class Toeplitz(StructuredMatrix):
    """A matrix that is constant along its diagonals, as ``scipy.linalg.toeplitz``; m + n - 1 parameters.

    ``T[i, j] = column[i - j]`` for i >= j, else ``row[j - i]``. Stored is one vector of the diagonals' entries, from
    the top right corner to the bottom left one: row[n - 1], ..., row[1], column[0], ..., column[m - 1].

    A product takes three FFTs of m + n - 1 numbers, of which that of the diagonals is shared by all vectors; a matrix
    of at most 2^15 entries is multiplied out, which is faster. Errors of a product are relative to the norms of
    matrix and vector, not to every single output. float16 and bfloat16 transform in float32 and are rounded once. Where
    the kernels of ``structmat_kernels.fft_conv`` run they do it, with the errors stated there.
    Closed under transposes, sums and multiples; inverses are :class:`~structmat.ToeplitzLike`.

    ``solve`` works in double precision. From n = 512 on, with at most n / 64 right-hand sides, it tries GMRES with T.
    Chan's circulant preconditioner, O(n log n) an iteration: quick where the entries decay along the rows. If ten
    iterations do not bring the residuals to 1e-3, or all do not bring them to 1e-13 (or 1e-14 of the norms of matrix
    and solution), or not so for a random right-hand side besides the given ones, the matrix is eliminated with partial
    pivoting, O(n^2), and the solution refined. A matrix that is singular to double precision raises.

    Args:
        column: the first column, shape (*batch, m), floating point or complex.
        row: the first row, shape (*batch, n), same dtype and device; batches broadcast. Its first entry is ignored.
            By default the column's conjugate.

    Raises:
        TypeError: if column or row is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty or has no dimension, or batches or devices do not match.

    Example:
        >>> import torch, structmat
        >>> T = structmat.Toeplitz(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0]))
        >>> T.to_dense()
        tensor([[1., 4.],
                [2., 1.],
                [3., 2.]])
        >>> T @ torch.tensor([1.0, 10.0])
        tensor([41., 12., 23.])
    """

    diagonals: Tensor
    nrows: int = static()

    def __init__(self, column: Tensor, row: Tensor | None = None) -> None:
        if row is None:
            check_tensor("column", column, 1)
            row = column.conj().resolve_conj()
        diagonals, nrows = join_edges(column, row, reverse=True)
        object.__setattr__(self, "diagonals", diagonals)
        object.__setattr__(self, "nrows", nrows)

    @classmethod
    def from_diagonals(cls, diagonals: Tensor, nrows: int) -> Self:
        """The matrix with these entries of its diagonals, from the top right corner to the bottom left one; no copy.

        Args:
            diagonals: shape (*batch, m + n - 1), floating point or complex.
            nrows: m.

        Raises:
            TypeError: if diagonals is not a floating-point or complex tensor, or nrows not an integer.
            ValueError: if nrows is not between 1 and the number of diagonals.
        """
        check_tensor("diagonals", diagonals, 1)
        check_inexact("diagonals", diagonals)
        if check_int("nrows", nrows) > diagonals.shape[-1]:
            raise ValueError(f"nrows must be at most the number of diagonals {diagonals.shape[-1]}, got {nrows}")
        return cls._rebuild((diagonals,), (nrows,))

    @property
    def shape(self) -> torch.Size:
        *batch, count = self.diagonals.shape
        return torch.Size((*batch, self.nrows, count + 1 - self.nrows))

    @property
    def column(self) -> Tensor:
        """The first column, shape (*batch, m): a view."""
        return self.diagonals[..., self.shape[-1] - 1 :]

    @property
    def row(self) -> Tensor:
        """The first row, shape (*batch, n)."""
        return self.diagonals[..., : self.shape[-1]].flip(-1)

    def _linear(self, x: Tensor) -> Tensor:
        return toeplitz(self.diagonals, x, self.nrows)

    @property
    def mT(self) -> Toeplitz:
        return self._rebuild((self.diagonals.flip(-1),), (self.shape[-1],))

    @property
    def flops(self) -> int:
        m, n = self.shape[-2:]
        return math.prod(self.batch_shape) * toeplitz_flops(m, n, self.dtype.is_complex)

    def _scale(self, scalar: Tensor) -> Toeplitz:
        return self._rebuild((scalar * self.diagonals,), (self.nrows,))

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Toeplitz):
            return self._rebuild((self.diagonals + other.diagonals,), (self.nrows,))
        return None

    def to_dense(self) -> Tensor:
        return hankel_dense(self.diagonals, self.shape[-1]).flip(-1)

    def diagonal(self) -> Tensor:
        m, n = self.shape[-2:]
        return self.diagonals[..., n - 1 : n].expand(*self.batch_shape, min(m, n))

    def trace(self) -> Tensor:
        m, n = self.shape[-2:]
        return min(m, n) * self.diagonals[..., n - 1]

    # ---------------------------------------------------------------- solving
    def to_ldr(self, e: float | complex | None = None, f: float | complex | None = None) -> ToeplitzLike:
        """The same matrix by generators, ``Z_e T - T Z_f = G H^T`` of rank 2; square or not.

        Args:
            e: corner of the left shift, by default as of :class:`~structmat.ToeplitzLike` (1 for a square matrix).
            f: corner of the right shift, by default -e.

        Raises:
            TypeError: if a corner is no number, or complex while the matrix is real.
            ValueError: if the shifts have a common eigenvalue.
        """
        return toeplitz_like(self, e, f)

    def _solve(self, b: Tensor) -> Tensor:
        self._check_factorisable("solve")
        return implicit_solve(self, b, solve_toeplitz)

    @property
    def _solve_flops(self) -> int:
        return self.to_ldr()._solve_flops

    def inverse(self) -> ToeplitzLike:
        """The inverse, of displacement rank 2; costs a solve with two columns.

        Raises:
            ValueError: if the matrix is not square.
            TypeError: if the dtype is float16 or bfloat16.
            torch.linalg.LinAlgError: if it is singular to double precision.
        """
        self._check_factorisable("inverse")
        return inverse_toeplitz(self)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        return self.to_ldr().slogdet()

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """The nearest Toeplitz matrix in Frobenius norm: the mean of each of W's diagonals. Carries W's gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if W has no rows or columns.
        """
        check_tensor("W", W, 2)
        check_inexact("W", W)
        check_matrix_shape(W.shape)
        return cls._rebuild((antidiagonal_means(W.flip(-1)),), (W.shape[-2],))

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        diagonals = torch.empty((*batch, m + n - 1), dtype=dtype, device=device)
        return cls._rebuild((diagonals,), (m,)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.diagonals, std / math.sqrt(self.shape[-1]), generator)
        return self
