"""Train MLP-Mixer and ViT on Fashion-MNIST, dense and with structured weights of 1/2, 1/4 and 1/8 of the parameters.

    python benchmarks/train_images.py --data FOLDER                       # everything, about ten minutes on an H100
    python benchmarks/train_images.py --phases time wide                  # only the times of steps, no data needed
    python benchmarks/train_images.py --data FOLDER --phases train        # only the trainings
    python benchmarks/train_images.py --data FOLDER --smoke --device cpu  # tiny: only that it runs

Phases: `prewarm` compiles kernels in many processes at once; `time` measures the steps of all variants in one quiet
process, `wide` those of wide Mixers on made-up data; `pilot` trains the dense models at several rates on half of the
training images, and the one that does best on the other half is the rate of all structures; `train` trains in several
processes at once, seed by seed, so that a time limit costs whole seeds. Test images are seen after every epoch,
and nothing is chosen by them: the accuracy of a run is that after its last epoch.

Writes results/train-images-<device>.csv and .json (trainings, with their curves) and results/step-times-images-<device>
.csv and .json, after every training and every model. The exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

from harness.image_task import Task, train
from harness.models import Size
from harness.pool import LEFT_OUT, run_tasks
from harness.report import table
from harness.results import IMAGES, cells, quiet, summarise_images
from harness.runs import Run, add_arguments, settle
from harness.steptimes import image_data, measure, times_table
from harness.structures import STRUCTURES

HERE = Path(__file__).resolve().parent
PHASES = ("prewarm", "time", "wide", "pilot", "train")
COLUMNS = (
    *("model", "structure", "ratio", "share", "params", "layer_params", "seed", "status", "graph", "lr", "epochs"),
    *("accuracy", "train_loss", "seconds"),
)
MODELS = {
    "Mixer": Size("mixer", dim=256, depth=4, batch=512),
    "ViT": Size("vit", dim=256, depth=4, batch=512),
}
WIDE = {f"Mixer {dim}": Size("mixer", dim=dim, depth=2, batch=128, image=32) for dim in (1024, 2048)}
SMOKE = {
    "Mixer": Size("mixer", dim=64, depth=1, batch=32),
    "ViT": Size("vit", dim=64, depth=1, batch=32),
}
SMOKE_WIDE = {"Mixer 128": Size("mixer", dim=128, depth=1, batch=2, image=32)}
#: That of a model without a pilot, and those of pilots. The papers of Monarch and Pixelfly train their models with the
#: dense ones' rates; so do we.
LR, RATES = 1e-3, (5e-4, 1e-3, 2e-3, 4e-3)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the four idx files, gzipped or not")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", nargs="+", default=[], metavar="X or MODEL=X", help=f"learning rates; {LR}")
    parser.add_argument("--depth", type=int, help="of the models")
    parser.add_argument("--batch", type=int, help="images in a batch")
    parser.add_argument("--patch", type=int, help="side of a patch")
    parser.add_argument("--count", type=int, help="only so many training and test images")
    parser.add_argument("--smoke", action="store_true", help="tiny models, 512 images, one epoch")
    add_arguments(parser, PHASES, prewarm=12)
    args = parser.parse_args(given)
    settle(args, PHASES, HERE, pilot=args.smoke or args.count is not None)
    if {"pilot", "train"} & set(args.phases) and args.data is None:
        parser.error("--data FOLDER is needed to train")
    if args.smoke:
        args.count, args.epochs = args.count or 512, min(args.epochs, 2)
    args.rates = rates(args.lr, parser)
    return args


def rates(given: list[str], parser: argparse.ArgumentParser) -> dict[str, float]:
    """The learning rate of every model."""
    found: dict[str, float] = dict.fromkeys(MODELS, LR)
    for text in given:
        name, _, value = text.rpartition("=")
        if name and name not in found:
            parser.error(f"--lr: {name!r} is not one of {', '.join(MODELS)}")
        found.update({name: float(value)} if name else dict.fromkeys(found, float(value)))
    return found


def sizes(args: argparse.Namespace) -> dict[str, Size]:
    """The models that are trained."""
    changes = {name: getattr(args, name) for name in ("depth", "batch", "patch") if getattr(args, name)}
    every = SMOKE if args.smoke else MODELS
    return {name: dataclasses.replace(every[name], **changes) for name in args.models}


def variants(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Structures with their ratios, dense first."""
    found = [("dense", 1.0)] if "dense" in args.structures else []
    return found + [(s, r) for s in args.structures if s != "dense" for r in args.ratios]


