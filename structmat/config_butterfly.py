"""The config of butterfly matrices and of sums of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.lazy import Sum, compose
from structmat.matrices import Butterfly, KroneckerSparse, Permutation
from structmat.projection import project_butterfly_sum


@dataclasses.dataclass(frozen=True)
class ButterflyConfig(Config):
    """Butterfly matrices of one chain; see :class:`structmat.Butterfly`.

    Args:
        radices: block sizes of the factors, numbers or pairs, from left to right; None takes the sizes' prime factors.
        rank: of the blocks of every split: a power of two; above 1 for square sizes that are powers of two.
        permutation: "search" to look for a permutation of the columns among the known ones, or None.
        order: "balanced" or "left-to-right", the order of the splits.
        sweeps: of alternating least squares after the projection; of a sum, over its terms.
        terms: how many butterflies to add up: a :class:`structmat.lazy.Sum` if more than one, each of this rank and
            with a permutation of its own; see :func:`structmat.projection.project_butterfly_sum`. A budget is for all.
        max_params: the largest rank within this budget, in place of a rank.
        ratio: a budget as a share of dense, in place of a rank.

    Example:
        >>> import torch, structmat
        >>> W = torch.fft.fft(torch.eye(64, dtype=torch.complex128))
        >>> found = structmat.project(W, structmat.ButterflyConfig(permutation="search"))
        >>> found.matrix.num_params, found.error < 1e-13, found.bound < 1e-13, found.guarantee < 1e-12
        (768, True, True, True)
        >>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> [round(structmat.project(W, structmat.ButterflyConfig(terms=k)).error, 2) for k in (1, 2, 4)]
        [0.9, 0.8, 0.65]
    """

    structure: ClassVar[str] = "butterfly"
    matrix_class: ClassVar[type[StructuredMatrix]] = Butterfly
    radices: tuple[int | tuple[int, int], ...] | None = None
    rank: int | None = None
    permutation: str | None = None
    order: str = "balanced"
    sweeps: int = 0
    terms: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radices is not None:  # JSON has no tuples
            radices = tuple(tuple(r) if isinstance(r, (list, tuple)) else r for r in self.radices)
            object.__setattr__(self, "radices", radices)
        if self.rank is not None:
            check_int("rank", self.rank)
            if (self.max_params or self.ratio) is not None:
                raise ValueError("give a rank or a budget (max_params, ratio), not both")
        check_int("terms", self.terms)
        check_int("sweeps", self.sweeps, 0)
        if self.order not in ("balanced", "left-to-right"):
            raise ValueError(f'order must be "balanced" or "left-to-right", got {self.order!r}')
        if self.permutation not in (None, "search"):
            raise ValueError(f'permutation must be None or "search", got {self.permutation!r}')

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        rank, budget = self.rank or 1, self.budget(m, n)
        if budget is not None:
            smallest = self.terms * Butterfly.structure(m, n, self.radices).num_params
            if smallest > budget:
                raise self._over(m, n, smallest)
            budget //= self.terms
            # Higher ranks exist for powers of two only.
            dyadic = m == n and n & (n - 1) == 0 and self.radices is None
            while dyadic and 16 * rank * rank <= n and Butterfly.structure(m, n, rank=2 * rank).num_params <= budget:
                rank *= 2
        Butterfly.structure(m, n, self.radices, rank=rank)
        return {"radices": self.radices, "rank": rank}

    def random(self, shape: Sequence[int], **kwargs: Any) -> StructuredMatrix:
        if self.terms == 1:
            return super().random(shape, **kwargs)
        generator = kwargs.get("generator")
        return Sum(tuple(super(ButterflyConfig, self).random(shape, **kwargs) for _ in range(self.terms))).randomize_(
            generator=generator
        )

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, Tensor | None, Tensor]:
        chain = Butterfly.structure(W.shape[-2], W.shape[-1], **self.resolve(W.shape[-2], W.shape[-1]))
        if self.terms == 1:
            return Butterfly._project(W, chain, self.permutation, self.order, self.sweeps)
        found, lower, upper = project_butterfly_sum(W, chain, self.terms, self.permutation, self.order, self.sweeps)
        terms = [
            B if perm is None else compose(B, Permutation(perm, W.dtype))
            for B, perm in ((Butterfly(tuple(map(KroneckerSparse, factors))), perm) for factors, perm in found)
        ]
        return Sum(tuple(terms)), lower, upper
