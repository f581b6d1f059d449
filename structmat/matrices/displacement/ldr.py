"""Matrices of low displacement rank: ``A M - M B = G H^T`` with few columns in G and H."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._autocast import autocast_dtype
from structmat._checks import check_inexact, check_same
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.lazy import Product
from structmat.linalg.cauchy import BLOCK
from structmat.linalg.implicit import implicit_logdet, implicit_solve
from structmat.matrices._blocks import uniform_
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement import _algebra, _pairs
from structmat.matrices.displacement._convert import convert
from structmat.matrices.displacement._convolution import good_size, working
from structmat.matrices.displacement._ldr_products import (
    diagonal_diagonal,
    diagonal_shift,
    shift_diagonal,
    shift_shift,
)
from structmat.matrices.displacement._solve import eliminate
from structmat.matrices.displacement.operators import Shift

Operator = Shift | Diagonal


@matrix
class LDR(StructuredMatrix):
    """A matrix of low displacement rank: the M with ``A M - M B = G H^T`` (Sylvester displacement).

    A and B are shifts Z_f, their transposes, or diagonal matrices without a common eigenvalue, so that M is unique.
    With two shifts M is like a Toeplitz matrix (of rank 2) or, of one of them transposed, a Hankel matrix; with a
    diagonal and a shift like a Vandermonde matrix, and with two diagonals like a Cauchy matrix (of rank 1). Results of
    operations have the class of these that fits: :class:`ToeplitzLike`, :class:`HankelLike`, :class:`VandermondeLike`,
    :class:`CauchyLike`, else this one.

    r (m + n) parameters and those of A and B. A product takes 2 r + 2 FFTs of two shifts, r of them and 2 r m n
    operations of one, (r + 2 tokens) m n of none. Closed under transposes (rank r), sums with the same or other shifts
    (the sum of ranks, or 2 more), products (the sum, or 1 or 2 more), inverses (r) and sums with a :class:`LowRank` (2
    of its ranks more). Where that depends on the values of diagonals, which are equal or apart, it is so on the CPU
    only, and in sums only if neither is learned or both are one tensor; else results are lazy. ``displacement_rank`` is
    the number of columns of G, a bound; ``compress`` finds the rank.

    Not of every size is every pair of shifts allowed: Z_e of size m and Z_f of size n have a common eigenvalue if
    ``e^(n/g) = f^(m/g)``, g = gcd(m, n). The error of products grows with the reciprocal of the least distance of two
    eigenvalues, for corners of modulus 1 about n / g.

    Args:
        A: m x m, a :class:`Shift` or :class:`~structmat.Diagonal`.
        B: n x n, likewise.
        left: G, shape (*batch, m, r), floating point or complex.
        right: H, shape (*batch, n, r), same dtype and device; batches broadcast.

    Raises:
        TypeError: if A or B is another operator, left or right no floating-point or complex tensor, or dtypes differ.
        ValueError: if sizes, batches or devices do not match, or A and B have a common eigenvalue (of diagonals that
            is seen on the CPU only; elsewhere nothing waits for the values and the products are not finite).

    Source: Kailath, Kung, Morf 1979, "Displacement ranks of matrices and linear equations"; Gohberg, Kailath, Olshevsky
    1995; Pan 2001, "Structured matrices and polynomials".

    Example:
        >>> import torch
        >>> from structmat.matrices.displacement import LDR, Shift
        >>> A, B = Shift(4, f=1.0), Shift(4, f=-1.0)
        >>> M = LDR(A, B, torch.ones(4, 1), torch.ones(4, 1))
        >>> type(M @ M).__name__, (M @ M).displacement_rank
        ('ToeplitzLike', 3)
    """

    A: Operator
    B: Operator
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self._check_generators()
        for name, size in (("A", self.left.shape[-2]), ("B", self.right.shape[-2])):
            operator = getattr(self, name)
            if not isinstance(operator, (Shift, Diagonal)):
                raise TypeError(f"{name} must be a Shift or a Diagonal, got {type(operator).__name__}")
            if isinstance(operator, Shift):  # which has no values: only its dtype says what it multiplies
                operator = operator._to(self.left.device, self.left.dtype)
                object.__setattr__(self, name, operator)
            else:
                check_same(f"{name}.diag", operator.diag, "left", self.left)
            if operator.shape[-1] != size:
                raise ValueError(
                    f"{name} must have the size of the columns of {'left' if name == 'A' else 'right'}, {size}, "
                    f"got {operator.shape[-1]}"
                )
        _ = self.shape
        _pairs.check_disjoint(self.A, self.B)

    def _check_generators(self) -> None:
        for name in ("left", "right"):
            _pairs.check_rows(name, getattr(self, name))
            check_inexact(name, getattr(self, name))
        check_same("right", self.right, "left", self.left)
        if self.left.shape[-1] != self.right.shape[-1]:
            raise ValueError(
                f"left (*batch, m, r) and right (*batch, n, r) must share r, got {tuple(self.left.shape)} and "
                f"{tuple(self.right.shape)}"
            )

    def _set(self, A: Operator, B: Operator, G: Tensor, H: Tensor) -> None:
        for name, value in (("A", A), ("B", B), ("left", G), ("right", H)):
            object.__setattr__(self, name, value)
        self.__post_init__()

    @classmethod
    def _make(cls, A: Operator, B: Operator, G: Tensor, H: Tensor) -> LDR:
        """The value of the class that fits, unchecked."""
        return _algebra.class_for(LDR, A, B)._rebuild((A, B, G, H), ())

    # ---------------------------------------------------------------- shape and products
    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def shape(self) -> torch.Size:
        m, n = self.left.shape[-2], self.right.shape[-2]
        batches = [t.shape[:-2] for t in (self.A, self.B, self.left, self.right)]
        if not any(batches):
            return torch.Size((m, n))
        return torch.Size((*torch.broadcast_shapes(*batches), m, n))

    @property
    def displacement_rank(self) -> int:
        """The number of columns of G and H: a bound of the rank of ``A M - M B``."""
        return self.left.shape[-1]

    def _prepare(self, *args: Any, **kwargs: Any) -> tuple[Self, Tensor]:
        # Inside autocast products are computed in float32 all the same: eigenvalues must not be rounded before the
        # differences of their powers are taken.
        return self, super()._prepare(*args, **kwargs)[1]

    def _linear(self, x: Tensor) -> Tensor:
        if autocast_dtype(x.device) is None:
            return self._product(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        A, B, G, H, v = self.A, self.B, working(self.left), working(self.right), working(x)
        # With the reversal J: Z_f^T = J Z_f J, so that J M has the shift Z_e where M has Z_e^T, and so for M J.
        if isinstance(A, Shift) and A.up:
            G = G.flip(-2)
        if isinstance(B, Shift) and B.up:
            H, v = H.flip(-2), v.flip(-1)
        if isinstance(A, Shift) and isinstance(B, Shift):
            y = shift_shift(v, G, H, A.f, B.f)
        elif isinstance(B, Shift):
            y = diagonal_shift(v, working(A.diag), G, H, B.f)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(A, Shift):
            y = shift_diagonal(v, working(B.diag), G, H, A.f)
        else:
            y = diagonal_diagonal(v, working(A.diag), working(B.diag), G, H)
        return (y.flip(-1) if isinstance(A, Shift) and A.up else y).to(x.dtype)

    @property
    def mT(self) -> LDR:
        return self._make(self.B.mT, self.A.mT, -self.right, self.left)

    @property
    def flops(self) -> int:
        batch, (m, n), r = math.prod(self.batch_shape), self.shape[-2:], self.displacement_rank

        def transforms(size: int) -> int:
            length = good_size(2 * size - 1)
            return int((1.25 if self.dtype.is_complex else 2.5) * length * length.bit_length())

        shifts = isinstance(self.A, Shift) + isinstance(self.B, Shift)
        fast = sum((r + 1) * transforms(o.shape[-1]) for o in (self.A, self.B) if isinstance(o, Shift))
        return batch * (fast + (0 if shifts == 2 else (2 * r * m * n if shifts else (2 * r + 3) * m * n)))

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> LDR:
        return self._make(self.A, self.B, scalar * self.left, self.right)

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return _algebra.add(self, other)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return _algebra.compose(self, other)

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return _algebra.compose(other, self)

    def with_shifts(self, e: float | complex | None = None, f: float | complex | None = None) -> LDR:
        """The same matrix with other corners of its shifts; each that changes adds 1 to the rank, and one product.

        Args:
            e: the corner of A, as it is by default.
            f: the corner of B, as it is by default.

        Raises:
            ValueError: if that operator is not a shift, or the new ones have a common eigenvalue.
        """
        return _algebra.with_shifts(self, e, f)

    def compress(self, tol: float | None = None, rank: int | None = None) -> LDR:
        """The same operators with fewer columns: the best approximation of ``G H^T``, by QR and SVD, O((m + n) r^2).

        Args:
            tol: singular values of ``G H^T`` up to ``tol`` times the largest are dropped; by default the size of
                G times the dtype's rounding times ``sum_j |g_j| |h_j|``, which finds the rank (in a batch, the
                largest) also where terms cancel. Waits for the values.
            rank: keep this many instead.

        Raises:
            ValueError: if both are given, tol is negative, or the rank not from 1 to the number of columns.
        """
        return _algebra.compress(self, tol, rank)

    def convert(self, kind: str) -> Product:
        """The same matrix as a product with one of another kind, by the eigenvectors of its shifts; of the same rank.

        ``U_A C U_B^-1``: where a shift Z_f becomes the diagonal of its eigenvalues, a Toeplitz-like matrix becomes
        Vandermonde-like, then Cauchy-like. Costs r + 1 FFTs; a product then one more for each shift that is gone.

        Args:
            kind: "cauchy" for diagonals only, "vandermonde" for a left diagonal and the right operator as it is,
                "toeplitz" for shifts of one direction, by a reversal of the columns of a Hankel-like matrix.

        Returns:
            A :class:`~structmat.Product` whose middle or only factor of low displacement rank is of that kind.

        Raises:
            ValueError: if the kind is unknown, the matrix has not the shifts for it, or a corner is 0 (see
                :meth:`with_shifts`).
            TypeError: if eigenvectors, which are complex, meet a real matrix: convert it with ``.to`` first.
        """
        return convert(self, kind)

    def displacement(self) -> StructuredMatrix:
        """``A M - M B``, as the :class:`LowRank` matrix ``G H^T``."""
        from structmat.matrices.low_rank import LowRank

        return LowRank(self.left, self.right.mT)

    # ---------------------------------------------------------------- solving
    def _solve(self, b: Tensor) -> Tensor:
        self._check_factorisable("solve")
        return implicit_solve(self, b, lambda M, b: eliminate(M, b)[0])

    @property
    def _solve_flops(self) -> int:
        # Panels of the matrix and of the identity below it, and their elimination in blocks.
        n, r = self.shape[-1], self.displacement_rank
        return math.prod(self.batch_shape) * (4 * r + 2 * BLOCK + 6) * n * n

    def inverse(self) -> LDR:
        """The inverse, ``B M^-1 - M^-1 A = -(M^-1 G) (M^-T H)^T``, of the same rank; costs two solves.

        Raises:
            ValueError: if the matrix is not square.
            TypeError: if the dtype is float16 or bfloat16.
            torch.linalg.LinAlgError: if it is singular to double precision.
        """
        self._check_factorisable("inverse")
        return self._make(self.B, self.A, -self._solve(self.left), self.mT._solve(self.right))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign (or phase) and log|det M|, each of shape (*batch,), at the cost of a solve.

        Raises:
            ValueError: if the matrix is not square.
            torch.linalg.LinAlgError: if it is singular to double precision.
        """
        self._check_factorisable("slogdet")
        if not self.dtype.is_complex:
            sign, _ = _determinant(self.detach())
            return sign, implicit_logdet(self, lambda M: _determinant(M)[1])

        def logarithm(M: LDR) -> Tensor:
            sign, logabs = _determinant(M)
            return torch.complex(logabs, sign.angle())

        value = implicit_logdet(self, logarithm)
        return torch.polar(torch.ones_like(value.real), value.imag), value.real

    # ---------------------------------------------------------------- random members
    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        for t in (self.left, self.right):
            uniform_(t, 1.0, generator)
        if self.device.type == "meta":
            return self
        # The scale depends on the eigenvalues of A and B: measured, with 64 vectors of signs.
        signs = torch.empty(64, self.shape[-1], device=self.device, dtype=torch.float32).uniform_(generator=generator)
        y = working(self._linear((signs.round() * 2 - 1).to(self.dtype)))
        size = (y.abs().square().mean((-2, -1), keepdim=True)).sqrt()
        while size.ndim > self.left.ndim:  # G is broadcast against the nodes' batch: one scale for all
            size = size.mean(0)
        self.left.mul_((std / size).to(self.dtype))
        return self


def _determinant(M: LDR) -> tuple[Tensor, Tensor]:
    return eliminate(M, M.left[..., :, :1])[1:]
