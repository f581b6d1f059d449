"""Operators on structured matrices that keep their operands: transposes, products, sums, scalings and inverses.

The rules by which two matrices join into one of a closed family live in the classes (``_compose``, ``_add``); this
module asks them first and builds a lazy value where no rule applies.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import as_scalar, check_broadcast
from structmat.base import LINEAR_STD, StructuredMatrix, matrix


def _check_pair(a: StructuredMatrix, b: StructuredMatrix, what: str) -> None:
    for name, value in (("left", a), ("right", b)):
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"the {name} operand of {what} must be a StructuredMatrix, got {type(value).__name__}")
    if a.dtype != b.dtype:
        raise TypeError(f"{what} needs one dtype, got {a.dtype} and {b.dtype}; convert one with .to(dtype)")
    if a.device != b.device:
        raise ValueError(f"{what} needs one device, got {a.device} and {b.device}; move one with .to(device)")
    check_broadcast("the left operand", a.batch_shape, "the right operand", b.batch_shape)


def _check_tuple(name: str, values: Any, what: str) -> None:
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{name} of a {what} must be a non-empty tuple of structured matrices, got {values!r}")
    for value in values:
        _check_pair(values[0], value, f"a {what}")


def _batch(values: tuple[StructuredMatrix, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(v.batch_shape for v in values)))


def _broadcast_count(parts: tuple[StructuredMatrix, ...], counts: list[int]) -> int:
    """Operations of the parts together: a part with fewer batches is applied once for each batch of the whole."""
    batch = math.prod(_batch(parts))
    return sum(c * batch // max(math.prod(p.batch_shape), 1) for p, c in zip(parts, counts, strict=True))


def compose(a: StructuredMatrix, b: StructuredMatrix) -> StructuredMatrix:
    """``a @ b``: in closed form where a rule applies, else a flat :class:`Product`.

    Raises:
        ValueError: if inner sizes, batches or devices do not match.
        TypeError: if dtypes differ.
    """
    _check_pair(a, b, "a product")
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
    _check_pair(a, b, "a sum")
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
class Transposed(StructuredMatrix):
    """The transpose of ``base``, applied by its ``_linear_mT`` at the same cost.

    Args:
        base: any structured matrix of shape (*batch, m, n); the result has shape (*batch, n, m).
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
class Product(StructuredMatrix):
    """The product of ``factors``, applied from the last to the first; never multiplied out.

    Args:
        factors: matrices whose inner sizes agree; batches broadcast.
    """

    factors: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        _check_tuple("factors", self.factors, "product")
        for a, b in zip(self.factors, self.factors[1:], strict=False):
            if a.shape[-1] != b.shape[-2]:
                raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}: inner sizes differ")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*_batch(self.factors), self.factors[0].shape[-2], self.factors[-1].shape[-1]))

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
        return _broadcast_count(self.factors, [f.flops for f in self.factors])

    @property
    def _solve_flops(self) -> int:
        return _broadcast_count(self.factors, [f._solve_flops for f in self.factors])

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
        terms: matrices of one shape; batches broadcast.
    """

    terms: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        _check_tuple("terms", self.terms, "sum")
        for term in self.terms:
            if term.shape[-2:] != self.terms[0].shape[-2:]:
                raise ValueError(f"cannot add shapes {tuple(self.terms[0].shape)} and {tuple(term.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*_batch(self.terms), *self.terms[0].shape[-2:]))

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
        return _broadcast_count(self.terms, [t.flops for t in self.terms]) + additions

    def to_dense(self) -> Tensor:
        return functools.reduce(torch.add, [t.to_dense() for t in self.terms])

    def diagonal(self) -> Tensor:
        return functools.reduce(torch.add, [t.diagonal() for t in self.terms])

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        for term in self.terms:
            term.randomize_(std / math.sqrt(len(self.terms)), generator)
        return self


@matrix
class Scaled(StructuredMatrix):
    """``scale * base`` for families that do not absorb a scalar into their factors.

    Args:
        base: any structured matrix.
        scale: a 0-d tensor of the same dtype (``scalar * A`` makes it from a number).
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
