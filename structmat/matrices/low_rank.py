"""Low-rank matrices: a tall factor times a wide one."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.matrices._blocks import uniform_
from structmat.projection.truncated import truncated_svd


@matrix
class LowRank(StructuredMatrix):
    """``left @ right``, a matrix of rank at most r; r (m + n) parameters, 2 r (m + n) operations a product.

    Closed under transposes and sums; a product with any matrix from either side is again low rank.

    Args:
        left: shape (*batch, m, r).
        right: shape (*batch, r, n), same dtype and device; batches broadcast.

    Raises:
        TypeError: if a factor is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if inner sizes, batches or devices differ.

    Example:
        >>> import torch, structmat
        >>> A = structmat.LowRank(torch.ones(3, 1), torch.ones(1, 2))
        >>> A.shape, A.num_params
        (torch.Size([3, 2]), 5)
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            check_tensor(name, getattr(self, name), 2)
            check_inexact(name, getattr(self, name))
        check_same("right", self.right, "left", self.left)
        if self.left.shape[-1] != self.right.shape[-2]:
            raise ValueError(
                f"left (*batch, m, r) and right (*batch, r, n) must share r, got {tuple(self.left.shape)} "
                f"and {tuple(self.right.shape)}"
            )
        _ = self.shape

    @property
    def shape(self) -> torch.Size:
        if self.left.ndim == self.right.ndim == 2:
            return torch.Size((self.left.shape[-2], self.right.shape[-1]))
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-1]))

    @property
    def rank(self) -> int:
        """The inner size r."""
        return self.left.shape[-1]

    def _linear(self, x: Tensor) -> Tensor:
        return (x @ self.right.mT) @ self.left.mT

    @property
    def mT(self) -> LowRank:
        return LowRank(self.right.mT, self.left.mT)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.batch_shape) * self.rank * sum(self.shape[-2:])

    def _not_invertible(self, what: str) -> ValueError:
        self._check_square(what)
        n, r = self.shape[-1], self.rank
        if r < n:
            return ValueError(f"{what}: a {n} x {n} matrix of rank {r} is singular")
        return ValueError(f"{what}: a product of factors of inner size {r} >= {n} has no structured solver; use Dense")

    def _solve(self, b: Tensor) -> Tensor:
        raise self._not_invertible("solve")

    def inverse(self) -> StructuredMatrix:
        raise self._not_invertible("inverse")

    def slogdet(self) -> tuple[Tensor, Tensor]:
        raise self._not_invertible("slogdet")

    def _scale(self, scalar: Tensor) -> LowRank:
        return LowRank(scalar * self.left, self.right)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, LowRank) and other.rank < self.rank:
            return LowRank(self._linear(other.left.mT).mT, other.right)
        return LowRank(self.left, other._linear_mT(self.right))

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return LowRank(other._linear(self.left.mT).mT, self.right)

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if not isinstance(other, LowRank):
            return None
        batch = torch.broadcast_shapes(self.batch_shape, other.batch_shape)
        lefts = [v.left.expand(*batch, *v.left.shape[-2:]) for v in (self, other)]
        rights = [v.right.expand(*batch, *v.right.shape[-2:]) for v in (self, other)]
        return LowRank(torch.cat(lefts, -1), torch.cat(rights, -2))

    def to_dense(self) -> Tensor:
        return self.left @ self.right

    def diagonal(self) -> Tensor:
        count = min(self.shape[-2:])
        return (self.left[..., :count, :] * self.right[..., :, :count].mT).sum(-1)

    @classmethod
    def from_dense(cls, W: Tensor, rank: int) -> Self:
        """The best approximation of W of rank at most ``rank`` in Frobenius norm (Eckart-Young), by truncated SVD.

        Singular values are split evenly between the factors. The result does not carry W's gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex; float16 and bfloat16 are decomposed in float64.
            rank: from 1 to min(m, n).

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the rank is out of range, or W has NaN or infinite entries.
        """
        check_tensor("W", W, 2)
        check_inexact("W", W)
        check_int("rank", rank)
        if rank > min(W.shape[-2:]):
            raise ValueError(f"rank must be at most min(m, n) = {min(W.shape[-2:])} for W of shape {tuple(W.shape)}")
        left, right, _ = truncated_svd(W, rank)
        return cls(left, right)

    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix of the given rank whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            rank: the inner size, at least 1.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        check_int("rank", rank)
        left = torch.empty((*batch, m, rank), dtype=dtype, device=device)
        return cls(left, torch.empty((*batch, rank, n), dtype=dtype, device=device)).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        uniform_(self.right, 1 / math.sqrt(self.shape[-1]), generator)
        uniform_(self.left, std / math.sqrt(max(self.rank, 1)), generator)
        return self
