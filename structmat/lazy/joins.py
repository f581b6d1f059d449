"""Products and sums: the rules that join two matrices, and the lazy values where no rule applies."""

from __future__ import annotations

import functools
import math
from typing import Self

import torch
from torch import Tensor

from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.lazy._parts import broadcast_count, check_pair, check_tuple, common_batch


def compose(a: StructuredMatrix, b: StructuredMatrix) -> StructuredMatrix:
    """``a @ b``: in closed form where a rule applies, else a flat :class:`Product`.

    Raises:
        ValueError: if inner sizes, batches or devices do not match.
        TypeError: if dtypes differ.
    """
    check_pair(a, b, "a product")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}: inner sizes differ")
    closed = a._compose(b)
    if closed is None:
        closed = b._rcompose(a)
    if closed is not None:
        return closed
    left = a.factors if isinstance(a, Product) else (a,)
    right = b.factors if isinstance(b, Product) else (b,)
    middle = left[-1]._compose(right[0])
    if middle is None:
        middle = right[0]._rcompose(left[-1])
    return Product(left + right) if middle is None else Product((*left[:-1], middle, *right[1:]))


def add(a: StructuredMatrix, b: StructuredMatrix) -> StructuredMatrix:
    """``a + b``: in closed form where a rule applies, else a flat :class:`Sum`.

    Raises:
        ValueError: if shapes, batches or devices do not match.
        TypeError: if dtypes differ.
    """
    check_pair(a, b, "a sum")
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"cannot add shapes {tuple(a.shape)} and {tuple(b.shape)}")
    closed = a._add(b)
    if closed is None:
        closed = b._add(a)
    if closed is not None:
        return closed
    terms = a.terms if isinstance(a, Sum) else (a,)
    return Sum(terms + (b.terms if isinstance(b, Sum) else (b,)))


@matrix
class Product(StructuredMatrix):
    """The product of ``factors``, applied from the last to the first; never multiplied out.

    Args:
        factors: a tuple or list of matrices whose inner sizes agree; batches broadcast.

    Raises:
        TypeError: if factors is empty or holds something else, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.

    Example:
        >>> import structmat
        >>> M = structmat.Monarch.random((6, 10), nblocks=2)
        >>> A = structmat.Diagonal.random((6, 6)) @ M
        >>> type(A).__name__, A.num_params, A.flops
        ('Product', 54, 102)
    """

    factors: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", check_tuple("factors", self.factors, "product"))
        for a, b in zip(self.factors, self.factors[1:], strict=False):
            if a.shape[-1] != b.shape[-2]:
                raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}: inner sizes differ")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*common_batch(self.factors), self.factors[0].shape[-2], self.factors[-1].shape[-1]))

    def _linear(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor._linear(x)
        return x

    def _linear_mT(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = factor._linear_mT(x)
        return x

    def _square_factors(self, what: str) -> None:
        for factor in self.factors:
            factor._check_square(f"{what} of a product, factor by factor,")

    def _solve(self, b: Tensor) -> Tensor:
        self._square_factors("solve")
        for factor in self.factors:
            b = factor._solve(b)
        return b

    def _solve_mT(self, b: Tensor) -> Tensor:
        self._square_factors("solve")
        for factor in reversed(self.factors):
            b = factor._solve_mT(b)
        return b

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        return Product((self.factors[0]._scale(scalar), *self.factors[1:]))

    @property
    def mT(self) -> StructuredMatrix:
        return Product(tuple(f.mT for f in reversed(self.factors)))

    @property
    def flops(self) -> int:
        return broadcast_count(self.factors, [f.flops for f in self.factors])

    @property
    def _solve_flops(self) -> int:
        return broadcast_count(self.factors, [f._solve_flops for f in self.factors])

    def to_dense(self) -> Tensor:
        dense = self.factors[-1].to_dense()
        for factor in reversed(self.factors[:-1]):
            dense = factor._linear(dense.mT).mT
        return dense

    def inverse(self) -> StructuredMatrix:
        self._check_square("inverse")
        self._square_factors("inverse")
        return functools.reduce(compose, [f.inverse() for f in reversed(self.factors)])

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_square("slogdet")
        self._square_factors("slogdet")
        parts = [f.slogdet() for f in self.factors]
        sign = functools.reduce(torch.mul, [s for s, _ in parts])
        return sign, functools.reduce(torch.add, [v for _, v in parts])

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        for i, factor in enumerate(self.factors):
            factor.randomize_(std if i == 0 else 1.0, generator)
        return self


@matrix
class Sum(StructuredMatrix):
    """The sum of ``terms``, applied term by term.

    Args:
        terms: a tuple or list of matrices of one shape; batches broadcast.

    Raises:
        TypeError: if terms is empty or holds something else, or dtypes differ.
        ValueError: if shapes, batches or devices do not match.

    Example:
        >>> import structmat
        >>> A = structmat.Monarch.random((6, 10), nblocks=2) + structmat.LowRank.random((6, 10), rank=1)
        >>> type(A).__name__, A.num_params
        ('Sum', 64)
    """

    terms: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", check_tuple("terms", self.terms, "sum"))
        for term in self.terms:
            if term.shape[-2:] != self.terms[0].shape[-2:]:
                raise ValueError(f"cannot add shapes {tuple(self.terms[0].shape)} and {tuple(term.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*common_batch(self.terms), *self.terms[0].shape[-2:]))

    def _linear(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.add, [t._linear(x) for t in self.terms])

    def _linear_mT(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.add, [t._linear_mT(x) for t in self.terms])

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        return Sum(tuple(t._scale(scalar) for t in self.terms))

    @property
    def mT(self) -> StructuredMatrix:
        return Sum(tuple(t.mT for t in self.terms))

    @property
    def flops(self) -> int:
        additions = (len(self.terms) - 1) * math.prod(self.shape[:-1])
        return broadcast_count(self.terms, [t.flops for t in self.terms]) + additions

    def to_dense(self) -> Tensor:
        return functools.reduce(torch.add, [t.to_dense() for t in self.terms])

    def diagonal(self) -> Tensor:
        return functools.reduce(torch.add, [t.diagonal() for t in self.terms])

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        for term in self.terms:
            term.randomize_(std / math.sqrt(len(self.terms)), generator)
        return self
