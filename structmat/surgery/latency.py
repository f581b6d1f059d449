"""How long a compressed model takes beside its dense original, and which of its layers are slower than dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from structmat._checks import check_int
from structmat.nn import StructuredLinear
from structmat.surgery.batches import device_of, to_device
from structmat.surgery.costs import cost_key, measure_seconds
from structmat.surgery.healing.feed import call_model
from structmat.surgery.report import align
from structmat.surgery.selection import check_model, module_names
from structmat.surgery.spec import structure_name

_NOISE = 1.05  # a layer slower by less than that is not told from one that is as fast


@dataclass(frozen=True)
class Speed:
    """Seconds of one forward pass, compressed and dense: medians.

    Attributes:
        name: of the layer, or "batch 32".
        structure: of the layer, in words; None for a model.
        compressed: seconds.
        dense: seconds.
    """

    name: str
    structure: str | None
    compressed: float
    dense: float

    @property
    def speedup(self) -> float:
        """How many times as fast as dense."""
        return self.dense / self.compressed


class Speeds(tuple[Speed, ...]):
    """Rows of :class:`Speed`; printed as a table in milliseconds."""

    def __str__(self) -> str:
        lines = [("", "structure", "compressed", "dense", "speedup")]
        for row in self:
            times = (f"{row.compressed * 1e3:.3f} ms", f"{row.dense * 1e3:.3f} ms", f"{row.speedup:.2f}x")
            lines.append((row.name, row.structure or "", *times))
        if all(row.structure is None for row in self):
            lines = [(line[0], *line[2:]) for line in lines]
            return align(lines, left=1)
        return align(lines, left=2)


def measure_latency(
    model: nn.Module,
    dense: nn.Module,
    batch: Any,
    sizes: Sequence[int] = (1, 32),
    min_run_time: float = 0.5,
) -> Speeds:
    """The time of a forward pass of two models, at several batch sizes, each model on the device where it is.

    Without gradients, in evaluation mode, compiled if the model is (``torch.compile``), after a warm-up.

    Args:
        model: the compressed model.
        dense: its original.
        batch: a mapping (keyword arguments), tuple, list (positional ones) or tensor: the first item of all its tensors
            is repeated.
        sizes: how many times.
        min_run_time: for how long to repeat each measurement, in seconds.

    Returns:
        A row for each size; print it for a table.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a size is below 1, or a model is on the meta device.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> small = torch.nn.Sequential(structmat.nn.LowRankLinear(64, 64, rank=4))
        >>> speeds = surgery.measure_latency(small, dense, torch.randn(1, 64), min_run_time=0.001)
        >>> [row.name for row in speeds], speeds[0].speedup > 0
        (['batch 1', 'batch 32'], True)
    """
    for each in (model, dense):
        check_model(each)
        if any(p.is_meta for p in each.parameters()):
            raise ValueError("a model is on the meta device, where nothing takes time")
    rows = []
    for size in sizes:
        check_int("sizes", size)
        times = [_model_seconds(each, _repeated(batch, size), min_run_time) for each in (model, dense)]
        rows.append(Speed(f"batch {size}", None, *times))
    return Speeds(rows)


def slower_layers(model: nn.Module, tokens: int = 1024, min_run_time: float = 0.05) -> Speeds:
    """The structured layers that are slower than an ``nn.Linear`` of their size, on their device and in their dtype.

    By more than 5 %, the noise of a measurement. Every kind of layer (structure, size, dtype) is measured once, forward
    and without its bias. To leave such layers
    dense again, at the cost of their parameters: ``names = {row.name for row in slower_layers(model)}`` and
    ``densify_(model, lambda name, _: name in names)``.

    Args:
        model: any module with structured layers.
        tokens: how many inputs at a time; which layers are slower depends on it.
        min_run_time: for how long to repeat each measurement, in seconds.

    Returns:
        A row for each slower layer, in the model's order; print it for a table.

    Raises:
        TypeError: if model is not a module.
        ValueError: if a layer is on the meta device.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(structmat.nn.MonarchLinear(8, 8, nblocks=2))
        >>> [row.name for row in surgery.slower_layers(model, tokens=4, min_run_time=0.001)]
        ['0']
    """
    check_model(model)
    known: dict[str, float] = {}

    def seconds(weight: Any) -> float:
        key = f"{weight.device} {cost_key(weight)}"
        if key not in known:
            known[key] = measure_seconds(weight, tokens, min_run_time)
        return known[key]

    rows = []
    for module, names in module_names(model).items():
        if isinstance(module, StructuredLinear) and module.matrix_batch is None:
            value = module.weight().detach()
            dense = torch.zeros(module.out_features, module.in_features, dtype=value.dtype, device=value.device)
            rows.append(Speed(names[0], structure_name(value), seconds(value), seconds(dense)))
    return Speeds(row for row in rows if row.compressed > _NOISE * row.dense)


def _repeated(batch: Any, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:1].expand(size, *batch.shape[1:]).contiguous()
    if isinstance(batch, Mapping):
        return {key: _repeated(value, size) for key, value in batch.items()}
    return type(batch)(_repeated(value, size) for value in batch) if type(batch) in (tuple, list) else batch


def _model_seconds(model: nn.Module, batch: Any, min_run_time: float) -> float:
    training = {module: module.training for module in model.modules()}
    batch = to_device(batch, device_of(model))
    try:
        model.eval()
        with torch.no_grad():
            for _ in range(2):  # kernels are compiled and tuned by the first calls
                call_model(model, batch, None)
            timer = Timer(
                "call(model, batch, None)",
                globals={"call": call_model, "model": model, "batch": batch},
                num_threads=torch.get_num_threads(),
            )
            return timer.blocked_autorange(min_run_time=min_run_time).median
    finally:
        for module, mode in training.items():
            module.training = mode