# -------------------------------------------------------------------- phases
class ImagesRun(Run):
    """The phases of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        facts = {"sizes": {name: dataclasses.asdict(size) for name, size in sizes(args).items()}, "rates": args.rates}
        super().__init__(args, "images", ("models", "structures", "ratios", "seeds", "epochs", "count"), facts)

    def tasks(self, epochs: int) -> list[Task]:
        jobs = self.args.jobs if epochs else self.args.prewarm
        options = (self.args.data, self.args.count, False, self.args.device, (jobs, self.cores))
        return [
            Task(name, size, structure, ratio, seed, epochs, self.args.rates[name], *options)
            for seed in range(self.args.seeds if epochs else 1)
            for name, size in sizes(self.args).items()
            for structure, ratio in variants(self.args)
        ]

    # ---------------------------------------------------------------- kernels
    def prewarm(self) -> None:
        tasks = self.tasks(0)
        if "wide" in self.args.phases:
            first = [t for t in tasks if t.model == self.args.models[0] and t.ratio != 0.5]
            tasks += [dataclasses.replace(t, size=size) for size in WIDE.values() for t in first]
        results = run_tasks(train, tasks, self.args.prewarm, time.time() + self.left / 3)
        failed = [f"{t.model} {t.structure} {t.ratio}: {r['status']}" for t, r in results if r["status"] != "ok"]
        self.say("\n  ".join([f"kernels of {len(tasks)} models compiled, {len(failed)} failed", *failed]))

    # ---------------------------------------------------------------- times
    def time_steps(self) -> None:
        rows: list[dict[str, Any]] = []
        left: list[str] = []
        models = sizes(self.args) if "time" in self.args.phases else {}
        wide = (SMOKE_WIDE if self.args.smoke else WIDE) if "wide" in self.args.phases else {}
        facts = {"left_out": left, "wide": {n: dataclasses.asdict(s) for n, s in wide.items()}}
        for name, size in (models | wide).items():
            if self.left <= 0:
                left.append(name)
                self.say(f"{name}: {LEFT_OUT}")
                continue
            plain = [v for v in variants(self.args) if name in models or v[1] != 0.5]
            compiled = [v for v in plain if self.args.compile == "all" or v[0] == self.args.compile]
            cases = [(*v, False) for v in plain] + [(*v, True) for v in compiled]
            data = functools.partial(image_data, size, self.device)
            new = measure(name, size, cases, data, self.device, self.args.seconds, ("images", size.batch))
            rows += new
            self.count(new)
            self.save_times(rows, facts)
            self.say(f"{name}, batches of {size.batch}")
            print(times_table(new), flush=True)
        self.save_times(rows, facts)

    # ---------------------------------------------------------------- trainings
    def pilot(self) -> None:
        """Take the rate of every model at which the dense one does best on training images that are held out."""
        epochs = self.epochs()
        options = (self.args.data, self.args.count, True, self.args.device, (self.args.jobs, self.cores))
        models = sizes(self.args).items()
        tasks = [Task(name, size, "dense", 1.0, 0, epochs, lr, *options) for name, size in models for lr in RATES]
        rows: list[dict[str, Any]] = []
        for task, result in run_tasks(train, tasks, self.args.jobs, self.deadline):
            row = {"model": task.model, "lr": task.lr, "epochs": epochs, "status": result["status"], "accuracy": None}
            rows.append(row | ({"accuracy": result["curve"]["accuracy"][-1]} if "curve" in result else {}))
        self.count(rows)
        rows.sort(key=lambda r: (list(MODELS).index(r["model"]), r["lr"]))
        self.facts["pilot"] = rows
        for row in sorted((r for r in rows if r["accuracy"] is not None), key=lambda r: r["accuracy"]):
            self.args.rates[row["model"]] = row["lr"]  # the best comes last
        self.say(f"pilots of {epochs} epochs with dense models, learning rates {self.args.rates}")
        print(table(("model", "lr", "% of held-out images"), [(r["model"], r["lr"], r["accuracy"]) for r in rows]))

    def epochs(self) -> int:
        """As asked for, or fewer where the quiet times say that they would not fit."""
        times, images = quiet(self.times()), min(self.args.count or 60_000, 60_000)
        keys = [((t.model, t.structure, t.ratio), images // t.size.batch) for t in self.tasks(1)]
        one = sum(times[key]["p50_ms"] / 1e3 * steps for key, steps in keys if key in times)
        if one:
            self.say(f"an epoch of all trainings takes {one:.1f} s of steps, {self.args.epochs} epochs are asked for")
        return max(1, min(self.args.epochs, int(self.args.fit / one))) if one and self.args.fit else self.args.epochs

    def train(self) -> None:
        epochs = self.epochs()
        tasks = self.tasks(epochs)
        order = {(t.model, t.structure, t.ratio, t.seed): i for i, t in enumerate(tasks)}
        rows: list[dict[str, Any]] = []
        runs: list[dict[str, Any]] = []
        self.say(f"{len(tasks)} trainings of {epochs} epochs in {self.args.jobs} processes")
        for task, result in run_tasks(train, tasks, self.args.jobs, self.deadline):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {name: getattr(task, name) for name in ("model", "structure", "ratio", "seed", "epochs", "lr")}
            row |= {name: value for name, value in result.items() if name in COLUMNS}
            if "curve" in result:
                row |= {name: result["curve"][name][-1] for name in ("accuracy", "train_loss")}
            rows.append(row)
            runs.append({name: row[name] for name in ("model", "structure", "ratio", "seed")} | result)
            self.count([row])
            name = f"{task.model} {task.structure} {task.ratio:g} seed {task.seed}"
            words = self.words(row | result, f"{row['accuracy']} %")
            self.say(f"{len(rows)}/{len(tasks)} {name}: {words}")
            for some in (rows, runs):
                some.sort(key=lambda r: order[r["model"], r["structure"], r["ratio"], r["seed"]])
            left = [
                f"{r['model']} {r['structure']} {r['ratio']:g} {r['seed']}" for r in rows if LEFT_OUT in r["status"]
            ]
            facts = {"epochs": epochs, "runs": runs, "left_out": left}
            facts["complete"] = len(rows) == len(tasks) and not left
            facts["summary"] = summarise_images(facts, self.times())
            self.save_trainings(rows, COLUMNS, facts)
        print(table(IMAGES, cells(summarise_images({"runs": runs}, self.times()), IMAGES)))


def main(given: list[str] | None = None) -> int:
    run = ImagesRun(arguments(given))
    if "prewarm" in run.args.phases:
        run.prewarm()
    if {"time", "wide"} & set(run.args.phases):
        run.time_steps()
    if "pilot" in run.args.phases:
        run.pilot()
    if "train" in run.args.phases:
        run.train()
    run.say(f"done, {run.failed} failed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
