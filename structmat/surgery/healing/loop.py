"""The steps of healing: from a batch to new weights, and what is kept along the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm

from structmat.surgery.healing.feed import Feed, random_state, set_random_state
from structmat.surgery.healing.report import HealReport
from structmat.surgery.healing.weights import State, Weights, rate

_KEEP = 50  # steps from one copy of the weights to the next, to go back to after a NaN


@dataclass(frozen=True)
class Settings:
    """The numbers of a run."""

    steps: int
    lr: float
    warmup: int
    clip: float | None
    accumulate: int
    validate_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("clip", 1.0 if self.clip is None else self.clip)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup must be at most steps, {self.steps}, got {self.warmup}")

    def decisive(self) -> dict[str, Any]:
        """Those on which the result depends."""
        values = dataclasses.asdict(self)
        del values["checkpoint_every"]
        return values


class Diverged(ValueError):
    """A loss or a gradient is NaN or infinite."""


class Method(Protocol):
    """What makes gradients."""

    device: torch.device

    def backward(self, batch: Any, scale: float) -> float:
        """Add ``scale`` times the gradient of a batch's loss; return the loss."""
        ...


class Run:
    """A run from its first step, or from a checkpoint.

    Args:
        mode: for the report.
        settings: its numbers.
        weights: what is trained.
        method: makes gradients.
        feed: gives batches.
        judge: the validation, or None.
        save: writes a checkpoint, or None.
    """

    def __init__(
        self,
        mode: str,
        settings: Settings,
        weights: Weights,
        method: Method,
        feed: Feed,
        judge: Callable[[], float] | None,
        save: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.mode, self.settings, self.weights, self.method, self.feed = mode, settings, weights, method, feed
        self.judge, self.save = judge, save
        self.parameters = list(weights.masters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate(step, settings.steps, settings.warmup)
        )
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.best: tuple[int, State] = (0, {})

    # ---------------------------------------------------------------- the whole
    def go(self, progress: bool | None) -> HealReport:
        """Do the steps that are left."""
        settings, begun = self.settings, time.perf_counter() - self.seconds
        if not self.losses:
            self._look(0)
        hidden = None if progress is None else not progress
        with tqdm(total=settings.steps, initial=len(self.losses), desc="healing", disable=hidden) as bar:
            while len(self.losses) < settings.steps:
                self.losses.append(self._step(len(self.losses)))
                done = len(self.losses)
                bar.set_postfix(loss=f"{self.losses[-1]:.4g}", refresh=False)
                bar.update()
                self._look(done)
                self.seconds = time.perf_counter() - begun
                if self.save and (done % settings.checkpoint_every == 0 or done == settings.steps):
                    self.save(self.state())
        step = settings.steps
        if self.judge:
            step, state = self.best
            self.weights.load(state)
        layers = dict(getattr(self.method, "errors", {}))
        validations = tuple(self.validations)
        return HealReport(self.mode, tuple(self.losses), self.seconds, self.weights.count, validations, step, layers)

    def _step(self, step: int) -> float:
        settings, total = self.settings, 0.0
        self.optimizer.zero_grad()
        for _ in range(settings.accumulate):
            try:
                batch = self.feed.next()
            except ValueError as error:
                raise ValueError(
                    f"{error}: {step} of {settings.steps} steps were done, and the weights are what these made of "
                    "them. Give a list, a DataLoader or a function that returns an iterator for each round"
                ) from None
            loss = self.method.backward(batch, 1 / settings.accumulate)
            if not math.isfinite(loss):
                self._broken(step, "loss", loss)
            total += loss / settings.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip or math.inf).item()
        if not math.isfinite(norm):
            self._broken(step, "gradients' norm", norm)
        self.optimizer.step()
        self.scheduler.step()
        self.weights.publish()
        return total

    def _broken(self, step: int, what: str, value: float) -> None:
        back, state = self.best
        self.weights.load(state)
        raise Diverged(
            f"step {step}: the {what} is {value}; the weights are again those after {back} steps. Look for NaN or "
            "infinite numbers in the batch, or lower lr"
        )

    def _look(self, done: int) -> None:
        """Validate, or else keep a copy of the weights every so often."""
        if self.judge is None:
            if done % _KEEP == 0:
                self.best = (done, self.weights.state())
        elif done % self.settings.validate_every == 0 or done == self.settings.steps:
            value = self.judge()
            smallest = min((v for _, v in self.validations if not math.isnan(v)), default=math.inf)
            self.validations.append((done, value))
            if value < smallest or done == 0:
                self.best = (done, self.weights.state())

    # ---------------------------------------------------------------- to a file and back
    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "weights": self.weights.state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "feed": self.feed.state(),
            "random": random_state(self.method.device),
            "losses": self.losses,
            "validations": self.validations,
            "seconds": self.seconds,
            "best": self.best,
            "layers": getattr(self.method, "errors", {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.feed.restore(state["feed"])
        self.weights.load(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.losses, self.validations = list(state["losses"]), [(s, v) for s, v in state["validations"]]
        self.seconds, self.best = state["seconds"], (state["best"][0], state["best"][1])
        if hasattr(self.method, "errors"):
            self.method.errors.update(state["layers"])  # pyright: ignore[reportAttributeAccessIssue]
        set_random_state(state["random"], self.method.device)
