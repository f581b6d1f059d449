"""A run in two processes: one measures, the other keeps its results if a kernel crashes, hangs or loses the device.

The measuring process appends lines of JSON to a progress file: what it is about to try, each row, each finished
problem. The supervising process leaves the device alone. If the other one dies or is silent for too long, it notes
which alternative that was and starts another one, which goes on from there without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.device import Roofs, about, measure_roofs
from harness.measure import DeviceLost, Row, measure, release, row_of, run_once
from harness.problem import Problem
from harness.report import short_table

#: Seconds that a slow problem (torch.compile) must have left before the deadline.
SLOW = 60.0
TURNS = "all in turn"
MOST_RESTARTS = 12


class Progress:
    """The progress file, and what it says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.rows: dict[tuple[str, str], Row] = {}  # by problem and alternative
        self.done: set[str] = set()
        self.trying: tuple[str, str] | None = None
        self.finished = False
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                self._take(json.loads(line))
            except json.JSONDecodeError:
                continue  # a line that a dying process did not finish

    def _take(self, event: dict[str, Any]) -> None:
        self.facts |= event.get("facts", {})
        if "row" in event:
            self.rows[event["key"], event["row"]["alternative"]] = event["row"]
        if "trying" in event:
            self.trying = (event["key"], event["trying"]) if event["trying"] else None
        if "done" in event:
            self.done.add(event["done"])
        self.finished = self.finished or "finished" in event

    def write(self, **event: Any) -> None:
        """Append an event."""
        self._take(event)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(event))

    def failed(self, key: str) -> set[str]:
        """Alternatives of a problem that are not to be tried again."""
        return {name for (k, name), row in self.rows.items() if k == key and str(row["status"]).startswith("error")}

    def ordered(self, problems: Sequence[Problem]) -> list[Row]:
        """All rows in the order of the problems."""
        return [row for p in problems for (key, _), row in self.rows.items() if key == p.key]


def work(
    problems: Sequence[Problem], device: torch.device, progress: Progress, deadline: float, seconds: float
) -> None:
    """Measure all problems that are not done; those for which there is no time are noted.

    Args:
        problems: in order of importance.
        device: where.
        progress: the file.
        deadline: seconds since the epoch after which nothing new is begun.
        seconds: how long the repeats of a problem may take.
    """
    if "copy_gb_s" not in progress.facts:
        roofs = measure_roofs(device, {p.dtype for p in problems})
        progress.write(
            facts={**about(device), "copy_gb_s": roofs.copy_gb_s, "tflop_s": roofs.tflop_s, "cache": roofs.cache}
        )
    roofs = Roofs(progress.facts["copy_gb_s"], progress.facts["tflop_s"], progress.facts["cache"])
    print(
        f"{progress.facts['device']}: copy {roofs.copy_gb_s} GB/s, dense products {roofs.tflop_s} TFLOP/s", flush=True
    )
    left = []
    for problem in problems:
        key = problem.key
        if key in progress.done:
            continue
        if time.time() + (SLOW if problem.slow else 0) > deadline:
            left.append(key)
            continue
        rows: list[Row] = []
        start = time.time()
        try:
            for row in measure(
                problem,
                device,
                roofs,
                seconds,
                progress.failed(key),
                lambda name, key=key: progress.write(key=key, trying=name),
            ):
                rows.append(row)
                progress.write(key=key, row=row)
        except DeviceLost:
            raise
        except Exception as error:  # the operands, or all in turn
            row = row_of(problem, TURNS, f"error: {type(error).__name__}: {error}")
            rows.append(row)
            progress.write(key=key, row=row, trying="", done=key)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        progress.write(done=key)
        release(device)
        if rows:
            print(short_table(rows), f"\n  ({time.time() - start:.1f} s)", flush=True)
    end = measure_roofs(device, {p.dtype for p in problems})
    progress.write(
        facts={"copy_gb_s_at_end": end.copy_gb_s, "tflop_s_at_end": end.tflop_s, "left_out": left}, finished=True
    )


def compile_only(problems: Sequence[Problem], device: torch.device) -> None:
    """Fill Triton's and Inductor's caches on disk."""
    for problem in problems:
        run_once(problem, device)


def prewarm(command: list[str], processes: int, seconds: float) -> None:
    """Compile in several processes at once; those that take longer than that are ended."""
    end = time.time() + seconds
    workers = [
        subprocess.Popen(
            [*command, "--compile-only", f"{i}/{processes}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(processes)
    ]
    for worker in workers:
        try:
            worker.wait(max(0.1, end - time.time()))
        except subprocess.TimeoutExpired:
            _end(worker)


def supervise(
    command: list[str],
    problems: Sequence[Problem],
    path: Path,
    patience: float,
    stop: float,
    save: Callable[[Progress], None],
) -> Progress:
    """Run ``command --worker path`` until it is finished, over again where it dies.

    Args:
        command: starts the measuring process.
        problems: what it measures.
        path: of the progress file.
        patience: seconds without progress after which the process is ended.
        stop: seconds since the epoch after which it is ended in any case, and none is started.
        save: writes the result files; called now and then and at the end.
    """
    by_key = {p.key: p for p in problems}
    for _ in range(MOST_RESTARTS):
        worker = subprocess.Popen([*command, "--worker", str(path)])
        try:
            end = _watch(worker, path, patience, stop, save)
        finally:
            _end(worker)
        progress = Progress(path)
        if progress.finished or time.time() > stop:
            break
        print(f"the measuring process {end}, while trying {progress.trying}", file=sys.stderr, flush=True)
        if progress.trying is None:
            if not progress.rows:
                break  # it cannot even begin
            continue
        key, name = progress.trying
        if (key, name) not in progress.rows:
            progress.write(key=key, row=row_of(by_key[key], name, f"error: the process {end}"))
        progress.write(key=key, trying="")
        if name == TURNS:
            progress.write(done=key)
    progress = Progress(path)
    save(progress)
    return progress


def _watch(worker: subprocess.Popen, path: Path, patience: float, stop: float, save: Callable[[Progress], None]) -> str:
    """How the worker ended."""
    size, since = -1, time.time()
    while (code := worker.poll()) is None:
        time.sleep(0.5)
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, since = now, time.time()
            save(Progress(path))
        elif time.time() - since > patience:
            return f"was silent for {patience:.0f} s and was ended"
        if time.time() > stop:
            return "ran out of time"
    return f"ended with code {code}"


def _end(worker: subprocess.Popen) -> None:
    if worker.poll() is None:
        worker.kill()
        worker.wait()
