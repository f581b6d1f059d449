"""Kronecker products of structured matrices, kept as their factors."""

from __future__ import annotations

import functools
import math
from typing import Self

import torch
from torch import Tensor

from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.lazy._parts import check_tuple, common_batch
from structmat.lazy.joins import compose


@matrix
class Kronecker(StructuredMatrix):
    """The Kronecker product of ``factors``: ``(A (x) B)[i p + k, j q + l] = A[i, j] B[k, l]``.

    Applied factor by factor, never multiplied out. Cost for square factors of sizes n_1, ..., n_d:
    each factor's flops times n / n_i.

    Args:
        factors: a tuple or list of matrices of any sizes; batches broadcast.

    Raises:
        TypeError: if factors is empty or holds something else, or dtypes differ.
        ValueError: if batches or devices do not match.

    Example:
        >>> import torch, structmat
        >>> H = structmat.Dense(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> hadamard = structmat.Kronecker((H, H, H))
        >>> hadamard @ torch.arange(8.0)
        tensor([ 28.,  -4.,  -8.,   0., -16.,   0.,   0.,   0.])
    """

    factors: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", check_tuple("factors", self.factors, "Kronecker product"))

    @property
    def shape(self) -> torch.Size:
        rows = cols = 1  # loops: torch.compile does not trace math.prod of a generator
        for factor in self.factors:
            rows, cols = rows * factor.shape[-2], cols * factor.shape[-1]
        return torch.Size((*common_batch(self.factors), rows, cols))

    def _apply(self, x: Tensor, solve: bool, transpose: bool) -> Tensor:
        # The last axis is the list of all factors' axes. Each step applies a factor to the last of them and moves
        # the result to the front, so that after all steps the order is the original one again.
        tokens = x.shape[-2]
        for factor in reversed(self.factors):
            size = factor.shape[-2] if transpose else factor.shape[-1]
            others = x.shape[-1] // size
            x = x.unflatten(-1, (others, size)).flatten(-3, -2)
            if solve:
                x = (factor._solve_mT(x.mT) if transpose else factor._solve(x.mT)).mT
            else:
                x = factor._linear_mT(x) if transpose else factor._linear(x)
            x = x.unflatten(-2, (tokens, others)).mT.flatten(-2, -1)
        return x

    def _linear(self, x: Tensor) -> Tensor:
        return self._apply(x, solve=False, transpose=False)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return self._apply(x, solve=False, transpose=True)

    def _square_factors(self, what: str) -> None:
        for factor in self.factors:
            factor._check_square(f"{what} of a Kronecker product, factor by factor,")

    def _solve(self, b: Tensor) -> Tensor:
        self._square_factors("solve")
        return self._apply(b.mT, solve=True, transpose=False).mT

    def _solve_mT(self, b: Tensor) -> Tensor:
        self._square_factors("solve")
        return self._apply(b.mT, solve=True, transpose=True).mT

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        return Kronecker((self.factors[0]._scale(scalar), *self.factors[1:]))

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if not isinstance(other, Kronecker) or len(other.factors) != len(self.factors):
            return None
        pairs = list(zip(self.factors, other.factors, strict=True))
        if any(a.shape[-1] != b.shape[-2] for a, b in pairs):
            return None
        return Kronecker(tuple(compose(a, b) for a, b in pairs))

    @property
    def mT(self) -> StructuredMatrix:
        return Kronecker(tuple(f.mT for f in self.factors))

    def _count(self, solve: bool) -> int:
        total, batch = 0, math.prod(common_batch(self.factors))
        widths = [f.shape[-1] for f in self.factors]
        for i in reversed(range(len(self.factors))):
            factor, others = self.factors[i], math.prod(widths[:i] + widths[i + 1 :])
            per_batch = (factor._solve_flops if solve else factor.flops) // max(math.prod(factor.batch_shape), 1)
            total += batch * others * per_batch
            widths[i] = factor.shape[-2]
        return total

    @property
    def flops(self) -> int:
        return self._count(solve=False)

    @property
    def _solve_flops(self) -> int:
        return self._count(solve=True)

    def to_dense(self) -> Tensor:
        def kron(a: Tensor, b: Tensor) -> Tensor:
            return (a[..., :, None, :, None] * b[..., None, :, None, :]).flatten(-4, -3).flatten(-2, -1)

        return functools.reduce(kron, [f.to_dense() for f in self.factors])

    def diagonal(self) -> Tensor:
        if any(f.shape[-1] != f.shape[-2] for f in self.factors):
            return super().diagonal()
        return functools.reduce(
            lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2, -1),
            [f.diagonal() for f in self.factors],
        )

    def inverse(self) -> StructuredMatrix:
        self._check_square("inverse")
        self._square_factors("inverse")
        return Kronecker(tuple(f.inverse() for f in self.factors))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_square("slogdet")
        self._square_factors("slogdet")
        n, sign, logabs = self.shape[-1], None, None
        for factor in self.factors:
            s, v = factor.slogdet()
            power = n // factor.shape[-1]
            sign = s**power if sign is None else sign * s**power
            logabs = v * power if logabs is None else logabs + v * power
        assert sign is not None and logabs is not None  # factors is not empty
        return sign, logabs

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        for i, factor in enumerate(self.factors):
            factor.randomize_(std if i == 0 else 1.0, generator)
        return self
