"""What the scripts that train have in common: arguments, a clock, result files, failures."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.device import about, slug
from harness.pool import LEFT_OUT
from harness.report import read_rows, write_csv, write_json
from harness.steptimes import COLUMNS as TIME_COLUMNS

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, phases: Sequence[str], prewarm: int) -> None:
    """Arguments of both scripts."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--phases", nargs="+", choices=phases, default=None)
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="train less where the times of steps say more")
    parser.add_argument("--jobs", type=int, default=None, help="processes that train at once; 0: this one (5; CPU 0)")
    parser.add_argument("--prewarm", type=int, default=prewarm, help="processes that compile kernels")
    parser.add_argument("--compile", choices=("none", "dense", "all"), default="dense", help="time compiled models too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the repeats of a model's steps")
    parser.add_argument("--budget", type=float, default=560, help="seconds after which nothing is begun or goes on")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")


def settle(args: argparse.Namespace, phases: Sequence[str], folder: Path, pilot: bool) -> None:
    """Fill in what depends on the device, and on whether it is only a check."""
    gpu = args.device.startswith("cuda")
    if args.phases is None:
        args.phases = [p for p in phases if gpu or p != "prewarm"]
    args.jobs = (5 if gpu else 0) if args.jobs is None else args.jobs
    args.out = args.out or folder / ("scratch" if pilot or not gpu else "results")
    if args.smoke:
        args.compile = "none"


class Run:
    """A run of a script.

    Args:
        args: its arguments.
        kind: "images" or "text", in the names of the result files.
        named: which arguments the result files have.
        facts: what they say besides.
    """

    def __init__(self, args: argparse.Namespace, kind: str, named: Iterable[str], facts: dict[str, Any]) -> None:
        self.args, self.kind, self.device = args, kind, torch.device(args.device)
        self.start = time.time()
        self.deadline = self.start + args.budget
        self.cores = os.cpu_count() or 1
        self.slug = slug(self.device)
        shared = ("jobs", "compile", "budget", "smoke", "fit")
        self.facts = about(self.device) | {"arguments": {n: getattr(args, n) for n in (*named, *shared)}} | facts
        self.failed = 0
        args.out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.time()

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.start:5.0f} s] {text}", flush=True)

    def file(self, what: str, end: str) -> Path:
        """A result file: of "train" or "step-times"."""
        return self.args.out / f"{what}-{self.kind}-{self.slug}{end}"

    def count(self, rows: Iterable[Row]) -> None:
        """Count failures; a budget that no matrix of a structure meets, and what was left out, are none."""
        excused = ("ok", LEFT_OUT, "error: BudgetError", "error: as in training")
        self.failed += sum(not str(row["status"]).startswith(excused) for row in rows)

    def save_times(self, rows: Sequence[Row], facts: dict[str, Any]) -> None:
        write_csv(self.file("step-times", ".csv"), rows, TIME_COLUMNS)
        write_json(self.file("step-times", ".json"), self.facts | facts)

    def times(self) -> list[Row]:
        """Rows of the quiet times, of this run or an earlier one."""
        path = self.file("step-times", ".csv")
        return read_rows(path) if path.exists() else []

    def save_trainings(self, rows: Sequence[Row], columns: Sequence[str], facts: dict[str, Any]) -> None:
        facts = facts | {"wall_seconds": round(time.time() - self.start)}
        write_csv(self.file("train", ".csv"), rows, columns)
        write_json(self.file("train", ".json"), self.facts | facts)

    def words(self, result: Row, good: str) -> str:
        """What to print of a training."""
        if result["status"] != "ok":
            return result["status"]
        eager = self.device.type == "cuda" and not result["graph"]
        return f"{good}, {result['seconds']} s" + (f", no graph: {result['why_no_graph']}" if eager else "")
