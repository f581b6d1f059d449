"""The picture of a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structmat.surgery.report import LayerRow, Report

_BEFORE, _AFTER, _ERROR, _INK = "#c9d3df", "#2a6f97", "#c8553d", "#33383f"
_LABELS_FIT = 120  # more layers than this get no labels: they would overlap


def plot_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw relative errors and parameters, layer by layer, from top to bottom in the model's order.

    Args:
        report: with at least one replaced layer.
        path: an image file; its suffix gives the format.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no layer was replaced, or the suffix is unknown.
    """
    check_plot(path)
    layers_figure(report).savefig(path, dpi=150)


def layers_figure(report: Report) -> Any:
    """The figure of :func:`plot_report`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no layer was replaced.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    rows = report.compressed
    if not rows:
        raise ValueError("the report has no replaced layer to draw")
    with_error = any(row.error is not None for row in rows)
    labelled = len(rows) <= _LABELS_FIT
    labels, prefix = _short_names([row.name for row in rows])
    figure = Figure(figsize=(10, 1.9 + 0.21 * max(len(rows), 5) if labelled else 13), layout="constrained")
    panels: Any = figure.subplots(1, 2 if with_error else 1, sharey=True, squeeze=False)[0]
    places = list(range(len(rows)))
    if with_error:
        _draw_errors(panels[0], places, rows, report.mean_error or 0.0)
    _draw_params(panels[-1], places, rows)
    first = panels[0]
    first.set_ylim(len(rows) - 0.4, -0.6)
    first.set_yticks(places if labelled else [])
    if labelled:
        first.set_yticklabels(labels, fontsize=8, color=_INK)
    else:
        first.set_ylabel(f"{len(rows)} layers, in the model's order", fontsize=9, color=_INK)
    figure.suptitle(_title(report, prefix), fontsize=10.5, color=_INK, x=0.01, ha="left")
    return figure


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise unless a figure can be drawn to a file of this name.

    Raises:
        ImportError: if matplotlib is not installed; the message says how to install it.
        ValueError: if matplotlib does not write files of this suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install structmat[demo]") from error
    suffix, known = os.path.splitext(path)[1][1:].lower(), Figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"{os.fspath(path)}: a plot's suffix must be one of {', '.join(sorted(known))}")


def _title(report: Report, prefix: str) -> str:
    before, after = report.params_before, report.params_after
    text = f"{len(report.compressed)} layers{f' of {prefix}' if prefix else ''}: "
    text += f"{_short(before)} to {_short(after)} parameters ({after / before:.0%})"
    if report.mean_error is not None:
        text += f", mean relative error {report.mean_error:.3f}"
    return text + (", dry run" if report.dry_run else "")


def _draw_errors(axes: Any, places: list[int], rows: Sequence[LayerRow], mean: float) -> None:
    known = [(place, row.error, row.bound) for place, row in zip(places, rows, strict=True) if row.error is not None]
    at, errors, bounds = [place for place, _, _ in known], [e for _, e, _ in known], [b for _, _, b in known]
    axes.hlines(at, 0, errors, color=_ERROR, alpha=0.35, linewidth=1.5)
    axes.plot(errors, at, "o", color=_ERROR, markersize=4.5, label="relative error")
    if any(bound is not None for bound in bounds):
        axes.plot(bounds, at, "|", color=_INK, markersize=9, label="bound of the structure")
    calibrated = [(p, row.calibrated_error) for p, row in zip(places, rows, strict=True) if row.calibrated_error]
    if calibrated:
        axes.plot([e for _, e in calibrated], [p for p, _ in calibrated], "o", color=_AFTER, markersize=4.5)
        axes.lines[-1].set_label("calibrated error, of the outputs")
    axes.axvline(mean, color=_ERROR, linewidth=0.9, linestyle=":", label="mean")
    axes.set_xlim(0, max([*errors, *(e for _, e in calibrated), 1e-3]) * 1.06)
    axes.set_xlabel("|W − M| / |W|, Frobenius", fontsize=9, color=_INK)
    _dress(axes)


def _draw_params(axes: Any, places: list[int], rows: Sequence[LayerRow]) -> None:
    axes.barh(places, [row.params_before for row in rows], height=0.74, color=_BEFORE, label="before")
    axes.barh(places, [row.params_after for row in rows], height=0.4, color=_AFTER, label="after")
    axes.set_xlabel("parameters of the weight", fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    _dress(axes)


def _dress(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3ad")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, color="#9aa3ad", labelcolor=_INK)
    axes.grid(axis="x", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    # Above the panel: inside, it would hide layers.
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, fontsize=8, frameon=False, labelcolor=_INK, borderpad=0
    )


def _short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without the dotted prefix that all of them share, and that prefix."""
    parts = [name.split(".") for name in names]
    common = parts[0][:-1] if len(parts) > 1 else []
    for part in parts:
        size = next((i for i, (a, b) in enumerate(zip(common, part[:-1], strict=False)) if a != b), len(part) - 1)
        common = common[:size]
    return [_clip(".".join(part[len(common) :])) for part in parts], ".".join(common)


def _clip(text: str, size: int = 48) -> str:
    return text if len(text) <= size else "…" + text[1 - size :]


def _short(value: float) -> str:
    """``1.8 M`` for 1,769,472."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
