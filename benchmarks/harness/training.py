"""Training steps that need nothing from the host, so that a CUDA graph holds a whole one, and their times."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.timing import Timed, Times
from structmat.nn import parameter_groups

#: Steps before a capture, and before memory is measured: kernels are compiled, the optimizer has its state.
WARM_UP = 3
CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a linear warm-up, a cosine to ``final`` of the rate."""

    lr: float
    steps: int
    warmup: int
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    final: float = 0.0
    restart: int | None = None  # a step at which the rate begins anew from 0, to be back after restart_warmup steps
    restart_warmup: int = 0

    def rates(self) -> list[float]:
        """The learning rate of every step."""
        rates = []
        for i in range(self.steps):
            along = max(0.0, (i - self.warmup) / max(1, self.steps - self.warmup))
            share = self.final + (1 - self.final) * (1 + math.cos(math.pi * along)) / 2
            share *= min(1.0, (i + 1) / max(1, self.warmup))
            if self.restart is not None and i >= self.restart:
                share *= min(1.0, (i + 1 - self.restart) / max(1, self.restart_warmup))
            rates.append(self.lr * share)
        return rates


def cpu_threads(jobs: int, cores: int) -> None:
    """Share the cores between the workers."""
    torch.set_num_threads(max(1, cores // max(1, jobs)))


class Training:
    """A model, its optimizer and a step over batches whose choice lies on the device.

    Args:
        model: on the device already.
        loss: called with the model and the number of the step in its plan, a tensor of one element.
        plan: how many steps the plan of batches holds; it is gone through again and again.
        recipe: the optimizer's.
        device: autocast to bfloat16 and graphs are used on CUDA only.
        run: what is called in the model's place, such as its compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Callable[..., Tensor], Tensor], Tensor],
        plan: int,
        recipe: Recipe,
        device: torch.device,
        run: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.loss, self.plan, self.recipe, self.device = model, loss, plan, recipe, device
        self.run = model if run is None else run
        self.gpu = device.type == "cuda"
        self.schedule = torch.tensor(recipe.rates(), device=device)
        self.rate = torch.zeros((), device=device)
        self.done = torch.zeros(1, dtype=torch.long, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        options: dict[str, Any] = {"fused": True, "capturable": True} if self.gpu else {"foreach": False}
        groups = parameter_groups(model, recipe.decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=recipe.betas, **options)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why_no_graph: str | None = None
        self.peak_mb: float | None = None
        self.marked = 0

    # ---------------------------------------------------------------- steps
    def step(self) -> None:
        """One step, in eager mode or under capture."""
        self.rate.copy_(self.schedule.index_select(0, self.done.clamp(max=len(self.schedule) - 1)).squeeze(0))
        with autocast(self.device):
            loss = self.loss(self.run, self.done % self.plan)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=self.gpu)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.total += loss.detach()
        self.done += 1

    def __call__(self) -> None:
        """One step, replayed if it was captured."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def mean_loss(self) -> float:
        """The mean loss since the last call."""
        done = int(self.done)
        value, self.marked = self.total.item() / max(1, done - self.marked), done
        self.total.zero_()
        return value

    # ---------------------------------------------------------------- capture
    def capture(self) -> None:
        """Warm up, capture a step, and put parameters, the optimizer's state and counters back as they were.

        On a CPU nothing is done. Where a capture fails, steps stay eager and ``why_no_graph`` says why.
        """
        self.graph = None
        if not self.gpu:
            self.why_no_graph = "no GPU"
            return
        saved = self._save()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(WARM_UP):
                if i == WARM_UP - 1:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                self.step()
            torch.cuda.synchronize()
            self.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step()
            self.graph = graph
        except Exception as error:
            self.why_no_graph = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self._restore(saved)

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), self.rate, self.done, self.total]

    def _save(self) -> tuple[list[Tensor], dict[Any, dict[str, Any]]]:
        state = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            for p, values in self.optimizer.state.items()
        }
        return [t.detach().clone() for t in self._tensors()], state

    @torch.no_grad()
    def _restore(self, saved: tuple[list[Tensor], dict[Any, dict[str, Any]]]) -> None:
        """In place, because a graph knows the memory; state that was not there yet begins at zero."""
        for tensor, old in zip(self._tensors(), saved[0], strict=True):
            tensor.copy_(old)
        for p, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    value.copy_(saved[1][p][name]) if p in saved[1] else value.zero_()

    # ---------------------------------------------------------------- time
    def timed(self, once: int = 3) -> Timed:
        """Ready for :func:`harness.timing.take_turns`."""
        us = _estimate(self, self.device, once)
        return Timed(self, 1, "graph" if self.graph else "eager" if self.gpu else "host clock", us)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on CUDA; float32 stays on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def _estimate(call: Callable[[], object], device: torch.device, calls: int) -> float:
    for timing in (False, True):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls if timing else 1):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - start) / calls


def times_in_ms(times: Times) -> dict[str, Any]:
    """Cells of a row."""
    cells: dict[str, Any] = {f"p{q}_ms": round(getattr(times, f"p{q}") / 1e3, 4) for q in (20, 50, 80)}
    return cells | {"repeats": times.repeats, "timer": times.timer}


def first_reaching(curve: Sequence[float], wanted: float) -> int | None:
    """The number, from 1, of the first value that is at least the one wanted."""
    return next((i for i, value in enumerate(curve, start=1) if value >= wanted), None)
