"""Quiet times of training steps and of inference: all variants of a model in one process, in turn."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.images import ImagePlan, made_up
from harness.models import Size, build
from harness.pool import describe
from harness.report import table
from harness.timing import Timed, prepare, take_turns
from harness.training import Recipe, Training, times_in_ms

COLUMNS = (
    *("model", "mode", "compiled", "structure", "ratio", "share", "params", "layer_params", "status", "graph"),
    *("p20_ms", "p50_ms", "p80_ms", "unit", "throughput", "speedup", "speedup_compiled", "peak_mb", "repeats", "timer"),
)
Case = tuple[str, float, bool]  # structure, ratio, compiled
#: How many steps a plan of made-up batches holds.
PLAN = 4


def measure(
    name: str,
    size: Size,
    cases: Iterable[Case],
    data: Callable[[], tuple[Tensor, Callable[..., Tensor]]],
    device: torch.device,
    seconds: float,
    units: tuple[str, int],
) -> list[dict[str, Any]]:
    """A row for training and one for inference of every case; what fails says so in ``status``.

    Args:
        name: of the model.
        size: of the model.
        cases: structure, ratio, whether to torch.compile the model.
        data: gives the input of an inference and the loss for :class:`Training` with plans of ``PLAN`` steps.
        device: where.
        seconds: for the repeats of each mode.
        units: of the throughput, and how many are in a batch.
    """
    rows = _measure(name, size, cases, data, device, seconds, units)
    gc.collect()  # what the graphs held
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _measure(
    name: str,
    size: Size,
    cases: Iterable[Case],
    data: Callable[[], tuple[Tensor, Callable[..., Tensor]]],
    device: torch.device,
    seconds: float,
    units: tuple[str, int],
) -> list[dict[str, Any]]:
    recipe = Recipe(1e-4, 10_000, 10)
    rows: list[dict[str, Any]] = []
    ready: dict[str, list[tuple[dict[str, Any], Timed]]] = {"training": [], "inference": []}
    for structure, ratio, compiled in cases:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"model": name, "compiled": compiled, "structure": structure, "ratio": ratio, "unit": f"{units[0]}/s"}
        kept: dict[str, dict[str, Any]] = {mode: row | {"mode": mode, "status": "ok"} for mode in ready}
        rows += kept.values()
        try:
            model, facts = build(size, structure, ratio, 0, device)
            for cells in kept.values():
                cells |= {k: facts[k] for k in ("share", "params", "layer_params")}
            x, loss = data()
            training = Training(model, loss, PLAN, recipe, device, _compiled(model) if compiled else None)
            training.capture()
            if device.type != "cuda":
                training()
            elif training.peak_mb is not None:
                state = sum(t.numel() * t.element_size() for t in _all_tensors(training))
                kept["training"]["peak_mb"] = round(training.peak_mb + state / 2**20)
            kept["training"]["graph"] = training.graph is not None
            ready["training"].append((kept["training"], training.timed()))
        except Exception as error:
            kept["training"]["status"] = describe(error)
            kept["inference"]["status"] = "error: as in training"
            continue
        try:
            call = inference(model, x, compiled)
            timed = prepare(call, 1, device)
            kept["inference"]["graph"] = timed.timer == "graph"
            ready["inference"].append((kept["inference"], timed))
        except Exception as error:
            kept["inference"]["status"] = describe(error)
    for pairs in ready.values():
        try:
            times = take_turns([t for _, t in pairs], device, seconds, least=10)
        except Exception as error:
            for row, _ in pairs:
                row["status"] = describe(error)
            continue
        for (row, _), found in zip(pairs, times, strict=True):
            row |= times_in_ms(found)
            row["throughput"] = round(1e6 * units[1] / found.p50)
        for compiled, column in ((False, "speedup"), (True, "speedup_compiled")):
            base = [r for r, _ in pairs if r["structure"] == "dense" and r["compiled"] is compiled]
            for row, _ in pairs if base else []:
                row[column] = round(base[0]["p50_ms"] / row["p50_ms"], 3)
    return rows


def _compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, dynamic=False)


def inference(model: nn.Module, x: Tensor, compiled: bool) -> Callable[[int], Tensor]:
    """A forward pass, on CUDA of bfloat16 weights."""
    frozen = copy.deepcopy(model).eval()
    if x.device.type == "cuda":
        frozen = frozen.bfloat16()
        x = x.bfloat16() if x.is_floating_point() else x
    run = _compiled(frozen) if compiled else frozen

    @torch.no_grad()
    def call(i: int) -> Tensor:
        return run(x)

    return call


def _all_tensors(training: Training) -> list[Tensor]:
    """Weights and the optimizer's state: what a training holds between its steps."""
    state = [v for values in training.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [*training.model.parameters(), *training.model.buffers(), *state]


def image_data(size: Size, device: torch.device) -> tuple[Tensor, Callable[..., Tensor]]:
    """Made-up images, as :func:`measure` wants its data."""
    plan = ImagePlan(made_up(size.image, PLAN * size.batch, device), size.batch, 0)
    plan.draw()
    return plan.batch_of(torch.zeros(1, dtype=torch.long, device=device))[0], plan.loss


def times_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a model as text."""
    names = ("ratio", "share", "p50_ms", "throughput", "speedup", "speedup_compiled", "peak_mb", "timer")
    lines = [
        (f"{r['mode']}, {r['structure']}{' compiled' if r['compiled'] else ''}", *(r[name] for name in names))
        for r in rows
        if r["status"] == "ok"
    ]
    header = ("", "ratio", "share", "ms", "a second", "x dense", "x compiled", "peak MB", "timer")
    bad = [f"{r['mode']}, {r['structure']} {r['ratio']}: {r['status']}" for r in rows if r["status"] != "ok"]
    return "\n".join([table(header, lines), *bad])
