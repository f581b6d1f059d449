"""A training on text, in a worker process."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from harness.models import Size, build
from harness.text import Text, TextPlan, loss_of, read_bytes
from harness.training import Recipe, Training, cpu_threads
from structmat.nn import parameter_groups
from structmat.surgery import carry_optimizer, densify_

#: Name, structure, and whether it becomes dense after half of the steps.
VARIANTS = {
    "dense": ("dense", False),
    "monarch": ("monarch", False),
    "monarch, then dense": ("monarch", True),
    "pixelfly": ("pixelfly", False),
    "lowrank": ("lowrank", False),
}
DECAY, BETAS, FINAL = 0.1, (0.9, 0.95), 0.1


@dataclasses.dataclass(frozen=True)
class Task:
    """A training; of no steps, only the compilation of its kernels."""

    variant: str
    size: Size
    ratio: float
    seed: int
    steps: int
    every: int
    held: int
    lr: float
    text: Path
    device: str
    threads: tuple[int, int]  # processes, cores


def train(task: Task) -> dict[str, Any]:
    """Train a model; the result has its curve."""
    device = torch.device(task.device)
    if device.type == "cuda" or task.threads[0]:
        cpu_threads(*task.threads)
    structure, densify = VARIANTS[task.variant]
    text = Text(read_bytes(task.text), task.size.context, task.held, device)
    start = time.time()
    model, facts = build(task.size, structure, task.ratio if structure != "dense" else 1.0, task.seed, device)
    plan = TextPlan(text, task.size.batch, task.every, task.seed)
    half = task.steps // 2 // task.every * task.every if densify else None
    warmup = min(100, max(1, task.steps // 10))
    recipe = Recipe(task.lr, max(1, task.steps), warmup, DECAY, BETAS, FINAL, half, warmup // 2)
    training = Training(model, plan.loss, plan.steps, recipe, device)
    if not task.steps:
        plan.draw()
        for _ in range(2):
            training()
        with torch.no_grad():
            model.bfloat16()(plan.windows(training.done.clamp(max=0))[:, :-1])
        return {"status": "ok"}
    training.capture()
    graphs = [training.graph is not None]
    result: dict[str, Any] = {name: facts[name] for name in ("share", "params", "layer_params", "layers")}
    curve: dict[str, list[float]] = {
        "steps": [0],
        "train_bits": [],
        "bits_per_byte": [round(text.bits_per_byte(model, task.size.batch), 4)],
    }
    for done in range(0, task.steps, task.every):
        if done == half:
            result |= _densify(training, text, task.size.batch)
            graphs.append(training.graph is not None)
        plan.draw()
        for _ in range(min(task.every, task.steps - done)):
            training()
        curve["steps"].append(min(done + task.every, task.steps))
        curve["train_bits"].append(round(training.mean_loss() / math.log(2), 4))
        curve["bits_per_byte"].append(round(text.bits_per_byte(model, task.size.batch), 4))
    result |= {"status": "ok", "graph": all(graphs), "why_no_graph": training.why_no_graph, "curve": curve}
    result |= {"final_params": sum(p.numel() for p in model.parameters()), "seconds": round(time.time() - start, 1)}
    result |= {"half": half, "tokens": task.steps * task.size.batch * task.size.context}
    return result


def _densify(training: Training, text: Text, batch: int) -> dict[str, Any]:
    """Go over to dense weights; the loss of a batch of held-out windows in float32 right before and right after."""
    model, windows = training.model, text.windows(text.held[:batch])

    @torch.no_grad()
    def loss() -> float:
        return loss_of(model, windows).item()

    before = loss()
    with carry_optimizer(model, training.optimizer):
        densify_(model)
    # Factors are trained without decay, dense weights with it: they go to the group that the dense model has them in.
    fresh = parameter_groups(model, training.recipe.decay)
    for group, new in zip(training.optimizer.param_groups, fresh, strict=True):
        group["params"] = new["params"]
    after = loss()
    training.capture()
    return {"loss_before": before, "loss_after": after}
