"""Networks with one hidden layer, dense or of low displacement rank: how they are made, and a training of one."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.ldr_data import CLASSES, Flat, Plan, held_out, load, made_up
from harness.timing import Timed
from harness.training import Recipe, Training, cpu_threads
from structmat.nn import CirculantLinear, FastfoodLinear, LDRLinear, LowRankLinear, ToeplitzLinear

DECAY = 0.01


def _ldr(kind: str, rank: int) -> Callable[[int], nn.Module]:
    return lambda n: LDRLinear(n, n, kind=kind, rank=rank)


def _vandermonde(n: int) -> nn.Module:
    layer = LDRLinear(n, n, kind="vandermonde", rank=4)
    layer.weight.get_parameter("A.diag").requires_grad_(False)
    return layer


#: Names in words with the hidden layers, of n inputs. Ranks are those that give 8 n learned numbers, as LDR-TD has at
#: rank 1; the nodes of Vandermonde-like matrices are not learned.
STRUCTURES: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "dense": ("dense", lambda n: nn.Linear(n, n)),
    "small": ("dense, 8 hidden units", lambda n: nn.Linear(n, 8)),
    "lowrank": ("low rank, r = 4", lambda n: LowRankLinear(n, n, rank=4)),
    "circulant": ("circulant", lambda n: CirculantLinear(n, n)),
    "fastfood": ("Fastfood", lambda n: FastfoodLinear(n, n, pad=True)),
    "toeplitz": ("Toeplitz", lambda n: ToeplitzLinear(n, n)),
    "toeplitz-like": ("Toeplitz-like, r = 4", _ldr("toeplitz", 4)),
    "hankel-like": ("Hankel-like, r = 4", _ldr("hankel", 4)),
    "vandermonde-like": ("Vandermonde-like, r = 4", _vandermonde),
    "ldr-sd": ("LDR-SD, r = 3", _ldr("subdiagonal", 3)),
    "ldr-td": ("LDR-TD, r = 1", _ldr("tridiagonal", 1)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A training; ``held``: on training images alone, of which a sixth is scored."""

    data: str
    structure: str
    rate: float
    seed: int
    epochs: int
    held: bool
    folder: Path
    count: int | None
    side: int
    batch: int
    device: str
    threads: tuple[int, int]  # processes, cores


def build(structure: str, side: int, seed: int, device: torch.device) -> tuple[nn.Module, dict[str, int]]:
    """A network from a seed, its weights the same on every device, and its learned parameters."""
    torch.manual_seed(seed)
    hidden: Any = STRUCTURES[structure][1](side * side)
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden.out_features, CLASSES))
    weights = sum(p.numel() for name, p in hidden.named_parameters() if name != "bias" and p.requires_grad)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model.to(device), {"layer_params": weights, "params": params}


_loaded: dict[tuple, tuple[Flat, Flat]] = {}


def _data(task: Task, device: torch.device) -> tuple[Flat, Flat]:
    """What to train on and what to score; a process keeps what it has seen."""
    key = task.folder, task.data, task.count, task.side, task.device, task.held
    if key not in _loaded:
        train, test = load(task.folder, task.data, device, task.count, task.side)
        _loaded[key] = held_out(train) if task.held else (train, test)
    return _loaded[key]


def train(task: Task) -> dict[str, Any]:
    """Train a network and score it once, after the last epoch."""
    device = torch.device(task.device)
    if device.type == "cuda" or task.threads[0]:
        cpu_threads(*task.threads)
    torch.set_float32_matmul_precision("highest")
    images, scored = _data(task, device)
    start = time.time()
    model, counts = build(task.structure, task.side, task.seed, device)
    plan = Plan(images, task.batch, task.seed)
    steps = task.epochs * plan.steps
    training = Training(model, plan.loss, plan.steps, Recipe(task.rate, steps, steps // 5, DECAY), device)
    plan.draw()
    training.capture()
    losses = []
    for epoch in range(task.epochs):
        if epoch:
            plan.draw()
        for _ in range(plan.steps):
            training()
        losses.append(training.mean_loss())
    result: dict[str, Any] = {"status": "ok", "accuracy": round(accuracy(model, scored), 2), **counts}
    result["train_loss"] = round(losses[-1], 4) if math.isfinite(losses[-1]) else None
    result |= {"graph": training.graph is not None, "why_no_graph": training.why_no_graph}
    return result | {"seconds": round(time.time() - start, 1)}


@torch.no_grad()
def accuracy(model: nn.Module, data: Flat) -> float:
    """In percent."""
    pairs = zip(data.x.split(2000), data.y.split(2000), strict=True)
    right = sum((model(x).argmax(-1) == y).sum() for x, y in pairs)
    return 100 * float(right) / len(data)


def timed_step(structure: str, side: int, batch: int, device: torch.device) -> tuple[Timed, dict[str, Any]]:
    """A captured step on made-up data, ready to be timed, and what there is to say of it."""
    torch.set_float32_matmul_precision("highest")
    model, facts = build(structure, side, 0, device)
    plan = Plan(made_up(side, 4 * batch, device), batch, 0)
    plan.draw()
    training = Training(model, plan.loss, plan.steps, Recipe(1e-4, 10_000, 10, DECAY), device)
    training.capture()
    return training.timed(), {**facts, "graph": training.graph is not None}
