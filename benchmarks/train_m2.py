"""Train M2-GPT and M2-ViT beside transformers of as many parameters: on text, on associative recall, on images.

    python benchmarks/train_m2.py --text FILE --data FOLDER             # everything, about eight minutes on an H100
    python benchmarks/train_m2.py --text FILE --tasks text              # only the language models
    python benchmarks/train_m2.py --text FILE --smoke --device cpu      # tiny: only that it runs

Text: byte-level models of 5 and 30 million parameters that see 512 or 4096 bytes, batches of 32,768 bytes, any text
file (packed as .xz or .gz or not); the last 5 % are held out. Recall: multi-query associative recall, 8 pairs in 64
tokens, 512 different ones, models of two layers and 64 channels, fresh sequences in each step. Images: Fashion-MNIST.

Phases: `time` measures training steps and inference of each pair of models in turn, in one quiet process; `train`
trains in several processes at once. Writes results/step-times-m2-<device>.csv and .json, and results/train-m2-<device>
.csv and .json with the curves. The exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from harness.m2_cases import Case, Plan, cases
from harness.m2_task import Task, plan_of, train
from harness.pool import LEFT_OUT, describe, run_tasks
from harness.report import read_rows, table, write_csv, write_json
from harness.runs import Run, add_arguments, settle
from harness.steptimes import inference
from harness.timing import Timed, prepare, take_turns
from harness.training import Recipe, Training, times_in_ms

HERE = Path(__file__).resolve().parent
PHASES = ("time", "train")
STEPS = {"text": 1000, "recall": 8000, "images": 1000}
#: Of the larger language models, which would take most of the time.
STEPS_30M = 600
RATES = {"text": [1e-3], "recall": [1e-3, 3e-3, 1e-2], "images": [1e-3]}
TIMES = (
    *("task", "model", "mode", "params", "status", "p20_ms", "p50_ms", "p80_ms", "unit", "throughput", "speedup"),
    *("peak_mb", "repeats", "timer"),
)
#: What tells trainings apart.
KEY = ("task", "model", "seed", "lr")
COLUMNS = ("task", "model", "dim", "depth", "seed", "params", "status", "graph", "lr", "steps", "score", "train_loss")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=None, help="a text file, .xz and .gz are unpacked")
    parser.add_argument("--data", type=Path, default=None, help="folder with the four idx files of Fashion-MNIST")
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=None, help="those that have their data")
    parser.add_argument("--sizes", nargs="+", default=None, help="of the language models")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--steps", type=int, default=None, help=f"{STEPS}, {STEPS_30M} of 30M")
    parser.add_argument("--lr", nargs="+", default=[], metavar="TASK=X,Y", help=f"learning rates; {RATES}")
    parser.add_argument(
        "--resume", action="store_true", help="keep the good trainings of the result files that there are"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models, four steps")
    add_arguments(parser, PHASES, prewarm=0)
    args = parser.parse_args(given)
    settle(args, PHASES, HERE, pilot=args.smoke)
    have = {"text": args.text, "images": args.data, "recall": HERE}
    args.tasks = args.tasks or [task for task in STEPS if have[task]]
    for task in args.tasks:
        if not have[task]:
            parser.error(f"--{'data FOLDER' if task == 'images' else 'text FILE'} is needed for {task}")
    given_rates = (text.split("=") for text in args.lr)
    args.rates = RATES | {task: [float(value) for value in values.split(",")] for task, values in given_rates}
    return args


def inputs_of(plan: Plan, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """What the model sees in the first step of a plan."""
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return model(x)

    with torch.no_grad():
        plan.loss(look, torch.zeros(1, dtype=torch.long, device=device))
    return seen[0]


class M2Run(Run):
    """The phases of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        sizes = set(args.sizes or ())
        self.cases = [c for c in cases(args.smoke) if c.task in args.tasks and (not sizes or c.size in ("", *sizes))]
        super().__init__(args, "m2", ("tasks", "sizes", "seeds", "steps"), {"rates": args.rates})

    def task(self, case: Case, seed: int, lr: float) -> Task:
        args = self.args
        steps = 4 if args.smoke else args.steps or (STEPS_30M if case.size == "30M" else STEPS[case.task])
        options = (args.text, args.data, 64 if args.smoke else None, args.device, (args.jobs, self.cores))
        return Task(case, seed, steps, max(1, steps // 20), lr, *options)

    # ---------------------------------------------------------------- times
    def time_steps(self) -> None:
        rows: list[dict[str, Any]] = []
        left: list[str] = []
        for name in dict.fromkeys(c.name for c in self.cases):
            if self.left <= 0:
                left.append(name)
                continue
            new = self.measure([c for c in self.cases if c.name == name])
            rows += new
            self.count(new)
            write_csv(self.file("step-times", ".csv"), rows, TIMES)
            self.say(name)
            cells = [(f"{r['mode']}, {r['model']}", *(r[k] for k in TIMES[3:])) for r in new]
            print(table(("", *TIMES[3:]), cells), flush=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        write_json(self.file("step-times", ".json"), self.facts | {"left_out": left})

    def measure(self, pair: list[Case]) -> list[dict[str, Any]]:
        """Rows of a training step and of inference for both models."""
        rows: list[dict[str, Any]] = []
        ready: dict[str, list[tuple[dict[str, Any], Timed]]] = {"training": [], "inference": []}
        for case in pair:
            row: dict[str, Any] = dict.fromkeys(TIMES, "") | {"task": case.name, "model": case.model, "status": "ok"}
            found = {mode: row | {"mode": mode, "unit": f"{case.unit[0]}/s"} for mode in ready}
            rows += found.values()
            try:
                model = case.make(self.device, 0)
                for cells in found.values():
                    cells["params"] = sum(p.numel() for p in model.parameters())
                plan = plan_of(self.task(case, 0, 0.0), self.device, 4)
                plan.draw()
                training = Training(model, plan.loss, plan.steps, Recipe(1e-4, 10_000, 10), self.device)
                training.capture()
                if training.peak_mb is not None:
                    state = [v for s in training.optimizer.state.values() for v in s.values()]
                    held = [*model.parameters(), *(v for v in state if isinstance(v, torch.Tensor))]
                    found["training"]["peak_mb"] = round(training.peak_mb + sum(t.nbytes for t in held) / 2**20)
                ready["training"].append((found["training"], training.timed()))
                call = inference(model, inputs_of(plan, model, self.device), False)
                ready["inference"].append((found["inference"], prepare(call, 1, self.device)))
            except Exception as error:
                for cells in found.values():
                    cells["status"] = describe(error)
        for pairs in ready.values():
            times = take_turns([t for _, t in pairs], self.device, self.args.seconds, least=10)
            for (row, _), measured in zip(pairs, times, strict=True):
                row |= times_in_ms(measured)
                units = next(c.unit[1] for c in pair if c.model == row["model"])
                row["throughput"] = round(1e6 * units / measured.p50)
                row["speedup"] = round(pairs[0][0]["p50_ms"] / row["p50_ms"], 3)
        return rows

    # ---------------------------------------------------------------- trainings
    def train(self) -> None:
        seeds, rates = range(self.args.seeds), self.args.rates
        tasks = [self.task(case, seed, lr) for seed in seeds for case in self.cases for lr in rates[case.task]]
        tasks.sort(key=lambda t: (t.seed, len(t.case.size), t.case.task))  # the longest last: a limit costs those alone
        rows, runs, before = self.kept() if self.args.resume else ([], [], [])
        done = {tuple(row[name] for name in KEY) for row in rows}
        tasks = [t for t in tasks if (t.case.name, t.case.model, t.seed, t.lr) not in done]
        self.say(f"{len(tasks)} trainings in {self.args.jobs} processes")
        for task, result in run_tasks(train, tasks, self.args.jobs, self.deadline, patience=600):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
                "task": task.case.name,
                "lr": task.lr,
                "seed": task.seed,
            }
            row |= {name: getattr(task.case, name) for name in ("model", "dim", "depth")}
            row |= {name: value for name, value in result.items() if name in COLUMNS}
            if "curve" in result:
                row["train_loss"] = result["curve"]["train_loss"][-1]
            rows.append(row)
            runs.append({name: row[name] for name in ("task", "model", "seed", "lr")} | result)
            self.count([row])
            self.say(
                f"{len(rows)}/{len(tasks)} {row['task']}, {row['model']}: {self.words(row | result, str(row['score']))}"
            )
            for some in (rows, runs):
                some.sort(key=lambda r: (r["task"], r["model"], r["seed"], r["lr"]))
            left = [f"{r['task']}, {r['model']}" for r in rows if LEFT_OUT in r["status"]]
            self.save_trainings(
                rows, COLUMNS, {"runs": runs, "left_out": left} | ({"before": before} if before else {})
            )

    def kept(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows and curves of the trainings before that ended well, and what there is to say of their runs."""
        path = self.file("train", ".json")
        if not path.exists():
            return [], [], []
        facts = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in read_rows(path.with_suffix(".csv")) if row["status"] == "ok"]
        runs = [run for run in facts["runs"] if run["status"] == "ok"]
        said = {name: facts.get(name) for name in ("commit", "sources", "date", "device", "torch", "triton")}
        return rows, runs, [*facts.get("before", []), said | {"trainings": len(rows)}]


def main(given: list[str] | None = None) -> int:
    run = M2Run(arguments(given))
    if "time" in run.args.phases:
        run.time_steps()
    if "train" in run.args.phases:
        run.train()
    run.say(f"done, {run.failed} failed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
