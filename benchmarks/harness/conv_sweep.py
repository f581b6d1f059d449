"""Configurations of the long convolution's kernels: compiled side by side in many processes, then timed in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.conv_cases import Case, Operands
from harness.conv_measure import check_alive, compiled_kernels, described, synchronize
from harness.measure import release, set_count
from harness.pool import Result, describe
from harness.problem import DTYPES, matmul_precision
from harness.timing import prepare, take_turns

COLUMNS = (
    *("case", "kernel", "P", "num_warps", "default", "status", "p20_us", "p50_us", "p80_us", "timer"),
    *("error", "kernels", "first_s"),
)
Choice = tuple[int, int]  # P, num_warps


@dataclasses.dataclass(frozen=True)
class Task:
    """Configurations of a case's kernel: one to be compiled and checked, or all to be timed."""

    device: str
    case: Case
    choices: tuple[Choice, ...]
    seconds: float = 0.0  # for the repeats; 0 only compiles
    least: int = 20


def choices(case: Case, smoke: bool) -> list[Choice]:
    """All of a sweep: P transforms side by side, warps (which the radices settle in half precision)."""
    from structmat_kernels.fft_conv import half, kernel

    short = DTYPES[case.dtype].itemsize == 2
    if smoke:
        return [(4, 4), (8, 4)] if short else [(1, 4), (2, 4)]
    points = (half if short else kernel).points_of(case.length)
    if short:
        n1, least = half.RADICES[points][0], half.fewest(points)
        return [(P, n1 // 8) for P in (1, 2, 4, 8, 16) if least == P or (least < P and P * points <= 8192)]
    tiles = [P for P in (1, 2, 4, 8, 16) if P == 1 or (P * points <= 16384 and case.batch >= 2 * P)]
    # Fewer warps would not hold a tile in their registers.
    return [(P, w) for P in tiles for w in (4, 8, 16) if 256 * w <= max(2048, P * points) <= 2048 * w]


def default(case: Case) -> Choice:
    """What the kernel takes when it is not told."""
    from structmat_kernels.fft_conv import half, kernel

    if DTYPES[case.dtype].itemsize == 2:
        points = half.points_of(case.length)
        return half.config(case.batch, points)["P"], half.RADICES[points][0] // 8
    found = kernel.config(case.batch, kernel.points_of(case.length))
    return found["P"], found["num_warps"]


def row_of(case: Case, choice: Choice) -> dict[str, Any]:
    """A row without figures."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"case": case.key, "kernel": "backward" if case.training else "forward", "status": "ok"}
    return row | {"P": choice[0], "num_warps": choice[1], "default": choice == default(case)}


def work(task: Task) -> Result:
    """What a worker does: cells for each configuration, in ``"cells"``."""
    device = torch.device(task.device)
    with matmul_precision(task.case.dtype):
        cells = _times(task, device) if task.seconds else [_compiled(task, device)]
    release(device)
    return {"cells": cells}


_operands: dict[tuple[Case, str], Operands] = {}


def _call(case: Case, device: torch.device, choice: Choice) -> Callable[[int], dict[str, Tensor]]:
    """The kernel alone: the forward one, or the one of all gradients."""
    from structmat_kernels.fft_conv.kernel import STAGES, backward_conv, forward_conv

    if (case, str(device)) not in _operands:
        _operands.clear()  # those of one case at a time
        _operands[case, str(device)] = Operands(case, device)
    made = _operands[case, str(device)]
    config = {"P": choice[0]}
    if DTYPES[case.dtype].itemsize != 2:
        config |= {"num_warps": choice[1], "num_stages": STAGES}

    @torch.no_grad()
    def call(i: int) -> dict[str, Tensor]:
        operands, grad = made[i]
        u, k, pre, post = (operands.get(name) for name in ("u", "k", "pre", "post"))
        assert u is not None and k is not None
        if grad is None:
            return {"y": forward_conv(u, k, None, None, pre, post, config=config)}
        needs = [True, True, False, False, pre is not None, post is not None]
        gu, gk, _, _, gpre, gpost = backward_conv(grad, u, k, None, None, pre, post, needs, config=config)
        return {n: t for n, t in zip(("u", "k", "pre", "post"), (gu, gk, gpre, gpost), strict=True) if t is not None}

    return call


def _compiled(task: Task, device: torch.device) -> dict[str, Any]:
    """Compile, run once, and compare with float64."""
    case, start, before = task.case, time.perf_counter(), compiled_kernels()
    found = _call(case, device, task.choices[0])(0)
    synchronize(device)
    cells: dict[str, Any] = {"first_s": round(time.perf_counter() - start, 1), "kernels": described(before)}
    errors = _operands[case, str(device)].errors(found)
    return cells | {"error": f"{max(errors.values()):.2e}"}


def _times(task: Task, device: torch.device) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{} for _ in task.choices]
    ready = []
    sets = 1
    if device.type == "cuda":
        sets = set_count(task.case.bytes_moved or 0, torch.cuda.get_device_properties(device).L2_cache_size)
    for cell, choice in zip(cells, task.choices, strict=True):
        try:
            ready.append((cell, prepare(_call(task.case, device, choice), sets, device)))
        except Exception as error:
            cell["status"] = describe(error)
            check_alive(device, str(choice))
    for (cell, _), t in zip(ready, take_turns([t for _, t in ready], device, task.seconds, task.least), strict=True):
        cell |= {f"{name}_us": round(getattr(t, name), 2) for name in ("p20", "p50", "p80")} | {"timer": t.timer}
    return cells
