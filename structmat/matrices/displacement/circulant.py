"""Circulant and skew-circulant matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._convolution import (
    DENSE_ENTRIES,
    LinAlgError,
    convolution_flops,
    f_circulant,
    f_circulant_diagonals,
    good_size,
    hankel_dense,
    toeplitz,
    toeplitz_flops,
    values_visible,
    working,
)
from structmat.matrices.displacement._kernels import f_circulant_by_kernels, kernels_take
from structmat.matrices.displacement.causal_toeplitz import CausalToeplitz
from structmat.matrices.displacement.toeplitz import Toeplitz
from structmat.matrices.displacement.toeplitz_like import ToeplitzLike


def _fft(x: Tensor, inverse: bool = False) -> Tensor:
    if x.numel() == 0:  # which MKL refuses
        return x.to(x.dtype.to_complex())
    return torch.fft.ifft(x) if inverse else torch.fft.fft(x)


@matrix
class Circulant(StructuredMatrix):
    """A circulant matrix, ``C[i, j] = column[(i - j) mod n]``, or a skew-circulant one; n parameters.

    A polynomial in the cyclic shift, hence diagonal in the Fourier basis: matrices of one f commute and are closed
    under products, sums, transposes and inverses, in O(n log n). Sums with :class:`Toeplitz` matrices are closed too. A
    product takes three FFTs of n numbers where n is even and has no prime factor above 7, of 2 n otherwise and for
    f = -1; up to 2^15 entries the matrix is multiplied out. float16 and bfloat16 transform in float32.

    Args:
        column: the first column, shape (*batch, n), floating point or complex.
        f: 1, or -1 for the skew-circulant matrix, whose entries above the diagonal have the other sign. (For other f
            see :class:`structmat.ToeplitzLike`; f = 0 is :class:`CausalToeplitz`.)

    Raises:
        TypeError: if column is not a floating-point or complex tensor.
        ValueError: if column is empty or has no dimension, or f is not 1 or -1.

    Example:
        >>> import torch, structmat
        >>> C = structmat.Circulant(torch.tensor([2.0, 1.0, 0.0]))
        >>> C.to_dense()
        tensor([[2., 0., 1.],
                [1., 2., 0.],
                [0., 1., 2.]])
        >>> (C @ C.inverse()).column.round(decimals=4).abs()
        tensor([1., 0., 0.])
    """

    column: Tensor
    f: int = static(default=1)

    def __post_init__(self) -> None:
        check_tensor("column", self.column, 1)
        check_inexact("column", self.column)
        if self.column.shape[-1] == 0:
            raise ValueError(f"column must have at least one entry, got shape {tuple(self.column.shape)}")
        if self.f not in (1, -1):
            raise ValueError(f"f must be 1 (circulant) or -1 (skew-circulant), got {self.f!r}")
        object.__setattr__(self, "f", int(self.f))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.column.shape, self.column.shape[-1]))

    def _like(self, column: Tensor) -> Self:
        return self._rebuild((column,), (self.f,))

    def _diagonals(self) -> Tensor:
        return f_circulant_diagonals(self.column, self.f)

    def _by_matrix(self) -> bool:
        return self.shape[-1] ** 2 <= DENSE_ENTRIES

    def _linear(self, x: Tensor) -> Tensor:
        if self._by_matrix():
            return toeplitz(self._diagonals(), x, self.shape[-1])
        if kernels_take(x):
            return f_circulant_by_kernels(self.column, x, self.f)
        return f_circulant(self.column.unsqueeze(-2), x, self.f)

    @property
    def mT(self) -> Circulant:
        turned = torch.cat([self.column[..., :1], self.f * self.column[..., 1:].flip(-1)], -1)
        return self._like(turned)

    def to_toeplitz(self) -> Toeplitz:
        """The same matrix by its 2 n - 1 diagonals."""
        return Toeplitz.from_diagonals(self._diagonals(), self.shape[-1])

    def to_ldr(self, e: float | complex | None = None, f: float | complex | None = None) -> ToeplitzLike:
        """The same matrix by generators of displacement rank 2; arguments as of :meth:`Toeplitz.to_ldr`."""
        return self.to_toeplitz().to_ldr(e, f)

    @property
    def flops(self) -> int:
        n = self.shape[-1]
        whole = self.f == 1 and n == good_size(n) and not self._by_matrix()
        each = convolution_flops(n, self.dtype.is_complex) if whole else toeplitz_flops(n, n, self.dtype.is_complex)
        return math.prod(self.batch_shape) * each

    # ---------------------------------------------------------------- the spectrum
    def _twist(self) -> Tensor | None:
        """The powers of an n-th root of -1: with that diagonal D, D Z_-1 D^-1 is a multiple of Z_1. None for f = 1."""
        if self.f == 1:
            return None
        n = self.shape[-1]
        angle = torch.arange(n, dtype=torch.float64, device=self.device) * (-math.pi / n)
        real = working(self.column).real.dtype
        return torch.complex(angle.cos().to(real), angle.sin().to(real))

    def eigenvalues(self) -> Tensor:
        """The n eigenvalues, complex, shape (*batch, n), in the order of ``torch.fft.fft(column)``.

        Eigenvalue q belongs to the eigenvector ``exp(2 pi i q k / n)``, k = 0, ..., n - 1; of a skew-circulant matrix
        to ``exp(pi i (2 q + 1) k / n)``.
        """
        twist, column = self._twist(), working(self.column)
        return _fft(column if twist is None else column * twist)

    def _apply_spectrum(self, spectrum: Tensor, x: Tensor) -> Tensor:
        """The product over the last dimension with the matrix of this family that has these eigenvalues."""
        twist = self._twist()
        found = _fft(spectrum * _fft(x if twist is None else x * twist), inverse=True)
        found = found if twist is None else found * twist.conj()
        return found if self.dtype.is_complex else found.real

    def _regular_eigenvalues(self, what: str) -> Tensor:
        self._check_factorisable(what)
        eigenvalues = self.eigenvalues()
        if values_visible(eigenvalues) and eigenvalues.numel():
            sizes = eigenvalues.detach().abs()
            floor = sizes.amax(-1) * self.shape[-1] * torch.finfo(sizes.dtype).eps
            if bool((sizes.amin(-1) <= floor).any()):
                raise LinAlgError(
                    f"{what}: the circulant matrix is singular to working precision: eigenvalues of modulus "
                    f"{sizes.amin().item():.2g} to {sizes.amax().item():.2g}"
                )
        return eigenvalues

    # ---------------------------------------------------------------- solving
    @property
    def _solve_flops(self) -> int:
        each = convolution_flops(self.shape[-1], complex=True)  # the transforms are complex
        return math.prod(self.batch_shape) * each * (1 if self.dtype.is_complex else 4)

    def _solve(self, b: Tensor) -> Tensor:
        spectrum = self._regular_eigenvalues("solve").reciprocal().unsqueeze(-2)
        return self._apply_spectrum(spectrum, b.mT).mT

    def inverse(self) -> Circulant:
        """The inverse, a matrix of the same f.

        Raises:
            LinAlgError: (of torch.linalg) if it is singular to working precision, seen on the CPU outside of
                compilation and vmap; elsewhere nothing waits for the values. ``solve`` does the same.
        """
        spectrum, twist = self._regular_eigenvalues("inverse").reciprocal(), self._twist()
        column = _fft(spectrum, inverse=True)
        column = column if twist is None else column * twist.conj()
        return self._like(column if self.dtype.is_complex else column.real)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        eigenvalues = self.eigenvalues()
        sign = eigenvalues.sgn().prod(-1)
        return (sign if self.dtype.is_complex else sign.real.sgn()), eigenvalues.abs().log().sum(-1)

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> Circulant:
        return self._like(scalar * self.column)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Circulant) and other.f == self.f:
            return self._like(f_circulant(self.column, other.column, self.f))
        return None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Circulant) and other.f == self.f:
            return self._like(self.column + other.column)
        if isinstance(other, (Circulant, CausalToeplitz)):
            other = other.to_toeplitz()
        return self.to_toeplitz()._add(other)

    def to_dense(self) -> Tensor:
        return hankel_dense(self._diagonals(), self.shape[-1]).flip(-1)

    def diagonal(self) -> Tensor:
        return self.column[..., :1].expand(self.column.shape)

    def trace(self) -> Tensor:
        return self.shape[-1] * self.column[..., 0]

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_toeplitz(cls, T: Toeplitz, f: int = 1) -> Self:
        """The nearest circulant (or skew-circulant) matrix in Frobenius norm to a square Toeplitz matrix, in O(n).

        T. Chan's preconditioner. Source: T. Chan 1988, "An optimal circulant preconditioner for Toeplitz systems".

        Args:
            T: shape (*batch, n, n).
            f: 1 or -1.

        Raises:
            ValueError: if T is not square.
        """
        if T.shape[-1] != T.shape[-2]:
            raise ValueError(f"T must be square for a circulant matrix, got shape {tuple(T.shape)}")
        n = T.shape[-1]
        above = torch.arange(n, device=T.device).to(T.diagonals.real.dtype) / n
        # Entry k stands n - k times on diagonal k and, times f, k times on diagonal k - n.
        wrapped = torch.cat([torch.zeros_like(T.column[..., :1]), T.diagonals[..., : n - 1]], -1)
        return cls((1 - above) * T.column + f * above * wrapped, f)

    @classmethod
    def from_dense(cls, W: Tensor, f: int = 1) -> Self:
        """The nearest circulant (or skew-circulant) matrix in Frobenius norm: means of the diagonals that wrap around.

        Args:
            W: shape (*batch, n, n), floating point or complex; its gradient is carried.
            f: 1 or -1.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if W is not square.
        """
        check_tensor("W", W, 2)
        if W.shape[-1] != W.shape[-2]:
            raise ValueError(f"W must be square for a circulant matrix, got shape {tuple(W.shape)}")
        return cls.from_toeplitz(Toeplitz.from_dense(W), f)

    @classmethod
    def random(
        cls,
        shape: Any,
        f: int = 1,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, n, n).
            f: 1 or -1.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if the shape is not square.
        """
        batch, m, n = check_matrix_shape(shape)
        if m != n:
            raise ValueError(f"shape must be square for a circulant matrix, got {tuple(shape)}")
        return cls(torch.empty((*batch, n), dtype=dtype, device=device), f).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.column, std / math.sqrt(self.shape[-1]), generator)
        return self
