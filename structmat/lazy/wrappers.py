"""Lazy values around one matrix: its transpose, a multiple, its inverse."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from structmat._checks import as_scalar
from structmat.base import LINEAR_STD, StructuredMatrix, matrix


@matrix
class Transposed(StructuredMatrix):
    """The transpose of ``base``, applied by its ``_linear_mT`` at the same cost.

    Args:
        base: any structured matrix of shape (*batch, m, n); the result has shape (*batch, n, m).

    Example:
        >>> import structmat
        >>> M = structmat.Monarch.random((6, 10), nblocks=2)
        >>> type(M.mT).__name__, tuple(M.mT.shape), M.mT.mT is M
        ('Transposed', (10, 6), True)
    """

    base: StructuredMatrix

    @property
    def shape(self) -> torch.Size:
        *batch, m, n = self.base.shape
        return torch.Size((*batch, n, m))

    def _linear(self, x: Tensor) -> Tensor:
        return self.base._linear_mT(x)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return self.base._linear(x)

    def _solve(self, b: Tensor) -> Tensor:
        return self.base._solve_mT(b)

    def _solve_mT(self, b: Tensor) -> Tensor:
        return self.base._solve(b)

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        return self.base._scale(scalar).mT

    @property
    def mT(self) -> StructuredMatrix:
        return self.base

    @property
    def flops(self) -> int:
        return self.base.flops

    @property
    def _solve_flops(self) -> int:
        return self.base._solve_flops

    def to_dense(self) -> Tensor:
        return self.base.to_dense().mT

    def diagonal(self) -> Tensor:
        return self.base.diagonal()

    def inverse(self) -> StructuredMatrix:
        return self.base.inverse().mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        return self.base.slogdet()

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        # The base has rows of variance s^2 / n; its transpose then has s^2 / n * m / ... per output.
        m, n = self.base.shape[-2:]
        self.base.randomize_(std * math.sqrt(n / m), generator)
        return self


@matrix
class Scaled(StructuredMatrix):
    """``scale * base`` for families that do not absorb a scalar into their factors.

    Args:
        base: any structured matrix.
        scale: a 0-d tensor of the same dtype (``scalar * A`` makes it from a number).

    Example:
        >>> import torch, structmat
        >>> A = 2 * structmat.Permutation(torch.tensor([1, 0]))
        >>> type(A).__name__, A @ torch.tensor([1.0, 3.0])
        ('Scaled', tensor([6., 2.]))
    """

    base: StructuredMatrix
    scale: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", as_scalar(self.scale, self.base.dtype, self.base.device))

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def _linear(self, x: Tensor) -> Tensor:
        return self.scale * self.base._linear(x)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return self.scale * self.base._linear_mT(x)

    def _solve(self, b: Tensor) -> Tensor:
        return self.base._solve(b) / self.scale

    def _solve_mT(self, b: Tensor) -> Tensor:
        return self.base._solve_mT(b) / self.scale

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        return Scaled(self.base, self.scale * scalar)

    @property
    def mT(self) -> StructuredMatrix:
        return Scaled(self.base.mT, self.scale)

    @property
    def flops(self) -> int:
        return self.base.flops + math.prod(self.shape[:-1])

    @property
    def _solve_flops(self) -> int:
        return self.base._solve_flops + math.prod(self.shape[:-1])

    def to_dense(self) -> Tensor:
        return self.scale * self.base.to_dense()

    def diagonal(self) -> Tensor:
        return self.scale * self.base.diagonal()

    def inverse(self) -> StructuredMatrix:
        return self.base.inverse()._scale(self.scale.reciprocal())

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = self.base.slogdet()
        n, size = self.shape[-1], self.scale.abs()
        return sign * (self.scale / size) ** n, logabs + n * size.log()

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        self.base.randomize_(1.0, generator)
        with torch.no_grad():
            self.scale.fill_(std)
        return self


@matrix
class Inverse(StructuredMatrix):
    """The inverse of ``base``, applied by its solver.

    Args:
        base: a square structured matrix whose class has a direct solver.

    Raises:
        ValueError: if base is not square.

    Example:
        >>> import torch, structmat
        >>> A = structmat.Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> structmat.Inverse(A) @ torch.ones(2)
        tensor([0.5000, 0.2500])
    """

    base: StructuredMatrix

    def __post_init__(self) -> None:
        self.base._check_square("Inverse")

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def _linear(self, x: Tensor) -> Tensor:
        return self.base._solve(x.mT).mT

    def _linear_mT(self, x: Tensor) -> Tensor:
        return self.base._solve_mT(x.mT).mT

    def _solve(self, b: Tensor) -> Tensor:
        return self.base._linear(b.mT).mT

    def _solve_mT(self, b: Tensor) -> Tensor:
        return self.base._linear_mT(b.mT).mT

    @property
    def mT(self) -> StructuredMatrix:
        return Inverse(self.base.mT)

    @property
    def flops(self) -> int:
        return self.base._solve_flops

    @property
    def _solve_flops(self) -> int:
        return self.base.flops

    def inverse(self) -> StructuredMatrix:
        return self.base

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = self.base.slogdet()
        return sign.conj(), -logabs
