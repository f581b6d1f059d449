"""A training of an M2 model or of its rival, in a worker process."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from harness.image_task import accuracy
from harness.images import ImagePlan
from harness.m2_cases import Case, Plan, RecallPlan, images_of, text_of
from harness.text import TextPlan
from harness.training import Recipe, Training, autocast, cpu_threads

DECAY, BETAS, FINAL = 0.1, (0.9, 0.95), 0.1
#: Held-out bytes of a test.
HELD = 2**18


@dataclasses.dataclass(frozen=True)
class Task:
    """A training."""

    case: Case
    seed: int
    steps: int
    every: int  # steps between two tests
    lr: float
    text: Path | None
    data: Path | None
    count: int | None  # of images
    device: str
    threads: tuple[int, int]  # processes, cores


def plan_of(task: Task, device: torch.device, steps: int) -> Plan:
    """The batches of so many steps; of images those of an epoch."""
    case = task.case
    if case.task == "recall":
        return RecallPlan(case.batch, case.length, steps, task.seed, device)
    if case.task == "images":
        assert task.data is not None
        return ImagePlan(images_of(task.data, task.count, device)[0], case.batch, task.seed)
    assert task.text is not None
    return TextPlan(text_of(case, task.text, max(1, HELD // case.length), device), case.batch, steps, task.seed)


def train(task: Task) -> dict[str, Any]:
    """Train a model; the result has its curve: bits per byte of held-out text, or accuracy in percent."""
    device, case = torch.device(task.device), task.case
    if device.type == "cuda" or task.threads[0]:
        cpu_threads(*task.threads)
    start = time.time()
    model = case.make(device, task.seed)
    plan = plan_of(task, device, task.every)
    steps, every = (
        (task.steps, task.every) if case.task != "images" else (task.steps // plan.steps * plan.steps, plan.steps)
    )
    steps = max(steps, every)
    recipe = Recipe(task.lr, steps, max(1, steps // 10), DECAY, BETAS, FINAL)
    training = Training(model, plan.loss, plan.steps, recipe, device)
    training.capture()
    curve: dict[str, list[float]] = {"steps": [], "train_loss": [], "score": []}
    for done in range(0, steps, every):
        plan.draw()
        for _ in range(min(every, steps - done)):
            training()
        curve["steps"].append(min(done + every, steps))
        curve["train_loss"].append(round(training.mean_loss(), 4))
        curve["score"].append(round(score(task, training, device), 4))
    result: dict[str, Any] = {"status": "ok", "graph": training.graph is not None, "curve": curve, "steps": steps}
    result |= {"params": sum(p.numel() for p in model.parameters()), "why_no_graph": training.why_no_graph}
    return result | {"score": curve["score"][-1], "seconds": round(time.time() - start, 1)}


def score(task: Task, training: Training, device: torch.device) -> float:
    """Of data that is not trained on: bits per byte of text, accuracy of images and of recall in percent."""
    case, model = task.case, training.model
    if case.task == "text":
        assert task.text is not None
        return text_of(case, task.text, max(1, HELD // case.length), device).bits_per_byte(model, case.batch)
    if case.task == "images":
        assert task.data is not None
        return accuracy(model, images_of(task.data, task.count, device)[1], 1024)
    held = RecallPlan(case.batch, case.length, 8, 10**6 + task.seed, device)
    held.draw()
    model.eval()
    with autocast(device):
        found = held.accuracy(model)
    model.train()
    return found
