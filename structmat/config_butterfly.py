"""The config of butterfly matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.matrices import Butterfly


@dataclasses.dataclass(frozen=True)
class ButterflyConfig(Config):
    """Butterfly matrices of one chain; see :class:`structmat.Butterfly`.

    Args:
        radices: block sizes of the factors, numbers or pairs, from left to right; None takes the sizes' prime factors.
        rank: of the blocks of every split: a power of two; above 1 for square sizes that are powers of two.
        permutation: "search" to look for a permutation of the columns among the known ones, or None.
        order: "balanced" or "left-to-right", the order of the splits.
        sweeps: of alternating least squares after the projection.
        max_params: the largest rank within this budget, in place of a rank.
        ratio: a budget as a share of dense, in place of a rank.

    Example:
        >>> import torch, structmat
        >>> W = torch.fft.fft(torch.eye(64, dtype=torch.complex128))
        >>> found = structmat.project(W, structmat.ButterflyConfig(permutation="search"))
        >>> found.matrix.num_params, found.error < 1e-13, found.bound < 1e-13, found.guarantee < 1e-12
        (768, True, True, True)
    """

    structure: ClassVar[str] = "butterfly"
    matrix_class: ClassVar[type[StructuredMatrix]] = Butterfly
    radices: tuple[int | tuple[int, int], ...] | None = None
    rank: int | None = None
    permutation: str | None = None
    order: str = "balanced"
    sweeps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radices is not None:  # JSON has no tuples
            radices = tuple(tuple(r) if isinstance(r, (list, tuple)) else r for r in self.radices)
            object.__setattr__(self, "radices", radices)
        if self.rank is not None:
            check_int("rank", self.rank)
            if (self.max_params or self.ratio) is not None:
                raise ValueError("give a rank or a budget (max_params, ratio), not both")
        if self.order not in ("balanced", "left-to-right"):
            raise ValueError(f'order must be "balanced" or "left-to-right", got {self.order!r}')
        if self.permutation not in (None, "search"):
            raise ValueError(f'permutation must be None or "search", got {self.permutation!r}')

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        rank, budget = self.rank or 1, self.budget(m, n)
        if budget is not None:
            smallest = Butterfly.structure(m, n, self.radices).num_params
            if smallest > budget:
                raise self._over(m, n, smallest)
            # Higher ranks exist for powers of two only.
            dyadic = m == n and n & (n - 1) == 0 and self.radices is None
            while dyadic and 16 * rank * rank <= n and Butterfly.structure(m, n, rank=2 * rank).num_params <= budget:
                rank *= 2
        Butterfly.structure(m, n, self.radices, rank=rank)
        return {"radices": self.radices, "rank": rank}

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, Tensor, Tensor]:
        chain = Butterfly.structure(W.shape[-2], W.shape[-1], **self.resolve(W.shape[-2], W.shape[-1]))
        return Butterfly._project(W, chain, self.permutation, self.order, self.sweeps)
