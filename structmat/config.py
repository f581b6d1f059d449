"""Which structure to give a matrix, as small JSON-serialisable values; :mod:`structmat.projecting` obeys them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.calibrated import fit
from structmat.matrices import BlockDiagonal, LowRank, Monarch
from structmat.projection.moments import Moments
from structmat.projection.truncated import truncated_svd

# Damping of moments from which on they can be factorised in single precision.
_DAMPED = 1e-2


class BudgetError(ValueError):
    """The parameter budget is below what the smallest matrix of the structure needs."""


#: Every config class by the name of its structure; subclasses of :class:`Config` enter themselves.
CONFIGS: dict[str, type[Config]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of the configs; a config says how to turn an m x n matrix into a structured one.

    A subclass sets ``structure`` (its name in JSON) and ``matrix_class``, a class with ``from_dense`` and ``random``,
    and defines :meth:`resolve`; then :func:`project` and ``structmat.surgery`` take it.

    Args:
        max_params: a budget in parameters for each matrix.
        ratio: the budget as a share of the dense m n, in (0, 1].
    """

    structure: ClassVar[str]
    matrix_class: ClassVar[type[StructuredMatrix]]
    max_params: int | None = None
    ratio: float | None = None

    def __init_subclass__(cls) -> None:
        CONFIGS[cls.structure] = cls

    def __post_init__(self) -> None:
        if self.max_params is not None and self.ratio is not None:
            raise ValueError("give max_params or ratio, not both")
        if self.max_params is not None:
            check_int("max_params", self.max_params)
        if self.ratio is not None and not (isinstance(self.ratio, (int, float)) and 0 < self.ratio <= 1):
            raise ValueError(f"ratio must be a number in (0, 1], got {self.ratio!r}")

    def budget(self, m: int, n: int) -> int | None:
        """The budget in parameters for an m x n matrix, or None if the config has none."""
        return math.floor(self.ratio * m * n) if self.ratio is not None else self.max_params

    def _over(self, m: int, n: int, smallest: int) -> BudgetError:
        return BudgetError(
            f"{self.structure} needs at least {smallest} parameters for a {m} x {n} matrix "
            f"({smallest / (m * n):.1%} of dense), the budget is {self.budget(m, n)}"
        )

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        """The keyword arguments of ``from_dense`` and ``random`` for an m x n matrix.

        Raises:
            BudgetError: if the budget cannot be met.
            ValueError: if the structure does not exist for this size.
        """
        raise NotImplementedError

    def num_params(self, m: int, n: int) -> int:
        """How many parameters an m x n matrix of this config has."""
        return self.random((m, n), device="meta").num_params

    def random(self, shape: Sequence[int], **kwargs: Any) -> StructuredMatrix:
        """A random matrix of this structure; ``generator``, ``dtype`` and ``device`` as in ``Cls.random``."""
        build: Any = self.matrix_class
        return build.random(shape, **self.resolve(int(shape[-2]), int(shape[-1])), **kwargs)

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, *tuple[Tensor | None, ...]]:
        """The projection, the norm that every matrix of the structure misses at least (None if not known).

        And, of a projection that is not optimal, the norm that it misses at most.
        """
        build: Any = self.matrix_class
        sizes = self.resolve(int(W.shape[-2]), int(W.shape[-1]))
        return build._project(W, **sizes) if hasattr(build, "_project") else (build.from_dense(W, **sizes), None)

    def _calibrate(self, start: StructuredMatrix, W: Tensor, moments: Moments, damping: float) -> StructuredMatrix:
        """The matrix of this config that is found in the metric of the moments, started from the plain projection."""
        return fit(start, W, moments, damping)

    def _sketch(
        self, W: Tensor, moments: Moments, damping: float, sweeps: int, shared: dict[Any, Any]
    ) -> StructuredMatrix:
        """A matrix of this config about as good as :meth:`_calibrate` finds, in less time.

        Args:
            W: as for :meth:`_calibrate`.
            moments: as there.
            damping: as there.
            sweeps: of classes that are fitted in sweeps.
            shared: what sketches of one weight, with one damping, have in common; empty before the first.
        """
        start = self._project(W)[0]
        if type(self)._calibrate is Config._calibrate:
            # Well away from singular moments single precision tells sizes and structures apart.
            single = W.dtype in (torch.float32, torch.bfloat16, torch.float16) and damping >= _DAMPED
            return fit(start, W, moments, damping, sweeps, torch.float32 if single else None)
        return self._calibrate(start, W, moments, damping)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; :func:`config_from_dict` reads it back."""
        return {"structure": self.structure, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class MonarchConfig(Config):
    """Monarch matrices in ``nblocks`` blocks; see :class:`structmat.Monarch`.

    Args:
        nblocks: number of blocks, or (k, l): right blocks, left blocks.
        rank: rank of the slices; None gives the largest hidden width, or what the budget allows.
        max_params: a budget, in place of a rank.
        ratio: a budget as a share of dense, in place of a rank.

    Example:
        >>> import structmat
        >>> structmat.MonarchConfig(nblocks=4, ratio=0.25).resolve(384, 384)
        {'nblocks': 4, 'rank': 12}
    """

    structure: ClassVar[str] = "monarch"
    matrix_class: ClassVar[type[StructuredMatrix]] = Monarch
    nblocks: int | tuple[int, int] = 4
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.nblocks, list):  # JSON has no tuples
            object.__setattr__(self, "nblocks", tuple(self.nblocks))
        if self.rank is not None and (self.max_params or self.ratio) is not None:
            raise ValueError("give a rank or a budget (max_params, ratio), not both")

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        if self.budget(m, n) is None:
            Monarch.structure(m, n, self.nblocks, self.rank)
            return {"nblocks": self.nblocks, "rank": self.rank}
        size = Monarch.structure(m, n, self.nblocks, 1)
        per_rank = size["k"] * size["l"] * (size["s"] + size["p"])
        rank = min(self.budget(m, n) // per_rank, size["s"], size["p"])  # pyright: ignore[reportOptionalOperand]
        if rank < 1:
            raise self._over(m, n, per_rank)
        return {"nblocks": self.nblocks, "rank": rank}


@dataclasses.dataclass(frozen=True)
class LowRankConfig(Config):
    """Low-rank matrices; see :class:`structmat.LowRank`.

    Args:
        rank: the rank, or
        max_params: a budget, or
        ratio: a budget as a share of dense; exactly one of the three.

    Example:
        >>> import structmat
        >>> structmat.LowRankConfig(ratio=0.5).resolve(384, 384)
        {'rank': 96}
    """

    structure: ClassVar[str] = "lowrank"
    matrix_class: ClassVar[type[StructuredMatrix]] = LowRank
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(v is not None for v in (self.rank, self.max_params, self.ratio)) != 1:
            raise ValueError("give exactly one of rank, max_params and ratio")
        if self.rank is not None:
            check_int("rank", self.rank)

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        if self.rank is not None:
            if self.rank > min(m, n):
                raise ValueError(f"rank must be at most min(rows, columns) = {min(m, n)}, got {self.rank}")
            return {"rank": self.rank}
        rank = self.rank_within(m, n, self.budget(m, n))  # pyright: ignore[reportArgumentType]
        if rank < 1:
            raise self._over(m, n, self.params_of(m, n, 1))
        return {"rank": rank}

    @staticmethod
    def params_of(m: int, n: int, rank: int) -> int:
        """The parameters of an m x n matrix of this rank."""
        return rank * (m + n)

    @staticmethod
    def rank_within(m: int, n: int, params: int) -> int:
        """The largest rank, up to min(m, n), whose matrix has at most so many parameters; 0 if there is none."""
        return min(params // (m + n), m, n)

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, *tuple[Tensor | None, ...]]:
        left, right, lost = truncated_svd(W, **self.resolve(int(W.shape[-2]), int(W.shape[-1])))
        return LowRank(left, right), lost


@dataclasses.dataclass(frozen=True)
class BlockDiagonalConfig(Config):
    """Block-diagonal matrices; see :class:`structmat.BlockDiagonal`.

    Args:
        nblocks: number of blocks; 4 if neither it nor a budget is given.
        max_params: a budget: the fewest blocks that meet it.
        ratio: a budget as a share of dense.

    Example:
        >>> import structmat
        >>> structmat.BlockDiagonalConfig(ratio=0.3).resolve(384, 384)
        {'nblocks': 4}
    """

    structure: ClassVar[str] = "blockdiagonal"
    matrix_class: ClassVar[type[StructuredMatrix]] = BlockDiagonal
    nblocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nblocks is not None:
            check_int("nblocks", self.nblocks)
            if (self.max_params or self.ratio) is not None:
                raise ValueError("give nblocks or a budget (max_params, ratio), not both")

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        budget = self.budget(m, n)
        if budget is None:
            nblocks = 4 if self.nblocks is None else self.nblocks
            BlockDiagonal.structure(m, n, nblocks)
            return {"nblocks": nblocks}
        counts = [k * -(-m // k) * -(-n // k) for k in range(1, min(m, n) + 1)]
        for k, count in enumerate(counts, start=1):
            if count <= budget:
                return {"nblocks": k}
        raise self._over(m, n, min(counts))


def config_from_dict(data: dict[str, Any]) -> Config:
    """Build a config from the dictionary that ``Config.to_dict`` made.

    Raises:
        ValueError: if the structure is unknown.
        TypeError: if a field is unknown.
    """
    fields = dict(data)
    name = fields.pop("structure", None)
    if name not in CONFIGS:
        raise ValueError(f"unknown structure {name!r}; known are {', '.join(sorted(CONFIGS))}")
    known = {f.name for f in dataclasses.fields(CONFIGS[name])}
    if unknown := sorted(set(fields) - known):
        raise TypeError(f"{name} takes {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return CONFIGS[name](**fields)
