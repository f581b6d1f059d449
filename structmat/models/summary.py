"""Parameters and operations of a model, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn import StructuredLinear
from structmat.surgery.report import align, share
from structmat.surgery.selection import dense_shape, is_linear_like
from structmat.surgery.spec import structure_name


@dataclass(frozen=True)
class SummaryRow:
    """One module of a :class:`ModelSummary`: what it owns itself, without the modules in it.

    Attributes:
        name: dotted name in the model, empty for the model itself.
        structure: in words, such as ``monarch 4x4 rank 24``, ``dense``, or the module's class.
        shape: (out, in) of a linear layer, else None.
        params: numbers in its parameters, those of an earlier row left out.
        flops: multiplications plus additions with the inputs given; None without.
    """

    name: str
    structure: str
    shape: tuple[int, int] | None
    params: int
    flops: int | None


@dataclass(frozen=True)
class ModelSummary:
    """Parameters and operations of a model; made by :func:`model_summary`.

    Attributes:
        rows: every module that has parameters or operations, in the model's order.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def params(self) -> int:
        """Parameters of the model, shared ones counted once."""
        return sum(row.params for row in self.rows)

    @property
    def flops(self) -> int | None:
        """Operations of the forward pass with the inputs given; None without."""
        counts = [row.flops for row in self.rows if row.flops is not None]
        return sum(counts) if counts else None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "shape", "structure", "params", "share", "flops", "share")]
        for row in self.rows:
            size = "" if row.shape is None else f"{row.shape[0]}x{row.shape[1]}"
            rows.append((row.name or "(model)", size, row.structure, *self._cells(row.params, row.flops)))
        rows.append((f"{len(self.rows)} modules", "", "", *self._cells(self.params, self.flops)))
        head, *body, total = align(rows, left=3).split("\n")
        rule = "-" * max(map(len, (head, *body, total)))
        return "\n".join((head, rule, *body, rule, total))

    def _cells(self, params: int, flops: int | None) -> tuple[str, ...]:
        work = ("-", "-") if flops is None else (f"{flops:,}", share(flops, self.flops or 0))
        return (f"{params:,}", share(params, self.params), *work)


def model_summary(model: nn.Module, *inputs: Any) -> ModelSummary:
    """Count the parameters of a model and, given inputs, the operations of a forward pass.

    Operations are those of linear layers (structured, ``nn.Linear``, transformers' ``Conv1D``), of
    ``torch.nn.Conv2d``, of attention's allowed pairs and of the output matrix of :class:`~structmat.models.GPT`. A
    module of another kind counts with what its method ``own_flops(*inputs)`` returns, if it has one; norms,
    activations and lookups count nothing. A module that the pass calls twice counts twice.

    Args:
        model: any module; on the meta device nothing is computed, so that a large model is counted at once.
        inputs: what the model is called with, without gradients and in the mode that it is in. None: no operations.

    Raises:
        TypeError: if model is not a module.

    Example:
        >>> import torch, structmat
        >>> from structmat.models import GPT, model_summary
        >>> tokens = torch.ones(1, 1024, dtype=torch.long, device="meta")
        >>> for structure in (None, structmat.MonarchConfig(nblocks=4), structmat.LowRankConfig(ratio=0.125)):
        ...     summary = model_summary(GPT(structure=structure, device="meta"), tokens)
        ...     print(f"{summary.params / 1e6:.1f} million parameters, {summary.flops / 1e9:.0f} GFLOPs")
        124.4 million parameters, 272 GFLOPs
        67.8 million parameters, 156 GFLOPs
        50.0 million parameters, 120 GFLOPs
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    counts: dict[nn.Module, int] = {}
    if inputs:
        handles = [m.register_forward_hook(_counter(counts)) for m in model.modules() if _counts(m)]
        try:
            with torch.no_grad():
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
    rows: list[SummaryRow] = []
    seen: set[Tensor] = set()
    inner: set[nn.Module] = set()  # parts of a structured weight, which count with their layer
    for name, module in model.named_modules():
        if module in inner:
            continue
        words, shape = type(module).__name__, None
        structured = isinstance(module, StructuredLinear)
        if structured:
            inner.update(module.weight.modules())
            words, shape = structure_name(module.weight()), (module.out_features, module.in_features)
        elif is_linear_like(module):
            words, shape = "dense", dense_shape(module)
        own = [p for p in module.parameters(recurse=structured) if p not in seen]
        seen.update(own)
        flops = counts.get(module, 0) if inputs else None
        if own or flops:
            rows.append(SummaryRow(name, words, shape, sum(p.numel() for p in own), flops))
    return ModelSummary(tuple(rows))


def _counts(module: nn.Module) -> bool:
    return isinstance(module, (StructuredLinear, nn.Conv2d)) or is_linear_like(module) or hasattr(module, "own_flops")


def _counter(counts: dict[nn.Module, int]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counts[module] = counts.get(module, 0) + _flops(module, args, output)

    return hook


def _flops(module: Any, args: tuple[Any, ...], output: Any) -> int:
    if hasattr(module, "own_flops"):
        return module.own_flops(*args)
    if isinstance(module, StructuredLinear):
        # Of a batch of matrices the value's operations are those of all, and the output has the batch's dimension too.
        return module.weight().flops * (output.numel() // math.prod(module.weight().shape[:-1]))
    if isinstance(module, nn.Conv2d):
        return 2 * module.weight.numel() * (output.numel() // module.out_channels)
    return 2 * dense_shape(module)[1] * output.numel()
