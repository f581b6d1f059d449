"""Dense matrices under the protocol, so that dense and structured matrices mix."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.matrices._blocks import solve_columns, uniform_


@matrix
class Dense(StructuredMatrix):
    """A dense matrix; m n parameters, 2 m n operations a product.

    Args:
        weight: shape (*batch, m, n), floating point or complex.

    Raises:
        TypeError: if weight is not a floating-point or complex tensor.
        ValueError: if it has fewer than two dimensions.

    Example:
        >>> import torch, structmat
        >>> A = structmat.Dense(torch.eye(2))
        >>> A @ torch.tensor([1.0, 2.0])
        tensor([1., 2.])
    """

    weight: Tensor

    def __post_init__(self) -> None:
        check_tensor("weight", self.weight, 2)
        check_inexact("weight", self.weight)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def _linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT

    @property
    def mT(self) -> Dense:
        return Dense(self.weight.mT)

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel()

    @property
    def _solve_flops(self) -> int:
        n = self.shape[-1]
        return math.prod(self.batch_shape) * (2 * n**3 // 3 + 2 * n * n)

    def _solve(self, b: Tensor) -> Tensor:
        return solve_columns(self.weight, b)

    def inverse(self) -> Dense:
        self._check_factorisable("inverse")
        return Dense(torch.linalg.inv(self.weight))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        sign, logabs = torch.linalg.slogdet(self.weight)
        return sign, logabs

    def _scale(self, scalar: Tensor) -> Dense:
        return Dense(scalar * self.weight)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return Dense(self.weight @ other.weight) if isinstance(other, Dense) else None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return Dense(self.weight + other.weight) if isinstance(other, Dense) else None

    def to_dense(self) -> Tensor:
        return self.weight

    def diagonal(self) -> Tensor:
        return self.weight.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """Wrap W, exactly and without a copy."""
        return cls(W)

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
        return cls(torch.empty((*batch, m, n), dtype=dtype, device=device)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.weight, std / math.sqrt(self.shape[-1]), generator)
        return self
