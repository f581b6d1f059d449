"""A training on images, in a worker process."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from harness.images import ImagePlan, Images, load
from harness.models import Size, build
from harness.steptimes import PLAN, image_data
from harness.training import Recipe, Training, autocast, cpu_threads


@dataclasses.dataclass(frozen=True)
class Task:
    """A training; of no epochs, only the compilation of its kernels."""

    model: str
    size: Size
    structure: str
    ratio: float
    seed: int
    epochs: int
    lr: float
    data: Path | None
    count: int | None
    pilot: bool
    device: str
    threads: tuple[int, int]  # processes, cores


_loaded: dict[tuple, tuple[Images, Images]] = {}


def train(task: Task) -> dict[str, Any]:
    """Train a model; the result has its curves."""
    device = torch.device(task.device)
    if device.type == "cuda" or task.threads[0]:
        cpu_threads(*task.threads)
    if not task.epochs:
        return _compile_kernels(task, device)
    key = task.data, task.count, task.pilot, task.device
    if key not in _loaded:
        assert task.data is not None
        _loaded[key] = load(task.data, device, task.count, task.pilot)
    images, test = _loaded[key]
    start = time.time()
    model, facts = build(task.size, task.structure, task.ratio, task.seed, device)
    plan = ImagePlan(images, task.size.batch, task.seed)
    steps = task.epochs * plan.steps
    recipe = Recipe(task.lr, steps, warmup=min(plan.steps, steps // 5))
    training = Training(model, plan.loss, plan.steps, recipe, device)
    training.capture()
    curve: dict[str, list[float]] = {"train_loss": [], "accuracy": []}
    for _ in range(task.epochs):
        plan.draw()
        for _ in range(plan.steps):
            training()
        curve["train_loss"].append(round(training.mean_loss(), 4))
        curve["accuracy"].append(round(accuracy(model, test, 1024), 2))
    result: dict[str, Any] = {name: facts[name] for name in ("share", "params", "layer_params", "layers")}
    result |= {"status": "ok", "graph": training.graph is not None, "why_no_graph": training.why_no_graph}
    result |= {"steps_per_epoch": plan.steps, "seconds": round(time.time() - start, 1), "curve": curve}
    return result


def _compile_kernels(task: Task, device: torch.device) -> dict[str, Any]:
    x, loss = image_data(task.size, device)
    model, _ = build(task.size, task.structure, task.ratio, 0, device)
    training = Training(model, loss, PLAN, Recipe(1e-4, 8, 2), device)
    for _ in range(2):
        training()
    with torch.no_grad():
        model.bfloat16()(x.bfloat16())
    return {"status": "ok"}


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Images, batch: int) -> float:
    """In percent."""
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=images.device)
    for chosen in torch.arange(len(images), device=images.device).split(batch):
        x, y = images.take(chosen)
        with autocast(images.device):
            right += (model(x).argmax(-1) == y).sum()
    model.train()
    return 100 * right.item() / len(images)
