"""Kronecker-sparse matrices: the factors of which butterfly matrices are products."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.chain import Pattern
from structmat.matrices._blocks import solve_columns, uniform_
from structmat.matrices.diagonal import Diagonal
from structmat_kernels.kronecker_sparse import kronecker_sparse


@matrix
class KroneckerSparse(StructuredMatrix):
    """A matrix of pattern I_a (x) 1_{b x c} (x) I_d: a diagonal blocks, each a b x c grid of d x d diagonal matrices.

    ``y[(A b + o) d + D] = sum_i values[A, o, i, D] x[(A c + i) d + D]``.

    a b c d parameters, twice as many operations a product. Closed under transposes and, of square blocks, inverses.
    d = 1 is block-diagonal. The layout of the values is that of FAuST and lazylinop.
    Source: Gonon et al. 2024, "Fast inference with Kronecker-sparse matrices".

    Args:
        values: shape (*batch, a, b, c, d), floating point or complex.

    Raises:
        TypeError: if values is not a floating-point or complex tensor.
        ValueError: if it has fewer than four dimensions.

    Example:
        >>> import torch, structmat
        >>> K = structmat.KroneckerSparse(torch.arange(1.0, 9.0).view(1, 2, 2, 2))
        >>> K.to_dense()
        tensor([[1., 0., 3., 0.],
                [0., 2., 0., 4.],
                [5., 0., 7., 0.],
                [0., 6., 0., 8.]])
    """

    values: Tensor

    def __post_init__(self) -> None:
        check_tensor("values", self.values, 4)
        check_inexact("values", self.values)

    @property
    def pattern(self) -> Pattern:
        """``(a, b, c, d)``."""
        return Pattern(*self.values.shape[-4:])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-4], *self.pattern.shape))

    def _blocks(self) -> Tensor:
        """The dense blocks, shape (*batch, a, d, b, c)."""
        return self.values.movedim(-1, -3)

    @classmethod
    def _from_blocks(cls, blocks: Tensor) -> KroneckerSparse:
        return KroneckerSparse(blocks.movedim(-3, -1))

    def _linear(self, x: Tensor) -> Tensor:
        return kronecker_sparse(x, self._blocks())

    @property
    def mT(self) -> KroneckerSparse:
        return KroneckerSparse(self.values.transpose(-3, -2))

    @property
    def flops(self) -> int:
        return 2 * self.values.numel()

    # ---------------------------------------------------------------- solving
    def _square_blocks(self, what: str) -> Tensor:
        self._check_factorisable(what)
        _, b, c, _ = self.pattern
        if b != c:
            raise ValueError(f"{what} needs square blocks, got pattern (a, b, c, d) = {tuple(self.pattern)}")
        return self._blocks()

    @property
    def _solve_flops(self) -> int:
        a, b, _, d = self.pattern
        return math.prod(self.batch_shape) * a * d * (2 * b**3 // 3 + 2 * b * b)

    def _solve(self, b: Tensor) -> Tensor:
        blocks = self._square_blocks("solve")
        a, size, _, d = self.pattern
        pieces = b.unflatten(-2, (a, size, d)).movedim(-2, -4)  # (*batch, d, a, size, k)
        pieces = pieces.transpose(-4, -3)  # (*batch, a, d, size, k)
        found = solve_columns(blocks, pieces)
        return found.transpose(-4, -3).movedim(-4, -2).flatten(-4, -2)

    def inverse(self) -> KroneckerSparse:
        return self._from_blocks(torch.linalg.inv(self._square_blocks("inverse")))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        # A symmetric permutation makes it block-diagonal.
        sign, logabs = torch.linalg.slogdet(self._square_blocks("slogdet"))
        return sign.prod(-1).prod(-1), logabs.sum((-2, -1))

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> KroneckerSparse:
        return KroneckerSparse(scalar * self.values)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        a, _, c, d = self.pattern
        if isinstance(other, Diagonal):
            return KroneckerSparse(self.values * other.diag.unflatten(-1, (a, 1, c, d)))
        if isinstance(other, KroneckerSparse) and (other.pattern.a, other.pattern.d) == (a, d):
            return self._from_blocks(self._blocks() @ other._blocks())
        return None

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        a, b, _, d = self.pattern
        if isinstance(other, Diagonal):
            return KroneckerSparse(other.diag.unflatten(-1, (a, b, 1, d)) * self.values)
        return None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, KroneckerSparse) and self.pattern == other.pattern:
            return KroneckerSparse(self.values + other.values)
        return None

    # ---------------------------------------------------------------- construction
    @classmethod
    def structure(cls, m: int, n: int, a: int, d: int) -> Pattern:
        """The pattern of an m x n matrix: b = m / (a d), c = n / (a d).

        Raises:
            TypeError: if a or d is not an integer.
            ValueError: if a d does not divide m and n.
        """
        check_int("a", a)
        check_int("d", d)
        if m % (a * d) or n % (a * d):
            raise ValueError(f"a d must divide the rows and columns of the {m} x {n} matrix, got {a} * {d}")
        return Pattern(a, m // (a * d), n // (a * d), d)

    @classmethod
    def from_dense(cls, W: Tensor, a: int, d: int) -> Self:
        """The nearest matrix of the pattern in Frobenius norm: W's own entries on the support. Carries no gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex.
            a: number of diagonal blocks.
            d: size of the diagonal matrices.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if a d does not divide m and n.
        """
        check_tensor("W", W, 2)
        check_inexact("W", W)
        pattern = cls.structure(W.shape[-2], W.shape[-1], a, d)
        grid = W.detach().unflatten(-1, (a, pattern.c, d)).unflatten(-4, (a, pattern.b, d))
        # (*batch, a, b, d, a, c, d): the diagonal of both a, then of both d.
        values = grid.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2)  # (*batch, b, c, a, d)
        return cls(values.movedim(-2, -4).contiguous())

    @classmethod
    def random(
        cls,
        shape: Any,
        a: int,
        d: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix of the pattern whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            a: number of diagonal blocks.
            d: size of the diagonal matrices.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        pattern = cls.structure(m, n, a, d)
        return cls(torch.empty((*batch, *pattern), dtype=dtype, device=device)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.values, std / math.sqrt(max(self.pattern.c, 1)), generator)
        return self
