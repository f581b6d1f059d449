"""What became of every layer: sizes, costs, errors, and the reasons why some were left alone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from structmat.surgery.atomic import atomic_write


@dataclass(frozen=True)
class LayerRow:
    """One layer of a :class:`Report`.

    Attributes:
        name: dotted name in the model.
        structure: in words, such as ``monarch 4x4 rank 24``; None for a layer left alone.
        shape: (out, in).
        params_before: numbers in the weight, without the bias.
        params_after: the same afterwards.
        flops_before: multiplications plus additions of the weight with one token.
        flops_after: the same afterwards.
        error: the achieved ``|W - M|_F / |W|_F``; None if nothing was projected.
        bound: no matrix of the structure has a smaller error.
        seconds: time that the projection took.
        skipped: why the layer was left alone, or None.
        calibrated_error: with a calibration, the relative error of what the layer puts out on its inputs; see
            :class:`structmat.Projection`.
        plain_calibrated_error: the same of the projection that knows nothing of the inputs.
    """

    name: str
    structure: str | None
    shape: tuple[int, int]
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    error: float | None = None
    bound: float | None = None
    seconds: float | None = None
    skipped: str | None = None
    calibrated_error: float | None = None
    plain_calibrated_error: float | None = None

    @classmethod
    def left_alone(cls, name: str, shape: tuple[int, int], params: int, reason: str) -> LayerRow:
        """The row of a layer that stays as it is."""
        return cls(name, None, shape, params, params, 2 * params, 2 * params, skipped=reason)


@dataclass(frozen=True)
class Report:
    """What was done to a model or a checkpoint, layer by layer.

    Attributes:
        rows: every layer that was looked at, in the model's order.
        model_params_before: parameters of the whole model, shared ones counted once.
        model_params_after: the same afterwards.
        dry_run: whether this is only what would be done.
        unused_patterns: patterns of the config that matched no layer.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
        >>> report = surgery.compress_(model, {"0": structmat.LowRankConfig(rank=8)}, dry_run=True)
        >>> print(report)
        layer    shape  structure          params  share           flops  error  time
        -----------------------------------------------------------------------------
        0        64x64  lowrank 8  4,096 -> 1,024  25.0%  8,192 -> 2,048      -     -
        -----------------------------------------------------------------------------
        1 layer                    4,096 -> 1,024  25.0%  8,192 -> 2,048      -     -
        whole model: 4,810 -> 1,738 parameters (36.1%)
        left alone, no pattern matches its name: 1 (1)
        dry run: nothing was changed
    """

    rows: tuple[LayerRow, ...]
    model_params_before: int
    model_params_after: int
    dry_run: bool = False
    unused_patterns: tuple[str, ...] = ()

    # ---------------------------------------------------------------- totals
    @property
    def compressed(self) -> tuple[LayerRow, ...]:
        """The rows of the layers that were replaced."""
        return tuple(row for row in self.rows if row.skipped is None)

    @property
    def skipped(self) -> tuple[LayerRow, ...]:
        """The rows of the layers that were left alone."""
        return tuple(row for row in self.rows if row.skipped is not None)

    @property
    def params_before(self) -> int:
        """Parameters of the replaced weights before."""
        return sum(row.params_before for row in self.compressed)

    @property
    def params_after(self) -> int:
        """Parameters of the replaced weights after."""
        return sum(row.params_after for row in self.compressed)

    @property
    def flops_before(self) -> int:
        """Operations a token of the replaced weights before."""
        return sum(row.flops_before for row in self.compressed)

    @property
    def flops_after(self) -> int:
        """Operations a token of the replaced weights after."""
        return sum(row.flops_after for row in self.compressed)

    @property
    def mean_error(self) -> float | None:
        """The mean of the layers' relative errors; None if nothing was projected."""
        return _mean(row.error for row in self.compressed)

    @property
    def mean_calibrated_error(self) -> float | None:
        """The mean of the layers' calibrated errors; None without a calibration."""
        return _mean(row.calibrated_error for row in self.compressed)

    @property
    def seconds(self) -> float:
        """Time that the projections took."""
        return sum(row.seconds or 0.0 for row in self.compressed)

    # ---------------------------------------------------------------- text
    def table(self) -> str:
        """An aligned plain-text table of the replaced layers, the totals, and the layers left alone by reason."""
        header = ("layer", "shape", "structure", "params", "share", "flops", "error", "calibrated", "time")
        lines: list[tuple[str, ...]] = [header]
        for row in self.compressed:
            lines.append(
                (
                    row.name or "(model)",
                    f"{row.shape[0]}x{row.shape[1]}",
                    row.structure or "-",
                    _pair(row.params_before, row.params_after),
                    share(row.params_after, row.params_before),
                    _pair(row.flops_before, row.flops_after),
                    _number(row.error),
                    _number(row.calibrated_error),
                    "-" if row.seconds is None else f"{row.seconds:.2f} s",
                )
            )
        count = len(self.compressed)
        lines.append(
            (
                f"{count} layer{'' if count == 1 else 's'}",
                "",
                "",
                _pair(self.params_before, self.params_after),
                share(self.params_after, self.params_before),
                _pair(self.flops_before, self.flops_after),
                _number(self.mean_error),
                _number(self.mean_calibrated_error),
                f"{self.seconds:.2f} s" if self.mean_error is not None else "-",
            )
        )
        if self.mean_calibrated_error is None:
            lines = [line[:-2] + line[-1:] for line in lines]
        *body, total = align(lines, left=3).split("\n")
        rule = "-" * max(map(len, [*body, total]))
        text = "\n".join([body[0], rule, *body[1:], rule, total])
        before, after = self.model_params_before, self.model_params_after
        notes = [f"whole model: {before:,} -> {after:,} parameters ({share(after, before)})"]
        reasons: dict[str, list[str]] = {}
        for row in self.skipped:
            reasons.setdefault(row.skipped or "", []).append(row.name or "(model)")
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            notes.append(f"left alone, {reason}: {len(names)} ({shown})")
        if self.unused_patterns:
            notes.append(f"patterns that matched no layer: {', '.join(self.unused_patterns)}")
        if self.dry_run:
            notes.append("dry run: nothing was changed")
        return "\n".join([text, *notes])

    def __str__(self) -> str:
        return self.table()

    # ---------------------------------------------------------------- files
    def to_json(self) -> str:
        """The report as JSON text, totals included; :meth:`from_json` reads it back."""
        data = dataclasses.asdict(self)
        names = ("params_before", "params_after", "flops_before", "flops_after", "mean_error", "seconds")
        data["totals"] = {name: getattr(self, name) for name in names}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not such JSON.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data.pop("totals", None)
            rows = tuple(LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in data.pop("rows"))
            data["unused_patterns"] = tuple(data["unused_patterns"])
            return cls(rows=rows, **data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not the JSON of a Report: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, whole or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        with atomic_write(path) as file:
            file.write((self.to_json() + "\n").encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw each replaced layer's relative error and parameters before and after.

        Args:
            path: an image file; its suffix gives the format (png, svg, pdf).

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if no layer was replaced.
        """
        from structmat.surgery.plot import plot_report

        plot_report(self, path)


def share(part: float, whole: float) -> str:
    """``part / whole`` as a percentage."""
    return f"{part / whole:.1%}" if whole else "-"


def _pair(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def align(rows: list[tuple[str, ...]], left: int) -> str:
    """Rows of cells as text in columns, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
