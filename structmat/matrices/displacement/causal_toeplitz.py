"""Triangular Toeplitz matrices: truncated power series under multiplication."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structmat._checks import check_inexact, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._convolution import (
    DENSE_ENTRIES,
    convolve,
    hankel_dense,
    power_series_inverse,
    toeplitz,
    toeplitz_flops,
)
from structmat.matrices.displacement._kernels import convolved, kernels_take
from structmat.matrices.displacement.toeplitz import Toeplitz
from structmat.matrices.displacement.toeplitz_like import ToeplitzLike


@matrix
class CausalToeplitz(StructuredMatrix):
    """A square triangular Toeplitz matrix: y[i] depends on x[0], ..., x[i] only; n parameters.

    ``C[i, j] = column[i - j]`` for i >= j, else 0: the causal convolution with ``column``, the polynomial
    sum_k column[k] Z^k in the down-shift Z. Matrices of one side commute and are closed under products, sums and
    inverses, in O(n log n): they multiply as power series modulo z^n. The transpose is the upper triangular one of the
    same numbers. Products as of :class:`Toeplitz`. Also sums with :class:`Toeplitz` matrices are closed.

    ``solve`` and ``inverse`` go through the inverse power series, ``solve`` with one step of refinement; the error is
    relative to the inverse's largest entries, which grow exponentially where c(z) has a root inside the unit circle.

    Args:
        column: shape (*batch, n), floating point or complex.
        upper: whether the column is the first row instead, and the matrix upper triangular.

    Raises:
        TypeError: if column is not a floating-point or complex tensor, or upper not a bool.
        ValueError: if column is empty or has no dimension.

    Example:
        >>> import torch, structmat
        >>> C = structmat.CausalToeplitz(torch.tensor([1.0, -1.0, 0.0]))
        >>> C.inverse().column.round(decimals=4)
        tensor([1., 1., 1.])
        >>> (C @ C).column.round(decimals=4)
        tensor([ 1., -2.,  1.])
    """

    column: Tensor
    upper: bool = static(default=False)

    def __post_init__(self) -> None:
        check_tensor("column", self.column, 1)
        check_inexact("column", self.column)
        if not isinstance(self.upper, bool):
            raise TypeError(f"upper must be a bool, got {type(self.upper).__name__}")
        if self.column.shape[-1] == 0:
            raise ValueError(f"column must have at least one entry, got shape {tuple(self.column.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.column.shape, self.column.shape[-1]))

    def _like(self, column: Tensor) -> Self:
        return self._rebuild((column,), (self.upper,))

    def _diagonals(self) -> Tensor:
        """From the top right corner to the bottom left one."""
        zeros = self.shape[-1] - 1
        return pad(self.column.flip(-1), (0, zeros)) if self.upper else pad(self.column, (zeros, 0))

    def _linear(self, x: Tensor) -> Tensor:
        n, c = self.shape[-1], self.column
        if n * n > DENSE_ENTRIES and kernels_take(x):
            return convolved(x, c[..., :1] if self.upper else c, c[..., 1:] if self.upper else None, n)
        return toeplitz(self._diagonals(), x, n)

    @property
    def mT(self) -> CausalToeplitz:
        return CausalToeplitz(self.column, not self.upper)

    def to_toeplitz(self) -> Toeplitz:
        """The same matrix with its zeros stored."""
        return Toeplitz.from_diagonals(self._diagonals(), self.shape[-1])

    def to_ldr(self, e: float | complex | None = None, f: float | complex | None = None) -> ToeplitzLike:
        """The same matrix by generators of displacement rank 2; arguments as of :meth:`Toeplitz.to_ldr`."""
        return self.to_toeplitz().to_ldr(e, f)

    @property
    def flops(self) -> int:
        n = self.shape[-1]
        return math.prod(self.batch_shape) * toeplitz_flops(n, n, self.dtype.is_complex)

    # ---------------------------------------------------------------- solving
    @property
    def _solve_flops(self) -> int:
        # The inverse series costs about two products, then three products are done.
        return 5 * self.flops

    def _solve(self, b: Tensor) -> Tensor:
        n = self.shape[-1]
        rows = b.mT.flip(-1) if self.upper else b.mT
        inverse, column = power_series_inverse(self.column, n).unsqueeze(-2), self.column.unsqueeze(-2)
        found = convolve(inverse, rows, n)
        found = found + convolve(inverse, rows - convolve(column, found, n), n)
        return (found.flip(-1) if self.upper else found).mT

    def inverse(self) -> CausalToeplitz:
        self._check_factorisable("inverse")
        return self._like(power_series_inverse(self.column, self.shape[-1]))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        first, n = self.column[..., 0], self.shape[-1]
        return first.sgn() ** n, n * first.abs().log()

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> CausalToeplitz:
        return self._like(scalar * self.column)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, CausalToeplitz) and other.upper == self.upper:
            return self._like(convolve(self.column, other.column, self.shape[-1]))
        return None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, CausalToeplitz):
            if other.upper == self.upper:
                return self._like(self.column + other.column)
            return self.to_toeplitz()._add(other.to_toeplitz())
        return self.to_toeplitz()._add(other) if isinstance(other, Toeplitz) else None

    def to_dense(self) -> Tensor:
        return hankel_dense(self._diagonals(), self.shape[-1]).flip(-1)

    def diagonal(self) -> Tensor:
        return self.column[..., :1].expand(self.column.shape)

    def trace(self) -> Tensor:
        return self.shape[-1] * self.column[..., 0]

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_dense(cls, W: Tensor, upper: bool = False) -> Self:
        """The nearest matrix of the family in Frobenius norm: the mean of each diagonal of W's triangle.

        Args:
            W: shape (*batch, n, n), floating point or complex; its gradient is carried.
            upper: whether to take the upper triangle.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if W is not square.
        """
        T = Toeplitz.from_dense(W)
        if T.shape[-1] != T.shape[-2]:
            raise ValueError(f"W must be square for a triangular Toeplitz matrix, got shape {tuple(W.shape)}")
        return cls(T.row if upper else T.column, upper)

    @classmethod
    def random(
        cls,
        shape: Any,
        upper: bool = False,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix whose outputs have ``nn.Linear``'s variance on average; it grows along the sequence.

        Args:
            shape: (*batch, n, n).
            upper: whether it is upper triangular.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if the shape is not square.
        """
        batch, m, n = check_matrix_shape(shape)
        if m != n:
            raise ValueError(f"shape must be square for a triangular Toeplitz matrix, got {tuple(shape)}")
        return cls(torch.empty((*batch, n), dtype=dtype, device=device), upper).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.column, std / math.sqrt((self.shape[-1] + 1) / 2), generator)
        return self
