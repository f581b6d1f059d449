"""The config of low-rank matrices by their pivots."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.config import Config, LowRankConfig
from structmat.matrices import PivotedLowRank


@dataclasses.dataclass(frozen=True)
class PivotedLowRankConfig(LowRankConfig):
    """Low-rank matrices with a higher rank for the same parameters; see :class:`structmat.PivotedLowRank`.

    Args:
        rank: the rank, or
        max_params: a budget, or
        ratio: a budget as a share of dense; exactly one of the three.

    Example:
        >>> import structmat
        >>> structmat.PivotedLowRankConfig(ratio=0.5).resolve(384, 384)
        {'rank': 112}
    """

    structure: ClassVar[str] = "pivotedlowrank"
    matrix_class: ClassVar[type[StructuredMatrix]] = PivotedLowRank

    @staticmethod
    def params_of(m: int, n: int, rank: int) -> int:
        return rank * (m + n - rank)

    @staticmethod
    def rank_within(m: int, n: int, params: int) -> int:
        # The smaller root of r (m + n - r) = params, rounded down in integers.
        square = (m + n) ** 2 - 4 * params
        return min(m, n) if square <= 0 else min((m + n - math.isqrt(square - 1) - 1) // 2, m, n)

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, *tuple[Tensor | None, ...]]:
        return Config._project(self, W)
