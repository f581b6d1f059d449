"""Hankel matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._convolution import hankel, hankel_dense, toeplitz_flops
from structmat.matrices.displacement.ldr import LDR
from structmat.matrices.displacement.toeplitz import Toeplitz, antidiagonal_means, join_edges
from structmat.matrices.displacement.toeplitz_like import HankelLike


@matrix
class Hankel(StructuredMatrix):
    """A matrix that is constant along its antidiagonals, as ``scipy.linalg.hankel``; m + n - 1 parameters.

    ``H[i, j] = entries[i + j]``, where the stored entries are the first column followed by the last row without its
    first number. A :class:`~structmat.Toeplitz` matrix with its columns reversed: products and solutions cost and round
    as those. Closed under transposes, sums and multiples; inverses are :class:`~structmat.HankelLike`.

    Args:
        column: the first column, shape (*batch, m), floating point or complex.
        row: the last row, shape (*batch, n), same dtype and device; batches broadcast. Its first entry is ignored.
            By default zeros, as many as the column has entries.

    Raises:
        TypeError: if column or row is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty or has no dimension, or batches or devices do not match.

    Example:
        >>> import torch, structmat
        >>> H = structmat.Hankel(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0, 4.0]))
        >>> H.to_dense()
        tensor([[1., 2., 3.],
                [2., 3., 4.]])
    """

    entries: Tensor
    nrows: int = static()

    def __init__(self, column: Tensor, row: Tensor | None = None) -> None:
        if row is None:
            check_tensor("column", column, 1)
            row = torch.zeros_like(column)
        entries, nrows = join_edges(column, row, reverse=False)
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "nrows", nrows)

    @classmethod
    def from_entries(cls, entries: Tensor, nrows: int) -> Self:
        """The matrix ``H[i, j] = entries[i + j]``; no copy.

        Args:
            entries: shape (*batch, m + n - 1), floating point or complex.
            nrows: m.

        Raises:
            TypeError: if entries is not a floating-point or complex tensor, or nrows not an integer.
            ValueError: if nrows is not between 1 and the number of entries.
        """
        check_tensor("entries", entries, 1)
        check_inexact("entries", entries)
        if check_int("nrows", nrows) > entries.shape[-1]:
            raise ValueError(f"nrows must be at most the number of entries {entries.shape[-1]}, got {nrows}")
        return cls._rebuild((entries,), (nrows,))

    @property
    def shape(self) -> torch.Size:
        *batch, count = self.entries.shape
        return torch.Size((*batch, self.nrows, count + 1 - self.nrows))

    @property
    def column(self) -> Tensor:
        """The first column, shape (*batch, m): a view."""
        return self.entries[..., : self.nrows]

    @property
    def row(self) -> Tensor:
        """The last row, shape (*batch, n): a view."""
        return self.entries[..., self.nrows - 1 :]

    def _linear(self, x: Tensor) -> Tensor:
        return hankel(self.entries, x, self.nrows)

    @property
    def mT(self) -> Hankel:
        return self._rebuild((self.entries,), (self.shape[-1],))

    @property
    def flops(self) -> int:
        m, n = self.shape[-2:]
        return math.prod(self.batch_shape) * toeplitz_flops(m, n, self.dtype.is_complex)

    def _scale(self, scalar: Tensor) -> Hankel:
        return self._rebuild((scalar * self.entries,), (self.nrows,))

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return self._rebuild((self.entries + other.entries,), (self.nrows,)) if isinstance(other, Hankel) else None

    def to_dense(self) -> Tensor:
        return hankel_dense(self.entries, self.shape[-1]).clone()

    def diagonal(self) -> Tensor:
        return self.entries[..., : 2 * min(self.shape[-2:]) : 2]

    # ---------------------------------------------------------------- solving
    def to_toeplitz(self) -> Toeplitz:
        """The Toeplitz matrix ``H J`` with the columns in reverse order, of the same entries; no copy."""
        return Toeplitz.from_diagonals(self.entries, self.nrows)

    def to_ldr(self, e: float | complex | None = None, f: float | complex | None = None) -> HankelLike:
        """The same matrix by generators, ``Z_e H - H Z_f^T`` of rank 2; arguments as of :meth:`Toeplitz.to_ldr`."""
        T = self.to_toeplitz().to_ldr(e, f)
        return HankelLike._rebuild((T.A, T.B.mT, T.left, T.right.flip(-2)), ())

    def _solve(self, b: Tensor) -> Tensor:
        return self.to_toeplitz()._solve(b).flip(-2)

    @property
    def _solve_flops(self) -> int:
        return self.to_toeplitz()._solve_flops

    def inverse(self) -> LDR:
        """The inverse, :class:`~structmat.HankelLike` of displacement rank 2; as :meth:`Toeplitz.inverse`."""
        self._check_factorisable("inverse")
        T = self.to_toeplitz().inverse()
        return T._make(T.A.mT, T.B, T.left.flip(-2), T.right)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        return self.to_ldr().slogdet()

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """The nearest Hankel matrix in Frobenius norm: the mean of each of W's antidiagonals. Carries W's gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if W has no rows or columns.
        """
        check_tensor("W", W, 2)
        check_inexact("W", W)
        check_matrix_shape(W.shape)
        return cls._rebuild((antidiagonal_means(W),), (W.shape[-2],))

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
        entries = torch.empty((*batch, m + n - 1), dtype=dtype, device=device)
        return cls._rebuild((entries,), (m,)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.entries, std / math.sqrt(self.shape[-1]), generator)
        return self
