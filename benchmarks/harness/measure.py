"""From a problem to rows: operands, errors, memory and times of every alternative."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.device import Roofs
from harness.problem import TRAINING, Alternative, Problem, matmul_precision, seeded
from harness.timing import Timed, Times, eager_us, prepare, take_turns

#: Tokens on which errors are measured.
ERROR_TOKENS = 256
MOST_SETS = 64

COLUMNS = (
    *("operation", "inputs", "outputs", "tokens", "dtype", "direction", "alternative", "kind", "params", "status"),
    *("p20_us", "p50_us", "p80_us", "repeats", "calls", "sets", "timer", "eager_us"),
    *("floor_us", "floor_by", "floor_ratio", "speedup", "error", "error_dense", "peak_mb"),
)

Row = dict[str, Any]


class DeviceLost(RuntimeError):
    """The device answers no more: this process can measure nothing else."""


def row_of(problem: Problem, alternative: Alternative | str, status: str) -> Row:
    """A row without figures; ``alternative`` may be the name of one that could not be made."""
    known = isinstance(alternative, Alternative)
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {name: getattr(problem, name) for name in COLUMNS[:6]}
    row["alternative"] = alternative.name if known else alternative
    row["kind"] = alternative.kind if known else ""
    row["params"] = alternative.cost.params if known and alternative.cost else ""
    row["status"] = " ".join(status.split())[:300]
    return row


def set_count(bytes_moved: int, cache: int) -> int:
    """How many sets of operands a call has to go round, so that a set has left the cache when its turn comes."""
    return max(1, min(MOST_SETS, -(-2 * cache // max(bytes_moved, 1))))


@dataclasses.dataclass
class _Ready:
    alternative: Alternative
    call: Callable[[int], object]
    timed: Timed
    sets: int
    error: float | None
    peak: float | None


class Operands:
    """Inputs and output gradients of a problem, shared by its alternatives."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self._made: list[tuple[Tensor, Tensor | None]] = []

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor | None]:
        problem = self.problem
        while len(self._made) <= i:
            draw = seeded(1000 + len(self._made), self.device, problem.torch_dtype)
            x = draw(problem.tokens, problem.inputs)
            training = problem.direction == TRAINING
            grad = draw(problem.tokens, problem.outputs) if training else None
            self._made.append((x.requires_grad_(training), grad))
        return self._made[i]


def caller(
    alternative: Alternative, problem: Problem, operands: Operands, sets: int
) -> Callable[[int], tuple[Tensor, ...]]:
    """The call on the i-th set of operands."""
    assert alternative.build is not None
    built = [alternative.build(seed) for seed in range(sets)]
    pairs = [operands[i] for i in range(sets)]
    if problem.direction != TRAINING:

        def forward(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (built[i][1](pairs[i][0]),)

        return forward
    for factors, _ in built:
        for factor in factors:
            factor.requires_grad_(True)

    def training(i: int) -> tuple[Tensor, ...]:
        (factors, function), (x, grad) = built[i], pairs[i]
        y = function(x)
        return (y, *torch.autograd.grad(y, (x, *factors), grad))

    return training


def error_of(alternative: Alternative, problem: Problem, operands: Operands) -> float | None:
    """The largest relative Frobenius error against float64, of the output or of any gradient, on a few tokens."""
    if alternative.exact is None or alternative.build is None:
        return None
    factors, function = alternative.build(0)
    x, grad = operands[0]
    training = problem.direction == TRAINING
    # The call runs on all tokens, as it is timed; a few of them, from everywhere, are compared.
    some = torch.linspace(0, problem.tokens - 1, min(problem.tokens, ERROR_TOKENS), device=x.device).long()
    doubles = [t.detach().double().requires_grad_(training) for t in (x.detach()[some], *factors)]
    with torch.set_grad_enabled(training):
        for factor in factors:
            factor.requires_grad_(training)
        y = function(x)
        found, expected = [y[some]], [alternative.exact(*doubles)]
        if training:
            assert grad is not None
            part = grad[some]
            whole = torch.zeros_like(grad).index_copy_(0, some, part)  # the other tokens add nothing to a factor's
            by_x, *by_factors = torch.autograd.grad(y, (x, *factors), whole)
            found += [by_x[some], *by_factors]
            expected += torch.autograd.grad(expected[0], doubles, part.double())
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {tuple(a.shape)}, the reference has {tuple(b.shape)}")
        error = (torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b)).item()
        worst = max(worst, error if error == error else float("inf"))  # a NaN is the worst error
    return worst


