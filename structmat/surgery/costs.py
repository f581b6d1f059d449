"""What a layer costs, counted or measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from structmat._checks import check_int, check_tensor
from structmat.base import StructuredMatrix
from structmat.surgery.spec import structure_name

CostFn = Callable[[Tensor | StructuredMatrix], float]
Cost = str | CostFn | Mapping[str, float]


def measure_seconds(weight: Tensor | StructuredMatrix, rows: int = 1024, min_run_time: float = 0.1) -> float:
    """The time of one product with a batch of inputs, forward, on the weight's device: a median, after a warm-up.

    Args:
        weight: shape (out, in), dense or structured.
        rows: how many inputs (tokens of a batch) at a time; the ratio of structures depends on it.
        min_run_time: how long to repeat, in seconds.

    Raises:
        TypeError: if weight is neither a tensor nor a structured matrix.
        ValueError: if it is on the meta device.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> surgery.measure_seconds(torch.randn(64, 64), rows=32, min_run_time=0.001) > 0
        True
    """
    check_int("rows", rows)
    if not isinstance(weight, StructuredMatrix):
        check_tensor("weight", weight, 2)
    if weight.device.type == "meta":
        raise ValueError("weight is on the meta device, where nothing takes time; make it real first")
    weight = weight.detach()
    x = torch.randn(rows, weight.shape[-1], device=weight.device).to(weight.dtype)

    def product() -> Tensor:
        return weight.linear(x) if isinstance(weight, StructuredMatrix) else F.linear(x, weight)

    with torch.no_grad():
        for _ in range(2):  # kernels are compiled and tuned by the first calls
            product()
        timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=min_run_time).median


class Costs:
    """The costs of weights in one unit; those of equal shape, dtype and structure are asked for once.

    Args:
        cost: "params", "time", a function or a mapping, as for :func:`structmat.surgery.allocate`.
        rows: of a measured time.
    """

    def __init__(self, cost: Cost, rows: int) -> None:
        if not (callable(cost) or isinstance(cost, Mapping) or cost in ("params", "time")):
            raise ValueError(f'cost must be "params", "time", a function or a mapping, got {cost!r}')
        check_int("rows", rows)
        self.cost, self.rows = cost, rows
        self.known: dict[str, float] = {}

    @property
    def unit(self) -> str:
        """What budgets are counted in."""
        return (
            {"params": "parameters", "time": "seconds"}.get(self.cost, "cost") if isinstance(self.cost, str) else "cost"
        )

    def __call__(self, weight: Tensor | StructuredMatrix) -> float:
        """The cost of a weight (out, in)."""
        if self.cost == "params":
            return weight.num_params if isinstance(weight, StructuredMatrix) else weight.numel()
        key = cost_key(weight)
        if key not in self.known:
            cost: Any = self.cost
            if isinstance(cost, Mapping):
                if key not in cost:
                    raise ValueError(f"cost has no entry {key!r}; it has {len(cost)} others")
                value = float(cost[key])
            else:
                value = float(measure_seconds(weight, self.rows) if cost == "time" else cost(weight))
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"cost must be a positive finite number, got {value} for {key!r}")
            self.known[key] = value
        return self.known[key]


def cost_key(weight: Tensor | StructuredMatrix) -> str:
    """Shape, dtype, structure and size of a weight in words: under this name its cost is kept."""
    m, n = weight.shape
    dense = isinstance(weight, Tensor)
    words = "dense" if dense else f"{structure_name(weight)}, {weight.num_params} parameters"
    return f"{m}x{n} {str(weight.dtype).removeprefix('torch.')} {words}"
