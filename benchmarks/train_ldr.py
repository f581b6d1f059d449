"""Train networks with one hidden layer, dense or of low displacement rank with equally many parameters.

    python benchmarks/train_ldr.py --data FOLDER --jobs 8 --fit 100 --budget 190   # on an H100
    python benchmarks/train_ldr.py --data FOLDER --smoke --device cpu               # tiny: only that it runs

The comparison of Thomas, Gu, Dao, Rudra, Re 2018, "Learning compressed transforms with low displacement rank": networks
784 -> 784 -> ReLU -> 10 whose hidden layer is structured, on Fashion-MNIST, and on its images rotated by angles of the
full circle and with noise added, made on the device from a seed. float32 throughout, without TF32.

`time` measures a step of every structure in one quiet process. `train` first trains each structure at every rate of a
grid, for half as many epochs, on five sixths of the training images; the rate that is best on the other sixth then
trains it on all of them from several seeds, seed by seed, so that a time limit costs whole seeds. Only these networks
see the test images, once, after the last epoch.

Writes results/train-ldr-<device>.csv and .json and results/step-times-ldr-<device>.csv and .json. The exit status is 1
if a run failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness.ldr_data import VARIANTS
from harness.ldr_results import SUMMARY, summarise
from harness.ldr_task import DECAY, STRUCTURES, Task, timed_step, train
from harness.pool import LEFT_OUT, describe, run_tasks
from harness.report import read_rows, table, write_csv, write_json
from harness.results import cells
from harness.runs import Run, settle
from harness.timing import take_turns
from harness.training import times_in_ms

HERE = Path(__file__).resolve().parent
PHASES = ("time", "train")
COLUMNS = (
    *("data", "structure", "layer_params", "params", "rate", "seed", "status", "graph", "epochs", "accuracy"),
    *("train_loss", "seconds"),
)
TIMES = ("structure", "layer_params", "params", "status", "graph", "p20_ms", "p50_ms", "p80_ms", "repeats", "timer")
RATES = (0.002, 0.008)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the four idx files, gzipped or not")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=8, help="of a training; half as many where rates are compared")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates to choose from")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--count", type=int, help="only so many training and test images")
    parser.add_argument("--smoke", action="store_true", help="a few images of 7 x 7, one epoch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=None)
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="fewer epochs where the times of steps say more")
    parser.add_argument("--jobs", type=int, default=None, help="processes that train at once; 0: this one (5; CPU 0)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the repeats of the steps")
    parser.add_argument("--budget", type=float, default=560, help="seconds after which nothing is begun or goes on")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    parser.set_defaults(compile="none")  # which result files of trainings name
    args = parser.parse_args(given)
    settle(args, PHASES, HERE, pilot=args.smoke or args.count is not None)
    if "train" in args.phases and args.data is None:
        parser.error("--data FOLDER is needed to train")
    args.side = 7 if args.smoke else 28
    if args.smoke:
        args.count, args.epochs, args.batch = args.count or 96, 1, min(args.batch, 16)
    return args


class LdrRun(Run):
    """The phases of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        named = ("variants", "structures", "seeds", "epochs", "rates", "batch", "count")
        super().__init__(args, "ldr", named, {"side": args.side, "decay": DECAY})

    # ---------------------------------------------------------------- times
    def time_steps(self) -> None:
        rows: list[dict[str, Any]] = []
        ready = []
        for structure in self.args.structures:
            row: dict[str, Any] = dict.fromkeys(TIMES, "") | {"structure": structure, "status": "ok"}
            rows.append(row)
            try:
                timed, facts = timed_step(structure, self.args.side, self.args.batch, self.device)
                row |= facts
                ready.append((row, timed))
            except Exception as error:
                row["status"] = describe(error)
        try:
            times = take_turns([t for _, t in ready], self.device, self.args.seconds, least=10)
            for (row, _), found in zip(ready, times, strict=True):
                row |= times_in_ms(found)
        except Exception as error:
            for row, _ in ready:
                row["status"] = describe(error)
        del ready
        self.count(rows)
        write_csv(self.file("step-times", ".csv"), rows, TIMES)
        write_json(self.file("step-times", ".json"), self.facts)
        self.say(f"steps, batches of {self.args.batch}")
        names = ("structure", "layer_params", "p50_ms", "timer", "status")
        print(table(names, cells(rows, names)), flush=True)

    def known_times(self) -> list[dict[str, Any]]:
        """Rows of the quiet times, of this run or an earlier one."""
        path = self.file("step-times", ".csv")
        return read_rows(path) if path.exists() else []

    # ---------------------------------------------------------------- trainings
    def epochs(self) -> int:
        """As asked for, or fewer where the quiet times say that they would not fit."""
        a, images = self.args, min(self.args.count or 60_000, 60_000)
        steps = a.seeds * (images // a.batch) + len(a.rates) * (images * 5 // 6 // a.batch) / 2
        steps *= len(a.variants)
        asked = set(a.structures)
        one = steps * sum(r["p50_ms"] / 1e3 for r in self.known_times() if r["p50_ms"] and r["structure"] in asked)
        if not one:
            return a.epochs
        self.say(f"an epoch of all trainings takes {one:.1f} s of steps, {a.epochs} epochs are asked for")
        return max(1, min(a.epochs, int(a.fit / one))) if a.fit else a.epochs

    def task(self, data: str, structure: str, rate: float, seed: int, epochs: int, held: bool) -> Task:
        a = self.args
        options = (a.data, a.count, a.side, a.batch, a.device, (a.jobs, self.cores))
        return Task(data, structure, rate, seed, epochs, held, *options)

    def tune(self, epochs: int) -> list[dict[str, Any]]:
        """Accuracy of every rate on training images that were held out, seed 0."""
        a, found = self.args, []
        # What takes longest first: no process is left with it at the end.
        order = [(d, s, r) for s in reversed(a.structures) for d in a.variants for r in a.rates]
        tasks = [self.task(d, s, r, 0, max(1, epochs // 2), held=True) for d, s, r in order]
        for task, result in run_tasks(train, tasks, a.jobs, time.time() + 0.4 * self.left):
            row = {"data": task.data, "structure": task.structure, "rate": task.rate, "epochs": task.epochs}
            found.append(row | {"accuracy": result.get("accuracy"), "status": result["status"]})
            self.count(found[-1:])
            if result["status"] != "ok":
                self.say(f"{task.data}, {task.structure}, rate {task.rate:g}: {result['status']}")
        self.say(f"{len(found)} trainings to choose rates, {sum(r['status'] == 'ok' for r in found)} ended well")
        return sorted(found, key=lambda r: (a.variants.index(r["data"]), a.structures.index(r["structure"]), r["rate"]))

    def train(self) -> None:
        a, epochs = self.args, self.epochs()
        self.say(f"{epochs} epochs, {a.jobs} processes")
        tuning = self.tune(epochs)
        rates = {}
        for data, structure in ((d, s) for d in a.variants for s in a.structures):
            good = [r for r in tuning if (r["data"], r["structure"], r["status"]) == (data, structure, "ok")]
            rates[data, structure] = max(good, key=lambda r: r["accuracy"])["rate"] if good else min(a.rates)
        tasks = [
            self.task(data, structure, rates[data, structure], seed, epochs, held=False)
            for seed in range(1, a.seeds + 1)
            for structure in reversed(a.structures)
            for data in a.variants
        ]
        facts: dict[str, Any] = {"epochs": epochs, "tuning": tuning}
        rows: list[dict[str, Any]] = []
        for task, result in run_tasks(train, tasks, a.jobs, self.deadline):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {name: getattr(task, name) for name in ("data", "structure", "rate", "seed", "epochs")}
            row |= {name: value for name, value in result.items() if name in COLUMNS}
            rows.append(row)
            self.count([row])
            words = self.words(row | result, f"{row['accuracy']} %")
            self.say(f"{len(rows)}/{len(tasks)} {task.data}, {task.structure}, seed {task.seed}: {words}")
            rows.sort(key=lambda r: (a.variants.index(r["data"]), a.structures.index(r["structure"]), r["seed"]))
            left = [f"{r['data']}, {r['structure']}, seed {r['seed']}" for r in rows if LEFT_OUT in r["status"]]
            facts |= {"left_out": left, "complete": len(rows) == len(tasks) and not left}
            self.save_trainings(rows, COLUMNS, facts)
        print(table(SUMMARY, cells(summarise(rows, self.known_times()), SUMMARY)), flush=True)


def main(given: list[str] | None = None) -> int:
    run = LdrRun(arguments(given))
    if "time" in run.args.phases:
        run.time_steps()
    if "train" in run.args.phases:
        run.train()
    run.say(f"done, {run.failed} failed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