def _ready(alternative: Alternative, problem: Problem, operands: Operands, cache: int) -> _Ready:
    device, itemsize = operands.device, problem.torch_dtype.itemsize
    cost = alternative.cost
    moved = cost.moved(problem.direction, itemsize) if cost else problem.tokens * problem.inputs * itemsize
    sets = set_count(moved, cache) if device.type == "cuda" else 1
    error = error_of(alternative, problem, operands)
    call = caller(alternative, problem, operands, sets)
    call(0)
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        torch.cuda.synchronize(device)
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return _Ready(alternative, call, prepare(call, sets, device), sets, error, peak)


def _finish(problem: Problem, ready: _Ready, times: Times, eager: float | None, dense: Row | None, roofs: Roofs) -> Row:
    row = row_of(problem, ready.alternative, "ok")
    row |= {f"{name}_us": round(getattr(times, name), 2) for name in ("p20", "p50", "p80")}
    row |= {"repeats": times.repeats, "calls": times.calls, "sets": ready.sets, "timer": times.timer}
    if eager is not None:
        row["eager_us"] = round(eager, 1)
    if (cost := ready.alternative.cost) is not None:
        rate = roofs.tflop_s[problem.dtype]
        floor, by = cost.floor_us(problem.direction, problem.torch_dtype.itemsize, roofs.copy_gb_s, rate)
        row |= {"floor_us": round(floor, 2), "floor_by": by, "floor_ratio": round(times.p50 / floor, 3)}
    if ready.error is not None:
        row["error"] = f"{ready.error:.2e}"
    if ready.peak is not None:
        row["peak_mb"] = round(ready.peak, 1)
    base = row if ready.alternative.kind == "dense" else dense
    if base is not None:
        row["speedup"] = round(base["p50_us"] / times.p50, 3)
        row["error_dense"] = base["error"]
    return row


def measure(
    problem: Problem,
    device: torch.device,
    roofs: Roofs,
    seconds: float = 1.0,
    skip: set[str] = frozenset(),  # pyright: ignore[reportArgumentType]
    trying: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """The rows of a problem: those of alternatives that fail as soon as they fail, the others at the end.

    Args:
        problem: what to measure.
        device: where.
        roofs: the device's measured bandwidth and rates.
        seconds: how long the repeats may take.
        skip: names of alternatives to leave out, since a process died of them.
        trying: called with the name of each alternative before it runs for the first time, and with "" after the last.

    Raises:
        DeviceLost: after the row of the alternative that did it.
    """
    ready: list[_Ready] = []
    operands = Operands(problem, device)
    with matmul_precision(problem.dtype):
        for alternative in problem.alternatives(problem, device):
            if alternative.name in skip:
                continue
            if problem.direction == TRAINING and alternative.forward_only:
                yield row_of(problem, alternative, "missing: it has no derivative")
                continue
            if alternative.missing is not None:
                yield row_of(problem, alternative, f"missing: {alternative.missing}")
                continue
            trying(alternative.name)
            try:
                ready.append(_ready(alternative, problem, operands, roofs.cache))
            except Exception as error:
                yield row_of(problem, alternative, f"error: {type(error).__name__}: {error}")
                _check_alive(device, error)
        trying("all in turn")
        times = take_turns([r.timed for r in ready], device, seconds)
        dense: Row | None = None
        # The dense row first: the others are compared with it.
        for r, t in sorted(zip(ready, times, strict=True), key=lambda pair: pair[0].alternative.kind != "dense"):
            eager = eager_us(r.call, r.sets, device) if problem.eager else None
            row = _finish(problem, r, t, eager, dense, roofs)
            dense = row if r.alternative.kind == "dense" else dense
            yield row
        trying("")


def run_once(problem: Problem, device: torch.device) -> None:
    """Run what compiles kernels once, so that these are in the caches on disk."""
    operands = Operands(problem, device)
    with matmul_precision(problem.dtype):
        for alternative in problem.alternatives(problem, device):
            if alternative.missing is None and alternative.kind in ("ours", "compile"):
                with contextlib.suppress(Exception):  # the measuring process will say what is wrong
                    caller(alternative, problem, operands, 1)(0)
    release(device)


def release(device: torch.device) -> None:
    """Give memory back before the next problem."""
    if "torch._dynamo" in sys.modules:  # not loaded for this
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(device: torch.device, cause: Exception) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(str(error)) from cause
