"""Which structure to give a matrix, as small JSON-serialisable values, and the projection that obeys them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.base import StructuredMatrix
from structmat.calibrated import calibrated_errors, fit, metric_of
from structmat.matrices import BlockDiagonal, LowRank, Monarch
from structmat.projection.moments import Moments
from structmat.projection.truncated import truncated_svd, work_dtype

# Entries taken to double precision at a time when norms are measured.
_CHUNK = 1 << 22


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


@dataclasses.dataclass(frozen=True)
class Projection:
    """A structured matrix with the proof of its quality.

    Attributes:
        matrix: the projection.
        error: the achieved ``|W - M|_F / |W|_F``, measured in double precision on the returned factors.
        bound: no matrix of this structure has a smaller error; where the projection is optimal, ``error`` equals it up
            to rounding to the dtype. None for a class that does not certify its projection.
        config: what was asked for.
        guarantee: where the projection is not optimal, what ``error`` cannot exceed but for rounding; else None.
        calibrated_error: with moments, ``|T^(1/2) (W - M) S^(1/2)|_F / |T^(1/2) W S^(1/2)|_F`` where S and T are the
            second moments of inputs and of output gradients, without damping; else None.
        plain_calibrated_error: the same of the projection without moments, from which the search started.
    """

    matrix: StructuredMatrix
    error: float
    bound: float | None
    config: Config
    guarantee: float | None = None
    calibrated_error: float | None = None
    plain_calibrated_error: float | None = None


@torch.no_grad()
def residual_norm(W: Tensor, A: StructuredMatrix) -> Tensor:
    """``|W - A|_F`` over the whole batch, in double precision, a few rows at a time.

    Args:
        W: shape (*batch, m, n).
        A: a matrix of the same shape.
    """
    double = work_dtype(W)
    value = A.to(double).mT
    m, n = W.shape[-2:]
    step = max(1, _CHUNK // max(n * math.prod(W.shape[:-2]), 1))
    total = torch.zeros((), dtype=double.to_real(), device=W.device)
    for start in range(0, m, step):
        rows = torch.zeros(min(step, m - start), m, dtype=double, device=W.device)
        rows.diagonal(start).fill_(1)
        total += (W[..., start : start + step, :].to(double) - value.linear(rows)).abs().square().sum()
    return total.sqrt()


@torch.no_grad()
def project(W: Tensor, config: Config, moments: Moments | None = None, damping: float = 0.1) -> Projection:
    """The best approximation of W that a config allows, with its error and the bound that certifies it.

    With ``moments`` of the layer's inputs x the outputs count, not the entries: what is made small is
    ``E |(W - M) x|^2``, or ``E |T^(1/2) (W - M) x|^2`` with the moments T of its output gradients too. Low rank has a
    closed form (whitened singular value decomposition; Wang et al. 2024, "SVD-LLM"), and so have block-diagonal and
    block-sparse matrices (least squares, row by row); Monarch matrices, Pixelfly matrices and sums are improved block
    by block, each block exactly, and all others by L-BFGS, from the plain projection. The result is never worse than
    the plain one in the damped metric.

    Args:
        W: shape (*batch, m, n), floating point or complex, finite; (m, n) with moments.
        config: the structure and its size or budget.
        moments: of the layer's inputs, :class:`structmat.Moments`; see :func:`structmat.surgery.calibrate`.
        damping: how much a plain error counts beside the calibrated one: this share of the mean of the moments'
            diagonal is added to it. Directions that the calibration never saw are kept by it.

    Returns:
        The matrix with its relative Frobenius error (over the whole batch) and the lower bound of the structure; with
        moments, the calibrated errors too.

    Raises:
        BudgetError: if the budget cannot be met.
        TypeError: if W is not a floating-point or complex tensor.
        ValueError: if W has NaN or infinite entries, the structure does not exist for its size, moments are of other
            sizes than W, or are singular and the damping does not mend that.

    Example:
        >>> import torch, structmat
        >>> W = torch.ones(8, 12)
        >>> result = structmat.project(W, structmat.MonarchConfig(nblocks=2, rank=1))
        >>> result.matrix.num_params, result.error < 1e-6
        (40, True)
        >>> g = torch.Generator().manual_seed(0)
        >>> W, x = torch.randn(8, 12, generator=g), torch.randn(99, 12, generator=g) * torch.arange(12)
        >>> result = structmat.project(W, structmat.LowRankConfig(rank=4), structmat.Moments.of(x))
        >>> result.calibrated_error < result.plain_calibrated_error, result.error > result.bound
        (True, True)
    """
    check_tensor("W", W, 2)
    check_inexact("W", W)
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config such as MonarchConfig(nblocks=4), got {type(config).__name__}")
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments must be structmat.Moments, got {type(moments).__name__}")
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number, 0 or above, got {damping!r}")
    if not torch.isfinite(W).all():
        raise ValueError("W has NaN or infinite entries")
    W = W.detach()
    if moments is not None:
        if W.ndim != 2:
            raise ValueError(f"moments are of one matrix: W must have shape (m, n), got {tuple(W.shape)}")
        metric_of(moments, W)  # before any work, as all that can be wrong with the arguments
    matrix, lost, *most = config._project(W)
    rows = W.reshape(-1, W.shape[-1]).split(max(1, _CHUNK // W.shape[-1]))
    size = torch.stack([torch.linalg.vector_norm(r.to(work_dtype(W))) for r in rows]).norm()
    scale = size if size > 0 else torch.ones_like(size)
    bounds = [None if b is None else (torch.linalg.vector_norm(b) / scale).item() for b in (lost, *most)]
    found = Projection(matrix, (residual_norm(W, matrix) / scale).item(), bounds[0], config, *bounds[1:])
    if moments is None:
        return found
    fitted = config._calibrate(matrix, W, moments, damping)
    plain, after = calibrated_errors(W, [matrix, fitted], moments)
    error = (residual_norm(W, fitted) / scale).item()
    # What a guarantee promises of the plain projection is not promised of another matrix.
    return Projection(fitted, error, bounds[0], config, None, after, plain)
