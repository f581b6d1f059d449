"""The report of a compression for people: Markdown, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from structmat.surgery.atomic import atomic_write
from structmat.surgery.latency import Speeds
from structmat.surgery.report import Report, share

if TYPE_CHECKING:
    from structmat.surgery.healing import HealReport

Rows = list[tuple[str, ...]]

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #33383f; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; display: block;
  overflow-x: auto; }
th, td { text-align: left; padding: 0.15rem 0.8rem; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
.number { text-align: right; }
th { border-bottom: 2px solid #9aa3ad; }
img { max-width: 100%; }
.warning { border-left: 4px solid #c8553d; padding-left: 0.8rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class ModelReport:
    """What became of a model: its quality, its layers, how that was done, and what time it takes.

    Attributes:
        title: the name of the model.
        layers: of :func:`compress_`.
        facts: names and values of what was done, by section.
        quality: (measure, dense, compressed, healed or "") in words.
        healing: of :func:`heal`, or None.
        latency: of :func:`measure_latency`.
        slower: of :func:`slower_layers`.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> from structmat.surgery.model_report import ModelReport
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = ModelReport("toy", surgery.compress_(model, structmat.MonarchConfig(ratio=0.5)))
        >>> report.markdown().splitlines()[:3]
        ['# toy, compressed', '', '## Size']
    """

    title: str
    layers: Report
    facts: dict[str, Rows] = field(default_factory=dict)
    quality: Rows = field(default_factory=list)
    healing: HealReport | None = None
    latency: Speeds = field(default_factory=Speeds)
    slower: Speeds = field(default_factory=Speeds)

    def markdown(self, images: Sequence[str] = ()) -> str:
        """The report as Markdown.

        Args:
            images: file names of plots, relative to the report.
        """
        lines = [f"# {self.title}, compressed"]
        for kind, content in self._blocks():
            if kind == "table":
                header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in content]
                rule = ["---:" if right else "---" for right in _numbers(rows)]
                lines += ["\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (header, rule, *rows))]
            else:
                lines.append({"heading": "## ", "warning": "**Slower than dense.** ", "text": ""}[kind] + content)
        if images:
            lines += ["## Plots", *(f"![{Path(name).stem}]({name})" for name in images)]
        return "\n\n".join(lines) + "\n"

    def html(self, images: dict[str, bytes] | None = None) -> str:
        """The report as one HTML page, which loads nothing.

        Args:
            images: plots in SVG by file name; they become part of the page.
        """
        parts = [f"<h1>{html.escape(self.title)}, compressed</h1>"]
        for kind, content in self._blocks():
            if kind == "table":
                parts.append(_html_table(content))
            elif kind == "warning":
                parts.append(f'<p class="warning"><strong>Slower than dense.</strong> {html.escape(content)}</p>')
            else:
                tag = {"heading": "h2", "text": "p"}[kind]
                parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
        if images:
            parts.append("<h2>Plots</h2>")
        for name, data in (images or {}).items():
            # As data, not as elements: the identifiers in two SVG pictures would clash.
            text = base64.b64encode(data).decode()
            parts.append(f'<p><img alt="{html.escape(Path(name).stem)}" src="data:image/svg+xml;base64,{text}"></p>')
        return _PAGE.substitute(title=f"{html.escape(self.title)}, compressed", body="\n".join(parts))

    def plots(self) -> dict[str, bytes]:
        """Plots in SVG by file name: ``layers.svg``, ``healing.svg``; none without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return {}
        from structmat.surgery.plot import layers_figure

        found = {"layers.svg": _svg(layers_figure(self.layers))} if self.layers.compressed else {}
        if self.healing is not None:
            figure = Figure(figsize=(8, 3), layout="constrained")
            axes = figure.subplots()
            axes.plot(range(1, self.healing.steps + 1), self.healing.losses, color="#2a6f97", linewidth=1)
            axes.set(xlabel="step", ylabel="healing loss", yscale="log")
            axes.spines[["top", "right"]].set_visible(False)
            found["healing.svg"] = _svg(figure)
        return found

    def save(self, directory: Path) -> list[str]:
        """Write ``report.md``, ``report.html``, ``report.json`` (the layers) and the plots into a folder that is there.

        Returns:
            The names of the files.

        Raises:
            OSError: if a file cannot be written.
        """
        images = self.plots()
        files = {
            **images,
            "report.json": (self.layers.to_json() + "\n").encode(),
            "report.md": self.markdown(list(images)).encode(),
            "report.html": self.html(images).encode(),
        }
        for name, data in files.items():
            with atomic_write(directory / name) as file:
                file.write(data)
        return list(files)

    # ---------------------------------------------------------------- content
    def _blocks(self) -> list[tuple[str, Any]]:
        blocks: list[tuple[str, Any]] = []
        if self.quality:
            header: tuple[str, ...] = ("on held-out text", "dense", "compressed", "healed")
            width = 4 if any(row[3] for row in self.quality) else 3
            blocks += [("heading", "Quality"), ("table", [row[:width] for row in (header, *self.quality)])]
        blocks += [("heading", "Size"), ("table", self._totals())]
        for section, rows in self.facts.items():
            blocks += [("heading", section), ("table", [("what", "value"), *rows])]
        if self.healing is not None:
            blocks += [("heading", "Healing"), ("text", str(self.healing).replace("\n", "; "))]
        if self.latency or self.slower:
            blocks.append(("heading", "Speed"))
        if self.latency:
            rows = [(r.name, _ms(r.dense), _ms(r.compressed), f"{r.speedup:.2f}x") for r in self.latency]
            blocks.append(("table", [("forward pass", "dense", "compressed", "speedup"), *rows]))
        if self.slower:
            blocks.append(("warning", self._warning()))
            rows = [(r.name, r.structure or "", _ms(r.dense), _ms(r.compressed)) for r in self.slower]
            blocks.append(("table", [("layer", "structure", "dense", "structured"), *rows]))
        blocks += [("heading", "Layers"), ("table", self._layers())]
        left = [(row.name, f"{row.shape[0]} x {row.shape[1]}", row.skipped or "") for row in self.layers.skipped]
        if left:
            blocks += [("heading", "Left alone"), ("table", [("layer", "shape", "why"), *left])]
        return blocks

    def _totals(self) -> Rows:
        r = self.layers
        rows = [
            ("parameters of the model", r.model_params_before, r.model_params_after),
            ("parameters of the replaced weights", r.params_before, r.params_after),
            ("operations a token of the replaced weights", r.flops_before, r.flops_after),
        ]
        return [("", "before", "after", "share"), *((n, f"{a:,}", f"{b:,}", share(b, a)) for n, a, b in rows)]

    def _layers(self) -> Rows:
        header = (
            "layer",
            "shape",
            "structure",
            "parameters",
            "share",
            "plain error",
            "calibrated error",
            "uncalibrated",
        )
        rows: Rows = [
            (
                row.name,
                f"{row.shape[0]} x {row.shape[1]}",
                row.structure or "",
                f"{row.params_after:,}",
                share(row.params_after, row.params_before),
                *map(_error, (row.error, row.calibrated_error, row.plain_calibrated_error)),
            )
            for row in self.layers.compressed
        ]
        means = (_error(self.layers.mean_error), _error(self.layers.mean_calibrated_error), "")
        count = f"{len(rows)} layer{'' if len(rows) == 1 else 's'}, mean errors"
        total = (f"{self.layers.params_after:,}", share(self.layers.params_after, self.layers.params_before))
        return [header, *rows, (count, "", "", *total, *means)]

    def _warning(self) -> str:
        count = len(self.slower)
        return (
            f"{count} of {len(self.layers.compressed)} structured layers are slower than dense ones of their size on "
            "this device. structmat.surgery.densify_ makes layers dense again, at the cost of their parameters."
        )


def _html_table(rows: Rows) -> str:
    sides = [' class="number"' if right else "" for right in _numbers(rows[1:])]

    def line(row: Sequence[str], tag: str) -> str:
        cells = zip(row, sides, strict=True)
        return "<tr>" + "".join(f"<{tag}{side}>{html.escape(cell)}</{tag}>" for cell, side in cells) + "</tr>"

    return "\n".join(["<table>", line(rows[0], "th"), *(line(row, "td") for row in rows[1:]), "</table>"])


def _numbers(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, to be aligned at the right."""
    return [
        all(not cell or (cell[0].isdigit() and " x " not in cell) for cell in column)
        for column in zip(*rows, strict=True)
    ]


def _svg(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
