"""Time long and short convolutions, and a layer of M2-BERT made of them, beside what a user would otherwise run.

    python benchmarks/convolutions.py --prewarm 8         # everything, on a GPU
    python benchmarks/convolutions.py --only x4096/bf16   # cases whose key contains one of the texts; see --list
    python benchmarks/convolutions.py --sweep --only long/64x768x4096/bf16/forward --prewarm 8
    python benchmarks/convolutions.py --smoke --device cpu

Long convolutions are causal, with filters as long as the input, in float32. torch.fft: real FFTs of twice the length in
float32, gates outside. dense Toeplitz: a product with a matrix for each channel up to 1024 times; the matrices are made
before, and their gradient is not summed up to that of the filter. Layers: BertLayer with scaled_dot_product_attention,
and M2's layer ("80M") in PyTorch, with the older kernels ("other"), with all of them, of 32,768 tokens; forward in
bfloat16, forward and backward with float32 weights under autocast.

Alternatives take turns, in CUDA graphs. Floors: "bytes", reading all operands and writing all results once at the
bandwidth of a copy; "arithmetic", the products of our kernels at the rate of a large float16 product, both measured in
this run. Errors: relative, of three channels, against float64 (of layers: two sequences); "rounding" is that of the
exact output rounded. peak_mb: beyond the operands, results included; saved_mb: what a forward pass keeps besides its
output. first_s: seconds of the first call, in which kernels are compiled or loaded.

--sweep times the kernels' configurations instead, compiled in --prewarm processes before.

Cases run in a process of their own: one that dies or hangs is tried again without the kernels. Writes
results/convolutions-<device>.csv and .json (--only, --smoke and CPU: to scratch). The exit status is 1 if a kernel
failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import conv_sweep
from harness.conv_cases import Case, cases
from harness.conv_measure import COLUMNS, Row, Task, floors, row_of, work
from harness.device import Roofs, about, slug
from harness.pool import LEFT_OUT, Result, run_tasks
from harness.report import table, write_csv, write_json

HERE = Path(__file__).resolve().parent
#: Names of the alternatives that run the kernels.
OURS = {"long": "ours", "short": "ours", "layer": "M2, all kernels"}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose key contains one of these")
    parser.add_argument("--list", action="store_true", help="print the cases' keys and stop")
    parser.add_argument("--sweep", action="store_true", help="time configurations of the chosen long convolutions")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of torch.fft too")
    parser.add_argument("--prewarm", type=int, default=0, metavar="N", help="compile kernels in N processes first")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing is begun or goes on")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a case is given up")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the repeats of a case")
    parser.add_argument("--least", type=int, default=10, help="repeats of each alternative at least")
    parser.add_argument("--jobs", type=int, default=None, help="processes that measure: 1; 0 is this one (on a CPU)")
    parser.add_argument("--smoke", action="store_true", help="tiny cases: only that it runs")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    args = parser.parse_args(given)
    args.gpu = args.device.startswith("cuda")
    args.jobs = (1 if args.gpu else 0) if args.jobs is None else args.jobs
    partly = args.only or args.smoke or not args.gpu
    args.out = args.out or HERE / ("scratch" if partly else "results")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    found = [c for c in cases(args.smoke) if not args.only or any(text in c.key for text in args.only)]
    if not found:
        raise SystemExit("no case matches; --list names them")
    return found


class Run:
    """A run: its rows, what it found out about the device, and its files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.time()
        self.deadline = self.start + args.budget
        name = f"convolutions-{'sweep-' if args.sweep else ''}{slug(torch.device(args.device))}"
        self.path = args.out / f"{name}.csv"
        named = ("only", "smoke", "compile", "prewarm", "budget", "seconds", "least")
        self.facts: dict[str, Any] = about(torch.device(args.device))
        self.facts |= {"arguments": {n: getattr(args, n) for n in named}, "left_out": []}
        self.rows: dict[str, list[Row]] = {}
        self.columns = conv_sweep.COLUMNS if args.sweep else COLUMNS

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.start:5.0f} s] {text}", flush=True)

    def save(self, complete: bool = False) -> None:
        write_csv(self.path, [row for rows in self.rows.values() for row in rows], self.columns)
        facts = {"complete": complete, "wall_seconds": round(time.time() - self.start)}
        write_json(self.path.with_suffix(".json"), self.facts | facts)


# ---------------------------------------------------------------- times of all alternatives
def prewarm(run: Run, found: list[Case]) -> None:
    """Compile: a case of both directions needs its training only, except layers, whose forward has other dtypes."""
    args = run.args
    whole = {dataclasses.replace(c, direction="") for c in found if c.training and c.operation != "layer"}
    need = [c for c in found if c.training or dataclasses.replace(c, direction="") not in whole]
    tasks = [Task(args.device, c, warm=True) for c in need]
    end = min(run.deadline, time.time() + args.budget / 2)
    for task, result in run_tasks(work, tasks, min(args.prewarm, len(tasks)), end, args.patience):
        assert task.case is not None
        run.say(f"compiled {task.case.key}: {result.get('status', 'ok')}, {result.get('seconds', '')} s")


