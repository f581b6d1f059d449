"""Healing of a compressed model within a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from structmat import surgery

#: How often a judge looks at the model, at most.
_LOOKS = 16
#: Of the time, what the trials of learning rates may take, and the steps of each.
_TRIALS, _TRIAL_STEPS = 0.2, 40


def heal(
    model: nn.Module,
    dense: nn.Module,
    batches: list[Any],
    seconds: float,
    rates: Sequence[float],
    device: torch.device,
    judge: Callable[[nn.Module], float] | None = None,
) -> tuple[float, dict[str, Any]]:
    """Train a compressed model for about so many seconds; the steps are as many as those of a trial allow.

    The learning rate falls to zero by the last step, so their number has to be known beforehand. Of several rates each
    is tried for a few steps from the same weights, within a fifth of the time, and the best is taken.

    Args:
        model: compressed, in single precision; products are in bfloat16 on a GPU.
        dense: what it is to do.
        batches: to train on.
        seconds: in all, the trials included.
        rates: of learning.
        device: of both.
        judge: what is to be small, on data that are neither trained on nor reported; the model ends at its best. By
            default trials are judged by the last tenth of the batches, and the run by nothing.

    Returns:
        The seconds that it took, and what there is to say of it.
    """
    started = time.perf_counter()
    kind: dict[str, Any] = {"autocast": torch.bfloat16 if device.type == "cuda" else None, "progress": False}
    trial = 3 if device.type == "cuda" else 1
    surgery.heal(model, dense, batches, trial, lr=1e-12, **kind)  # the first steps are slow
    begun = time.perf_counter()
    surgery.heal(model, dense, batches, 3 * trial, lr=1e-12, **kind)
    step, look = (time.perf_counter() - begun) / (3 * trial), 0.0
    if judge is not None:
        begun = time.perf_counter()
        with torch.no_grad():
            judge(model.eval())
        look = time.perf_counter() - begun
    tried: dict[float, float] = {}
    if len(rates) > 1:
        share = _TRIALS * seconds / len(rates) - 2 * look
        steps = max(1, min(_TRIAL_STEPS, int(share / step)))
        tried = surgery.learning_rates(model, dense, batches, rates, steps, validate=judge, **kind)
    lr = min(tried, key=lambda rate: tried[rate]) if tried else rates[0]
    left = seconds - (time.perf_counter() - started)
    steps = max(1, int((left - (_LOOKS + 1) * look) / step))
    every = -(-steps // _LOOKS)
    report = surgery.heal(model, dense, batches, steps, lr=lr, validate=judge, validate_every=every, **kind)
    tenth = max(1, steps // 10)
    first, last = (sum(part) / len(part) for part in (report.losses[:tenth], report.losses[-tenth:]))
    facts = {"steps": steps, "step_ms": round(step * 1e3, 1), "lr": lr, "first_loss": first, "last_loss": last}
    facts |= {"tried": {str(rate): value for rate, value in tried.items()}}
    facts |= {"judged": report.validations, "best_step": report.best_step}
    text = f"    healed: {steps} steps of {step * 1e3:.0f} ms at {lr:g}, loss {first:.4g} -> {last:.4g}"
    if tried:
        text += "; tried " + ", ".join(f"{rate:g}: {value:.4g}" for rate, value in tried.items())
    if report.validations:
        text += f"; judged {report.validations[0][1]:.4g} -> {min(v for _, v in report.validations):.4g}"
    print(text, flush=True)
    return time.perf_counter() - started, facts
