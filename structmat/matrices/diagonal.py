"""Diagonal matrices."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.matrices._blocks import uniform_
from structmat.matrices.dense import Dense


@matrix
class Diagonal(StructuredMatrix):
    """A square diagonal matrix; n parameters, n operations a product.

    Closed under products, sums, inverses and transposes; a product with :class:`Dense` is dense.

    Args:
        diag: shape (*batch, n), floating point or complex.

    Raises:
        TypeError: if diag is not a floating-point or complex tensor.
        ValueError: if it has no dimension.

    Example:
        >>> import torch, structmat
        >>> A = structmat.Diagonal(torch.tensor([1.0, 2.0]))
        >>> A.solve(torch.tensor([1.0, 1.0]))
        tensor([1.0000, 0.5000])
    """

    diag: Tensor

    def __post_init__(self) -> None:
        check_tensor("diag", self.diag, 1)
        check_inexact("diag", self.diag)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.diag.shape, self.diag.shape[-1]))

    def _linear(self, x: Tensor) -> Tensor:
        return x * self.diag.unsqueeze(-2)

    @property
    def mT(self) -> Diagonal:
        return self

    @property
    def flops(self) -> int:
        return self.diag.numel()

    @property
    def _solve_flops(self) -> int:
        return self.diag.numel()

    def _solve(self, b: Tensor) -> Tensor:
        return b / self.diag.unsqueeze(-1)

    def inverse(self) -> Diagonal:
        return Diagonal(self.diag.reciprocal())

    def slogdet(self) -> tuple[Tensor, Tensor]:
        return self.diag.sgn().prod(-1), self.diag.abs().log().sum(-1)

    def _scale(self, scalar: Tensor) -> Diagonal:
        return Diagonal(scalar * self.diag)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal):
            return Diagonal(self.diag * other.diag)
        return Dense(self.diag.unsqueeze(-1) * other.weight) if isinstance(other, Dense) else None

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return Dense(other.weight * self.diag.unsqueeze(-2)) if isinstance(other, Dense) else None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal):
            return Diagonal(self.diag + other.diag)
        return Dense(torch.diag_embed(self.diag) + other.weight) if isinstance(other, Dense) else None

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.diag)

    def diagonal(self) -> Tensor:
        return self.diag

    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """The best diagonal approximation of W in Frobenius norm: its diagonal.

        Args:
            W: shape (*batch, n, n).

        Raises:
            ValueError: if W is not square.
        """
        check_tensor("W", W, 2)
        if W.shape[-1] != W.shape[-2]:
            raise ValueError(f"W must be square for a diagonal matrix, got shape {tuple(W.shape)}")
        return cls(W.diagonal(dim1=-2, dim2=-1).clone())

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random diagonal matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, n, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if the shape is not square.
        """
        batch, m, n = check_matrix_shape(shape)
        if m != n:
            raise ValueError(f"shape must be square for a diagonal matrix, got {tuple(shape)}")
        return cls(torch.empty((*batch, n), dtype=dtype, device=device)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.diag, std, generator)
        return self