def measure(run: Run, found: list[Case]) -> None:
    """Measure all cases; those that failed as a whole once more without the kernels."""
    args = run.args
    options = {"seconds": args.seconds, "least": args.least, "compiled": args.compile}
    tasks = [Task(args.device, c, **options) for c in found]
    roofs, again = None, []
    run.rows = {c.key: [] for c in found}
    for task, result in run_tasks(
        work, [*([Task(args.device)] if args.gpu else []), *tasks], args.jobs, run.deadline, args.patience
    ):
        if task.case is None:
            if "roofs" in result:
                roofs = Roofs(**result["roofs"])
            run.facts |= result
            run.say(f"rates: {result}")
            continue
        if str(result.get("status", "")).startswith("error"):
            run.rows[task.case.key] = [row_of(task.case, OURS[task.case.operation], result["status"])]
            again.append(dataclasses.replace(task, ours=False))
            run.say(f"{task.case.key}: {result['status']}; to be tried without the kernels")
            run.save()
            continue
        take(run, task.case, result, roofs)
    for task, result in run_tasks(work, again, args.jobs, run.deadline, args.patience):
        assert task.case is not None
        take(run, task.case, result, roofs)


def take(run: Run, case: Case, result: Result, roofs: Roofs | None) -> None:
    """Keep the rows of a case, save and print them."""
    rows = result.get("rows") or [row_of(case, "", result["status"])]
    if rows[0]["status"].startswith(LEFT_OUT):
        run.facts["left_out"].append(case.key)
    for row in rows:
        floors(row, case, roofs, row["alternative"] == OURS[case.operation])
    run.rows[case.key] = [*rows, *run.rows[case.key]]
    run.save()
    run.say(case.key)
    names = (
        *("p50_us", "speedup", "bytes_ratio", "arithmetic_ratio", "error", "error_grads", "rounding"),
        *("peak_mb", "saved_mb", "first_s"),
    )
    header = ("", "us", "speed-up", "x bytes", "x arith.", "error", "of grads", "rounding", "peak MB", "saved", "first")
    good = [row for row in rows if row["status"] == "ok"]
    if good:
        print(table(header, [(row["alternative"], *(row[n] for n in names)) for row in good]))
    for row in rows:
        notes = [row["status"]] if row["status"] != "ok" else []
        notes += [str(row[n]) for n in ("kernels", "timer") if row[n] and row[n] not in ("graph", "host clock")]
        if notes:
            print(f"  {row['alternative']}: {'; '.join(notes)}", flush=True)


# ---------------------------------------------------------------- configurations
def sweep(run: Run, found: list[Case]) -> None:
    """Compile all configurations of all cases, then time those that run, a case at a time."""
    args = run.args
    found = [c for c in found if c.operations is not None]
    if not found:
        raise SystemExit("--sweep is for long convolutions of lengths that the kernels take; choose them by --only")
    rows = {(c, x): conv_sweep.row_of(c, x) for c in found for x in conv_sweep.choices(c, args.smoke)}
    run.rows = {c.key: [row for (case, _), row in rows.items() if case == c] for c in found}
    tasks = [conv_sweep.Task(args.device, case, (x,)) for case, x in rows]
    jobs = min(max(args.prewarm, args.jobs), len(tasks))
    for task, result in run_tasks(conv_sweep.work, tasks, jobs, run.deadline, args.patience):
        row = rows[task.case, task.choices[0]]
        row |= result["cells"][0] if "cells" in result else {"status": result["status"]}
        said = (row[n] for n in ("case", "P", "num_warps", "status", "first_s", "error", "kernels"))
        run.say("compiled " + ", ".join(map(str, said)))
    run.save()
    tasks = []
    for case in found:
        alive = tuple(x for (c, x), row in rows.items() if c == case and row["status"] == "ok")
        tasks += [conv_sweep.Task(args.device, case, alive, max(args.seconds, 1e-9), args.least)] if alive else []
    for task, result in run_tasks(conv_sweep.work, tasks, args.jobs, run.deadline, args.patience):
        cells = result.get("cells") or [{"status": result["status"]}] * len(task.choices)
        for x, some in zip(task.choices, cells, strict=True):
            rows[task.case, x] |= some
        run.save()
        best = sorted((r for r in run.rows[task.case.key] if r["p50_us"]), key=lambda r: r["p50_us"])
        run.say(f"{task.case.key}: {result.get('status', 'ok')}")
        names = ("P", "num_warps", "default", "p50_us", "p20_us", "p80_us", "error", "timer", "kernels")
        print(table(names, [[r[n] for n in names] for r in best[:6]]), flush=True)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    found = chosen(args)
    if args.list:
        print("\n".join(c.key for c in found))
        return 0
    run = Run(args)
    if args.sweep:
        sweep(run, found)
    else:
        if args.prewarm and args.gpu:
            prewarm(run, found)
        measure(run, found)
    run.save(complete=True)
    rows = [row for some in run.rows.values() for row in some]
    run.say(f"{len(rows)} rows in {run.path}")
    if args.sweep:
        return 1 if any(not any(r["p50_us"] for r in some) for some in run.rows.values()) else 0
    failed = [r for r in rows if r["status"].startswith("error") and r["alternative"] in OURS.values()]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
