"""From a case to rows, in a process that may die of it: errors, memory, times, and what became of the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from harness.conv_cases import Alternative, Case, alternatives
from harness.device import Roofs, measure_roofs
from harness.measure import release, set_count
from harness.pool import Result, describe
from harness.problem import matmul_precision
from harness.timing import Timed, prepare, take_turns

COLUMNS = (
    *("operation", "batch", "channels", "length", "dtype", "direction", "variant", "alternative", "status"),
    *("p20_us", "p50_us", "p80_us", "repeats", "calls", "sets", "timer", "speedup"),
    *("bytes_floor_us", "bytes_ratio", "arithmetic_floor_us", "arithmetic_ratio"),
    *("error", "error_grads", "rounding", "peak_mb", "saved_mb", "first_s", "kernels"),
)
#: Where the kernels are, to ask what became of them.
KERNELS = (
    ("structmat_kernels.fft_conv.chain_programs", ("convolve", "correlate")),
    ("structmat_kernels.fft_conv.programs", ("convolve", "gradients")),
    ("structmat_kernels.short_conv.kernel", ("_forward", "_backward")),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A case for a worker process; without one, the rates of the device.

    Attributes:
        device: where.
        case: what to measure.
        seconds: for the repeats of all alternatives together.
        least: repeats of each at least.
        compiled: whether torch.compile takes part.
        ours: whether the kernels take part; they do not after the process died of them.
        warm: only run what has kernels, once, so that these are compiled.
    """

    device: str
    case: Case | None = None
    seconds: float = 0.5
    least: int = 20
    compiled: bool = False
    ours: bool = True
    warm: bool = False


def work(task: Task) -> Result:
    """What a worker does with a task; a lost device raises an error that begins with "CUDA error"."""
    device = torch.device(task.device)
    try:
        if task.case is None:
            return {"roofs": dataclasses.asdict(measure_roofs(device, {"bf16", "fp16", "tf32"}))}
        with matmul_precision(task.case.dtype):
            return _warm(task, task.case, device) if task.warm else {"rows": _measure(task, task.case, device)}
    finally:
        with contextlib.suppress(Exception):  # a lost device has nothing to give back
            release(device)


def row_of(case: Case, name: str, status: str = "ok") -> Row:
    """A row without figures."""
    return dict.fromkeys(COLUMNS, "") | dataclasses.asdict(case) | {"alternative": name, "status": status}


def floors(row: Row, case: Case, roofs: Roofs | None, ours: bool) -> None:
    """Fill in what the case takes at least: to move its operands, and for the products of the kernels."""
    if roofs is None or row["p50_us"] == "":
        return
    if case.bytes_moved is not None:
        row["bytes_floor_us"] = round(1e-3 * case.bytes_moved / roofs.copy_gb_s, 2)
        row["bytes_ratio"] = round(row["p50_us"] / row["bytes_floor_us"], 3)
    if ours and case.operations is not None:
        # Half precision is computed in float16; a product of float32 is three of TF32.
        rate = roofs.tflop_s["tf32"] / 3 if case.dtype == "fp32" else roofs.tflop_s["fp16"]
        row["arithmetic_floor_us"] = round(1e-6 * case.operations / rate, 2)
        row["arithmetic_ratio"] = round(row["p50_us"] / row["arithmetic_floor_us"], 3)


def _measure(task: Task, case: Case, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    ready: list[tuple[Row, Timed]] = []
    for alternative in alternatives(case, device, task.compiled):
        if alternative.ours and not task.ours:
            continue
        rows.append(row_of(case, alternative.name))
        if alternative.missing:
            rows[-1]["status"] = alternative.missing
            continue
        try:
            ready.append((rows[-1], _ready(case, alternative, rows[-1], device)))
        except Exception as error:
            rows[-1]["status"] = describe(error)
            check_alive(device, alternative.name)
    times = take_turns([t for _, t in ready], device, task.seconds, least=task.least)
    for (row, _), t in zip(ready, times, strict=True):
        row |= {f"{name}_us": round(getattr(t, name), 2) for name in ("p20", "p50", "p80")}
        row |= {"repeats": t.repeats, "calls": t.calls, "timer": t.timer}
        if rows[0]["p50_us"]:
            row["speedup"] = round(rows[0]["p50_us"] / row["p50_us"], 3)
    return rows


def _warm(task: Task, case: Case, device: torch.device) -> Result:
    start = time.perf_counter()
    for alternative in alternatives(case, device, False):
        if alternative.ours and not alternative.missing:
            _call(case, alternative, 1)[0](0)
            synchronize(device)
    return {"seconds": round(time.perf_counter() - start, 1)}


def _call(case: Case, alternative: Alternative, sets: int) -> tuple[Callable[[int], tuple], list[str], Callable]:
    """The call on the i-th set, the names of what it returns, and the forward call with a graph."""
    built = [alternative.build(i) for i in range(sets)]
    names = ["y", *built[0][0]] if case.training else ["y"]

    def call(i: int) -> tuple:
        leaves, grad, function = built[i]
        values = tuple(leaves.values())
        if grad is None:
            with torch.no_grad():
                return (function(*values),)
        y = function(*values)
        return (y, *torch.autograd.grad(y, values, grad.to(y.dtype), allow_unused=True))

    return call, names, lambda: built[0][2](*built[0][0].values())


def _ready(case: Case, alternative: Alternative, row: Row, device: torch.device) -> Timed:
    gpu = device.type == "cuda"
    sets = (
        set_count(case.bytes_moved, torch.cuda.get_device_properties(device).L2_cache_size)
        if (gpu and case.bytes_moved)
        else 1
    )
    call, names, forward = _call(case, alternative, sets)
    before, start = compiled_kernels(), time.perf_counter()
    found = call(0)
    synchronize(device)
    row["first_s"] = round(time.perf_counter() - start, 2)
    row["kernels"] = described(before)
    if alternative.check is not None:
        row |= alternative.check({n: t for n, t in zip(names, found, strict=True) if t is not None})
    del found
    row["sets"] = sets
    if gpu:
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        synchronize(device)
        row["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)
        if case.training:
            held = torch.cuda.memory_allocated(device)
            y = forward()  # with what is kept for the backward pass
            kept = torch.cuda.memory_allocated(device) - held - y.numel() * y.element_size()
            row["saved_mb"] = round(kept / 2**20, 1)
            del y
    return prepare(call, sets, device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_alive(device: torch.device, name: str) -> None:
    """Raise if the device answers no more, so that another process goes on."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as lost:
        raise RuntimeError(f"CUDA error: the device was lost by {name}: {describe(lost)}") from lost


def compiled_kernels() -> dict[int, tuple[str, Any]]:
    """The kernels that Triton has compiled or loaded in this process."""
    found = {}
    for module, names in KERNELS:
        for name in names if module in sys.modules else ():
            # Triton's interpreter has none; the first of a device's caches is that of the kernels.
            for caches in getattr(getattr(sys.modules[module], name), "device_caches", {}).values():
                found |= {id(kernel): (name, kernel) for kernel in caches[0].values()}
    return found


def described(before: dict[int, tuple[str, Any]]) -> str:
    """Registers, spilled bytes and shared memory of the kernels that are new."""
    new = [pair for key, pair in compiled_kernels().items() if key not in before]
    return "; ".join(
        f"{name}: {kernel.n_regs} registers, {kernel.n_spills} spilled, {kernel.metadata.shared} B shared"
        for name, kernel in new
    )
