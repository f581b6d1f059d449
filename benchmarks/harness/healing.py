"""Healing of a compressed model within a time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from structmat import surgery


def heal(
    model: nn.Module, dense: nn.Module, batches: list[Any], seconds: float, lr: float, device: torch.device
) -> float:
    """Train a compressed model for about so many seconds; the steps are as many as those of a trial allow.

    The learning rate falls to zero by the last step, so their number has to be known beforehand. The trial's steps are
    those of no rate to speak of.

    Returns:
        The seconds that it took, the trial's included.
    """
    started = time.perf_counter()
    kind: dict[str, Any] = {"autocast": torch.bfloat16 if device.type == "cuda" else None, "progress": False}
    trial = 3 if device.type == "cuda" else 1
    surgery.heal(model, dense, batches, trial, lr=1e-12, **kind)  # the first steps are slow
    begun = time.perf_counter()
    surgery.heal(model, dense, batches, 3 * trial, lr=1e-12, **kind)
    step = (time.perf_counter() - begun) / (3 * trial)
    steps = max(1, int((seconds - (time.perf_counter() - started)) / step))
    report = surgery.heal(model, dense, batches, steps, lr=lr, **kind)
    tenth = max(1, steps // 10)
    first, last = (sum(part) / len(part) for part in (report.losses[:tenth], report.losses[-tenth:]))
    print(f"    healed: {steps} steps of {step * 1e3:.0f} ms, loss {first:.4g} -> {last:.4g}", flush=True)
    return time.perf_counter() - started
