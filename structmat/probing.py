"""Which structure a matrix has: every family at one number of parameters."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.config import BlockDiagonalConfig, BudgetError, Config, LowRankConfig, MonarchConfig
from structmat.config_block_sparse import BlockSparseConfig
from structmat.config_butterfly import ButterflyConfig
from structmat.config_displacement import LDRConfig
from structmat.config_pivoted import PivotedLowRankConfig
from structmat.config_pixelfly import PixelflyConfig
from structmat.projecting import project
from structmat.projection.moments import Moments
from structmat.surgery.costs import measure_seconds
from structmat.surgery.plot import _AFTER, _ERROR, _INK, _dress, check_plot
from structmat.surgery.report import align
from structmat.surgery.spec import structure_name


@dataclasses.dataclass(frozen=True)
class ProbeRow:
    """One family of a :class:`Probe`.

    Attributes:
        config: with its budget.
        structure: in words, such as ``monarch 4x4 rank 24``.
        params: how many parameters it has: the budget or less.
        error: ``|W - M|_F / |W|_F``.
        calibrated_error: with moments, that of the outputs; see :class:`structmat.Projection`.
        seconds: time that the projection took.
        multiply_seconds: time of a product with 1024 inputs on the matrix's device, where it was measured.
    """

    config: Config
    structure: str
    params: int
    error: float
    calibrated_error: float | None
    seconds: float
    multiply_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What :func:`probe` found; printed as a table.

    Attributes:
        rows: best first: by calibrated error, without moments by error.
        missing: configs that have no matrix of this size within the budget, and why.
        shape: of the matrix.
        budget: in parameters.
        dense_seconds: time of a product of the dense matrix, where it was measured.
    """

    rows: tuple[ProbeRow, ...]
    missing: tuple[tuple[Config, str], ...]
    shape: tuple[int, int]
    budget: int
    dense_seconds: float | None = None

    @property
    def best(self) -> ProbeRow:
        """The row of least error."""
        return self.rows[0]

    def __str__(self) -> str:
        m, n = self.shape
        calibrated, measured = self.best.calibrated_error is not None, self.dense_seconds is not None
        header = ["structure", "params", "share", "error"]
        header += ["calibrated"] * calibrated + ["projecting"] + ["product"] * measured
        lines = [tuple(header)]
        for row in self.rows:
            cells = [row.structure, f"{row.params:,}", f"{row.params / (m * n):.1%}", f"{row.error:.4f}"]
            cells += [] if row.calibrated_error is None else [f"{row.calibrated_error:.4f}"]
            cells += [f"{row.seconds:.2f} s"]
            cells += [] if row.multiply_seconds is None else [f"{row.multiply_seconds * 1e3:.3g} ms"]
            lines.append(tuple(cells))
        if self.dense_seconds is not None:
            blank = ("-",) * (2 + calibrated)
            lines.append(("dense", f"{m * n:,}", "100.0%", *blank, f"{self.dense_seconds * 1e3:.3g} ms"))
        body = align(lines, left=1).split("\n")
        body.insert(1, "-" * max(map(len, body)))
        text = [f"{m} x {n} within {self.budget:,} parameters ({self.budget / (m * n):.1%})", *body]
        return "\n".join(text + [f"{_words(config)}: {reason}" for config, reason in self.missing])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the errors of all families, best at the top.

        Args:
            path: an image file; its suffix gives the format.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the suffix is unknown.
        """
        check_plot(path)
        from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

        figure = Figure(figsize=(7.5, 1.7 + 0.32 * max(len(self.rows), 3)), layout="constrained")
        axes: Any = figure.subplots()
        places = list(range(len(self.rows)))
        if self.best.calibrated_error is not None:
            axes.plot([r.calibrated_error for r in self.rows], places, "o", color=_ERROR, label="calibrated error")
        axes.plot([row.error for row in self.rows], places, "D", color=_AFTER, markersize=4.5, label="error")
        axes.set_yticks(places)
        axes.set_yticklabels([row.structure for row in self.rows], fontsize=8, color=_INK)
        axes.set_ylim(len(self.rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("relative error", fontsize=9, color=_INK)
        _dress(axes)
        title = f"{self.shape[0]} x {self.shape[1]} within {self.budget:,} parameters"
        figure.suptitle(title, fontsize=10.5, color=_INK, x=0.01, ha="left")
        figure.savefig(path, dpi=150)


def probe(
    W: Tensor,
    budget: float,
    moments: Moments | None = None,
    damping: float = 0.1,
    configs: Sequence[Config] | None = None,
    measure: bool = False,
) -> Probe:
    """What structure a matrix has: its projections on all families, each with at most ``budget`` parameters.

    Args:
        W: shape (m, n), floating point or complex, finite.
        budget: a number of parameters, or a share of the dense m n, in (0, 1].
        moments: of the inputs; errors of the outputs then decide. See :func:`structmat.project`.
        damping: of the moments.
        configs: the families; budgets in them are replaced. By default low rank, by two factors and by pivots, Monarch
            in 2, 4 and 8 blocks, block diagonal, block sparse and Pixelfly (free blocks of 32, or of a quarter of the
            shorter side), butterfly and Toeplitz-like.
        measure: whether to measure the time of products on the device of W.

    Returns:
        A row for each family that exists, best first, and the reasons why others do not.

    Raises:
        BudgetError: if no family exists within the budget.
        TypeError: if an argument has the wrong type.
        ValueError: if the budget is out of range, W has NaN or infinite entries, moments do not fit to W, or a config
            fixes a size besides the budget.

    Cost: one projection for each family; the slowest are Pixelfly and Toeplitz-like ones.

    Example:
        >>> import torch, structmat
        >>> W = structmat.Monarch.random((64, 64), nblocks=4, rank=2, generator=torch.Generator().manual_seed(0))
        >>> found = structmat.probe(W.to_dense(), budget=0.25)
        >>> found.best.structure, found.best.params, found.best.error < 1e-5
        ('monarch 4x4 rank 2', 1024, True)
    """
    check_tensor("W", W, 2)
    check_inexact("W", W)
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"W must have shape (m, n), not empty, got {tuple(W.shape)}")
    m, n = int(W.shape[0]), int(W.shape[1])
    params = _params(budget, m * n)
    families = list(_families(m, n)) if configs is None else list(configs)
    if not families or not all(isinstance(config, Config) for config in families):
        raise TypeError(f"configs must be Configs such as MonarchConfig(nblocks=4), at least one, got {configs!r}")
    rows: list[ProbeRow] = []
    missing: list[tuple[Config, str]] = []
    for family in families:
        try:
            config = dataclasses.replace(family, max_params=params, ratio=None)
        except ValueError as error:
            raise ValueError(f"a config must leave its size to the budget: {family}: {error}") from error
        try:
            config.num_params(m, n)
        except ValueError as error:
            missing.append((family, str(error)))
            continue
        start = time.perf_counter()
        result = project(W, config, moments, damping)
        seconds, value = time.perf_counter() - start, result.matrix
        product = measure_seconds(value) if measure else None
        errors = result.error, result.calibrated_error
        rows.append(ProbeRow(config, structure_name(value), value.num_params, *errors, seconds, product))
    if not rows:
        reasons = "\n".join(f"  {_words(config)}: {reason}" for config, reason in missing)
        raise BudgetError(f"no family has a {m} x {n} matrix within {params} parameters:\n{reasons}")
    rows.sort(key=lambda row: (row.error if row.calibrated_error is None else row.calibrated_error, row.params))
    return Probe(tuple(rows), tuple(missing), (m, n), params, measure_seconds(W) if measure else None)


def _params(budget: Any, size: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number, got {type(budget).__name__}")
    if isinstance(budget, int) and budget != 1:
        check_int("budget", budget)
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a share in (0, 1] or a whole number of parameters, got {budget!r}")
    return math.floor(budget * size)


def _families(m: int, n: int) -> list[Config]:
    block = max(1, min(32, min(m, n) // 4))
    most: dict[str, Any] = {"ratio": 1}
    return [
        LowRankConfig(**most),
        PivotedLowRankConfig(**most),
        *(MonarchConfig(nblocks=k, **most) for k in (2, 4, 8)),
        BlockDiagonalConfig(**most),
        BlockSparseConfig(block=block, **most),
        PixelflyConfig(block=block, pattern="top_k", **most),
        ButterflyConfig(**most),
        LDRConfig(kind="best", sweeps=10, **most),
    ]


def _words(config: Config) -> str:
    """The structure with what the config says of it, but for the budget."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("max_params", "ratio")}
    default = {f.name: f.default for f in dataclasses.fields(config)}
    said = ", ".join(f"{k}={v}" for k, v in own.items() if v != default[k])
    return config.structure + (f" ({said})" if said else "")
