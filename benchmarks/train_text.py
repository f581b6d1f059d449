"""Train a byte-level GPT on a text: dense, structured, and structured first and dense then.

    python benchmarks/train_text.py --text FILE                       # everything, about four minutes on an H100
    python benchmarks/train_text.py --text FILE --phases time         # only the times of steps
    python benchmarks/train_text.py --text FILE --smoke --device cpu  # tiny: only that it runs

The file may be packed (.xz, .gz). All models see as many bytes. "monarch, then dense" trains Monarch weights for half
of the steps and their dense product for the rest (`structmat.surgery.densify_`, with the optimizer carried over; the
rate warms up again). The last 5 % of the text are held out: bits per byte on windows of it every so many steps.

Phases: `prewarm` compiles kernels in many processes; `time` measures steps in one quiet process; `train` trains in
several processes at once. Writes results/train-text-<device>.csv and .json, and results/step-times-text-<device>.csv
and .json. The exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.models import Size
from harness.pool import LEFT_OUT, run_tasks
from harness.report import table
from harness.results import TEXT, cells, quiet, summarise_text
from harness.runs import Run, add_arguments, settle
from harness.steptimes import PLAN, measure, times_table
from harness.text import Text, TextPlan, read_bytes
from harness.text_task import VARIANTS, Task, train
from torch import Tensor

HERE = Path(__file__).resolve().parent
PHASES = ("prewarm", "time", "train")
COLUMNS = (
    *("variant", "ratio", "share", "params", "layer_params", "final_params", "seed", "status", "graph", "lr", "steps"),
    *("tokens", "bits_per_byte", "train_bits", "loss_before", "loss_after", "seconds"),
)
GPT = Size("gpt", dim=512, depth=6, batch=64, heads=8, context=256)
SMOKE = Size("gpt", dim=64, depth=1, batch=4, heads=2, context=32)
LR = 1e-3


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, .xz and .gz are unpacked")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the parameters of structured layers")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--steps", type=int, default=None, help="2000")
    parser.add_argument("--every", type=int, default=None, help="steps between two tests; 200")
    parser.add_argument("--held", type=int, default=1024, help="held-out windows of a test, at most")
    parser.add_argument("--lr", type=float, default=LR, help=f"learning rate; {LR}")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, eight steps")
    add_arguments(parser, PHASES, prewarm=5)
    args = parser.parse_args(given)
    settle(args, PHASES, HERE, pilot=args.smoke)
    args.steps = args.steps or (8 if args.smoke else 2000)
    args.every = args.every or (2 if args.smoke else 200)
    args.held = min(args.held, 8) if args.smoke else args.held
    return args


# -------------------------------------------------------------------- phases
class TextRun(Run):
    """The phases of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.size = SMOKE if args.smoke else GPT
        self.name = f"GPT {self.size.dim}"
        facts = {"text": args.text.name, "size": dataclasses.asdict(self.size), "model": self.name}
        super().__init__(args, "text", ("variants", "ratio", "seeds", "steps", "every", "held", "lr"), facts)

    def tasks(self, steps: int) -> list[Task]:
        args, jobs = self.args, self.args.jobs if steps else self.args.prewarm
        options = (args.every, args.held, args.lr, args.text, args.device, (jobs, self.cores))
        return [
            Task(name, self.size, args.ratio, seed, steps, *options)
            for seed in range(args.seeds if steps else 1)
            for name in args.variants
            if steps or not VARIANTS[name][1]
        ]

    def prewarm(self) -> None:
        results = list(run_tasks(train, self.tasks(0), self.args.prewarm, time.time() + self.left / 3))
        failed = [f"{t.variant}: {r['status']}" for t, r in results if r["status"] != "ok"]
        self.say("\n  ".join([f"kernels of {len(results)} models compiled, {len(failed)} failed", *failed]))

    # ---------------------------------------------------------------- times
    def data(self) -> tuple[Tensor, Callable[..., Tensor]]:
        """Windows of the text, as :func:`harness.steptimes.measure` wants its data."""
        text = Text(read_bytes(self.args.text), self.size.context, self.args.held, self.device)
        plan = TextPlan(text, self.size.batch, PLAN, 0)
        plan.draw()
        return plan.windows(torch.zeros(1, dtype=torch.long, device=self.device))[:, :-1], plan.loss

    def time_steps(self) -> None:
        rows: list[dict[str, Any]] = []
        if self.left > 0:
            structures = dict.fromkeys(VARIANTS[name][0] for name in self.args.variants)
            plain = [(s, 1.0 if s == "dense" else self.args.ratio) for s in structures]
            compiled = [v for v in plain if self.args.compile == "all" or v[0] == self.args.compile]
            cases = [(*v, False) for v in plain] + [(*v, True) for v in compiled]
            units = ("bytes", self.size.batch * self.size.context)
            rows = measure(self.name, self.size, cases, self.data, self.device, self.args.seconds, units)
        self.count(rows)
        self.save_times(rows, {"left_out": [] if rows else [self.name]})
        self.say(f"{self.name}, batches of {self.size.batch} x {self.size.context} bytes")
        print(times_table(rows) if rows else LEFT_OUT, flush=True)

    # ---------------------------------------------------------------- trainings
    def steps(self) -> int:
        """As asked for, or fewer where the quiet times say that they would not fit."""
        args = self.args
        times = {structure: row["p50_ms"] / 1e3 for (_, structure, _), row in quiet(self.times()).items()}
        one = 0.0
        for structure, densify in (VARIANTS[name] for name in args.variants):
            parts = (structure, "dense") if densify else (structure, structure)
            one += args.seeds * sum(times.get(part, 0.0) / 2 for part in parts)
        if one:
            self.say(f"{args.steps} steps are asked for, which take {one * args.steps:.0f} s for all variants")
        most = int(args.fit / one) // args.every * args.every if one and args.fit else args.steps
        return max(args.every, min(args.steps, most))

    def train(self) -> None:
        steps = self.steps()
        tasks = self.tasks(steps)
        order = {(t.variant, t.seed): i for i, t in enumerate(tasks)}
        rows: list[dict[str, Any]] = []
        runs: list[dict[str, Any]] = []
        self.say(f"{len(tasks)} trainings of {steps} steps in {self.args.jobs} processes")
        for task, result in run_tasks(train, tasks, self.args.jobs, self.deadline, patience=600):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {name: getattr(task, name) for name in ("variant", "ratio", "seed", "steps", "lr")}
            row |= {name: value for name, value in result.items() if name in COLUMNS}
            if "curve" in result:
                row |= {name: result["curve"][name][-1] for name in ("bits_per_byte", "train_bits")}
            rows.append(row)
            runs.append({"variant": task.variant, "structure": VARIANTS[task.variant][0], "seed": task.seed} | result)
            self.count([row])
            words = self.words(row | result, f"{row['bits_per_byte']} bits per byte")
            if "loss_before" in result:
                words += f", loss at the exchange {row['loss_before']:.6f} and {row['loss_after']:.6f}"
            self.say(f"{len(rows)}/{len(tasks)} {task.variant} seed {task.seed}: {words}")
            for some in (rows, runs):
                some.sort(key=lambda r: order[r["variant"], r["seed"]])
            left = [f"{r['variant']} {r['seed']}" for r in rows if LEFT_OUT in r["status"]]
            facts = {"steps": steps, "runs": runs, "left_out": left, "model": self.name}
            facts["complete"] = len(rows) == len(tasks) and not left
            facts["summary"] = summarise_text(facts, self.times())
            self.save_trainings(rows, COLUMNS, facts)
        print(table(TEXT, cells(summarise_text({"runs": runs, "model": self.name}, self.times()), TEXT)))


def main(given: list[str] | None = None) -> int:
    run = TextRun(arguments(given))
    if "prewarm" in run.args.phases:
        run.prewarm()
    if "time" in run.args.phases:
        run.time_steps()
    if "train" in run.args.phases:
        run.train()
    run.say(f"done, {run.failed} failed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
