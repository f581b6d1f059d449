"""The config of sums of structured matrices, such as a Monarch matrix plus one of low rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.config import BudgetError, Config, config_from_dict
from structmat.lazy import Sum
from structmat.projection.truncated import work_dtype

# A sweep over the terms that takes off less than this share of the squared error is the last one.
_SMALLEST_STEP = 5e-3
_SWEEPS = 60


@dataclasses.dataclass(frozen=True)
class SumConfig(Config):
    """Sums of matrices of other configs; see :class:`structmat.Sum`.

    With a budget the terms divide it, and what they say of a budget of their own (``LowRankConfig`` must have one) is
    not used; the size may not be fixed in them otherwise. What a term cannot use of its part goes to those after it:
    name the one with the coarser steps first. Without a budget every term has the size that it states.

    A projection takes the terms one after the other, each the nearest to what those before it leave, in the order given
    and in the reverse; from the better of the two on, each is projected again on what all others leave, until nothing
    is gained. The order is the better one, so of two terms the sum is at least as near as either of them alone with its
    part. It is not known to be optimal, and has no bound. With moments all terms are fitted together where they are
    sums of blocks.

    Args:
        terms: two configs or more.
        shares: how a budget is divided, a positive number for each term, of which only the ratios count; None for
            equal parts.
        max_params: a budget.
        ratio: a budget as a share of dense.

    Example:
        >>> import torch, structmat
        >>> config = structmat.SumConfig(
        ...     (structmat.MonarchConfig(nblocks=4), structmat.LowRankConfig(ratio=1)), shares=(3, 1), ratio=0.5
        ... )
        >>> [type(term).__name__ for term in config.random((384, 384)).terms], config.num_params(384, 384)
        (['Monarch', 'LowRank'], 73728)
        >>> g = torch.Generator().manual_seed(0)
        >>> W = structmat.Monarch.random((64, 64), nblocks=4, rank=2, generator=g).to_dense() + 1
        >>> found = structmat.project(W, structmat.SumConfig((structmat.MonarchConfig(rank=2),
        ...                                                   structmat.LowRankConfig(rank=1))))
        >>> found.error < 1e-5
        True
    """

    structure: ClassVar[str] = "sum"
    matrix_class: ClassVar[type[StructuredMatrix]] = Sum
    terms: tuple[Config, ...] = ()
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.terms, (list, tuple)) or len(self.terms) < 2:
            raise ValueError(f"terms must be two configs or more, got {self.terms!r}")
        terms = tuple(config_from_dict(t) if isinstance(t, dict) else t for t in self.terms)  # of JSON
        for term in terms:
            if not isinstance(term, Config):
                raise TypeError(f"terms must be Configs such as MonarchConfig(nblocks=4), got {type(term).__name__}")
        object.__setattr__(self, "terms", terms)
        budgeted = (self.max_params or self.ratio) is not None
        if self.shares is not None:
            shares = tuple(self.shares) if isinstance(self.shares, (list, tuple)) else (self.shares,)
            if not all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in shares):
                raise ValueError(f"shares must be positive numbers, got {self.shares!r}")
            if len(shares) != len(terms):
                raise ValueError(f"shares must be {len(terms)}, one for each term, got {len(shares)}")
            if not budgeted:
                raise ValueError("shares divide a budget: give max_params or ratio too, or the terms alone")
            object.__setattr__(self, "shares", shares)
        if budgeted:
            for term in terms:
                _with_budget(term, 1)

    def sized(self, m: int, n: int) -> tuple[Config, ...]:
        """The terms with the parts of the budget that are theirs for an m x n matrix.

        Raises:
            BudgetError: if a part is below what its term needs.
        """
        budget = self.budget(m, n)
        if budget is None:
            return self.terms
        shares = self.shares or (1.0,) * len(self.terms)
        found: list[Config] = []
        due, spent = 0.0, 0
        for i, (term, share) in enumerate(zip(self.terms, shares, strict=True)):
            due += share
            # Rounded up by less than any part of a parameter, for shares whose sum is not exact.
            part = math.floor(budget * due / sum(shares) + 1e-6) - spent
            try:
                if part < 1:
                    raise BudgetError(f"its part is {part}")
                found.append(_with_budget(term, part))
                spent += found[-1].num_params(m, n)
            except BudgetError as error:
                raise BudgetError(
                    f"sum divides a budget of {budget} parameters for a {m} x {n} matrix among {len(shares)} terms by "
                    f"{shares}; terms[{i}] cannot have {part} of them: {error}"
                ) from error
        return tuple(found)

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        terms = self.sized(m, n)
        for term in terms:
            term.resolve(m, n)
        return {"terms": terms}

    def random(self, shape: Sequence[int], **kwargs: Any) -> StructuredMatrix:
        terms = self.sized(int(shape[-2]), int(shape[-1]))
        # Again: the terms have the variance of a layer each, the sum is to have it.
        return Sum(tuple(t.random(shape, **kwargs) for t in terms)).randomize_(generator=kwargs.get("generator"))

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, None]:
        terms = self.sized(int(W.shape[-2]), int(W.shape[-1]))
        target, order = W.to(work_dtype(W)), range(len(terms))
        starts = [_in_turn(target, terms, {}, o) for o in (order, order[::-1])]
        found, error = min(starts, key=lambda start: start[1])
        for _ in range(_SWEEPS):
            before = error
            found, error = _in_turn(target, terms, found, order)
            if before - error <= _SMALLEST_STEP * before:
                break
        return Sum(tuple(found[i].to(W.dtype) for i in order)), None

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"structure": self.structure, **fields, "terms": [term.to_dict() for term in self.terms]}


def _with_budget(term: Config, params: int) -> Config:
    try:
        return dataclasses.replace(term, max_params=params, ratio=None)
    except ValueError as error:
        raise ValueError(f"{term.structure} must leave its size to the budget of the sum: {error}") from error


def _in_turn(
    W: Tensor, terms: tuple[Config, ...], found: dict[int, StructuredMatrix], order: Sequence[int]
) -> tuple[dict[int, StructuredMatrix], float]:
    """Project each term on what the others leave, keep what is nearer; the terms and the square of the error."""
    rest = functools.reduce(torch.sub, [value.to_dense() for value in found.values()], W)
    found, error = dict(found), _squared(rest)
    for i in order:
        others = rest + found[i].to_dense() if i in found else rest
        value = terms[i]._project(others)[0]
        left = others - value.to_dense()
        if (now := _squared(left)) < error or i not in found:
            found[i], rest, error = value, left, now
    return found, error


def _squared(E: Tensor) -> float:
    return torch.linalg.vector_norm(E).item() ** 2
