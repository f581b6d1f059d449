"""Time every kernel beside what a user would otherwise run, in one run on one device.

    python benchmarks/kernels.py                  # everything, below 8 minutes on an H100
    python benchmarks/kernels.py --quick          # one case of each operation, below a minute
    python benchmarks/kernels.py --device cpu     # the reference paths at smaller sizes

Writes results/kernels-<device>-<dtype or all>.csv and .json (a quick run: to benchmarks/scratch) and prints a table for
each problem. docs/benchmarks.md says how it is measured. The exit status is 1 if a case of this library failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from harness.cases import check_keys, cpu_problems, gpu_problems, quick_problems
from harness.device import slug
from harness.measure import COLUMNS, row_of
from harness.problem import DTYPES, Problem
from harness.report import write_csv, write_json
from harness.supervise import Progress, compile_only, prewarm, supervise, work
from harness.targets import evaluate, summary

HERE = Path(__file__).resolve().parent
#: Kinds whose failure is not this library's.
FOREIGN = ("peer", "compile", "copy")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case of each operation")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="problems whose key contains one of these"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no problem is begun (430; 50)")
    parser.add_argument("--seconds", type=float, default=0.6, help="for the repeats of a problem")
    parser.add_argument("--patience", type=float, default=90, help="seconds of silence after which a case is given up")
    parser.add_argument("--prewarm", type=int, default=0, metavar="N", help="compile kernels in N processes first")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU: one, for cores may be busy with other things")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    parser.add_argument("--list", action="store_true", help="print the problems' keys and stop")
    parser.add_argument("--deadline", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.budget = args.budget or (50 if args.quick else 430)
    args.out = args.out or HERE / ("scratch" if args.quick or args.only else "results")
    return args


def chosen(args: argparse.Namespace) -> list[Problem]:
    """The problems that the arguments ask for."""
    every = quick_problems() if args.quick else gpu_problems()
    if not args.device.startswith("cuda"):
        every = cpu_problems()
    found = [p for p in check_keys(every) if p.dtype in args.dtypes]
    return [p for p in found if not args.only or any(text in p.key for text in args.only)]


def main() -> int:
    args = arguments()
    problems, device = chosen(args), torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if args.list:
        print("\n".join(p.key for p in problems))
        return 0
    if not problems:
        raise SystemExit("no problem matches")
    deadline = args.deadline or time.time() + args.budget
    if args.compile_only:
        part, parts = map(int, args.compile_only.split("/"))
        compile_only(problems[part::parts], device)
        return 0
    if args.worker:
        work(problems, device, Progress(args.worker), deadline, args.seconds)
        return 0

    dtypes = {p.dtype for p in problems}
    name = f"kernels-{slug(device)}" + (
        f"-{'all' if len(dtypes) > 1 else dtypes.pop()}" if device.type == "cuda" else ""
    )
    name += "-quick" if args.quick else ""
    args.out.mkdir(parents=True, exist_ok=True)
    progress_file = args.out / f"{name}.progress"
    progress_file.unlink(missing_ok=True)
    start = time.time()

    def save(progress: Progress) -> None:
        rows = progress.ordered(problems)
        rows += [row_of(p, "", "left out: no time") for p in problems if p.key in progress.facts.get("left_out", [])]
        write_csv(args.out / f"{name}.csv", rows, COLUMNS)
        options = {name: getattr(args, name) for name in ("quick", "only", "dtypes", "budget", "seconds", "prewarm")}
        facts = {"complete": progress.finished, "wall_seconds": round(time.time() - start), "options": options}
        write_json(args.out / f"{name}.json", progress.facts | facts)

    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--deadline", str(deadline)]
    if args.prewarm and device.type == "cuda":
        prewarm(command, args.prewarm, args.budget / 3)
        print(f"kernels compiled in {time.time() - start:.0f} s", flush=True)
    progress = supervise(command, problems, progress_file, args.patience, deadline + 40, save)
    if progress.finished:
        progress_file.unlink()

    rows = progress.ordered(problems)
    print("\n" + summary(evaluate(rows)))
    for row in rows:
        if row["status"] != "ok":
            size = f"{row['inputs']}x{row['outputs']} T{row['tokens']} {row['dtype']} {row['direction']}"
            print(f"{row['operation']} {size}: {row['alternative']}: {row['status']}")
    for key in progress.facts.get("left_out", []):
        print(f"{key}: left out, no time")
    print(f"{len(rows)} rows in {args.out / name}.csv, {time.time() - start:.0f} s")
    errors = [r for r in rows if str(r["status"]).startswith("error") and r["kind"] not in FOREIGN]
    return 1 if errors or not progress.finished else 0


if __name__ == "__main__":
    sys.exit(main())
