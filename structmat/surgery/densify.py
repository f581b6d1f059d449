"""Replace the structured layers of a model by dense ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from structmat.base import StructuredMatrix
from structmat.nn import StructuredLinear
from structmat.projection.truncated import work_dtype
from structmat.surgery.report import LayerRow, Report
from structmat.surgery.selection import FilterFn, check_model, count_params, module_names
from structmat.surgery.spec import structure_name
from structmat.surgery.swap import dense_class, dense_like, swap


def densify_(model: nn.Module, filter_fn: FilterFn | None = None) -> Report:
    """Replace structured layers, in place, by ``nn.Linear`` with the dense weight, rounded once to the dtype.

    Where :func:`compress_` or :func:`replace_` has found transformers' ``Conv1D``, there is one again, so that
    transformers saves and loads the model. Bias, dtype, device, mode, ``requires_grad`` (of the weight: if any factor
    has it) and hooks are kept. Layers that share their weight with another module are left alone, unless they share all
    of it with each other.

    Args:
        model: any module that contains structured layers.
        filter_fn: called with name and module; layers for which it returns false are left alone.

    Returns:
        One row for each structured layer, without errors.

    Raises:
        TypeError: if model is not a module.
        ValueError: if there is nothing to replace, or the model is itself a structured layer.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(structmat.nn.LowRankLinear(8, 8, rank=2))
        >>> report = surgery.densify_(model)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    check_model(model)
    before, rows = count_params(model), []
    layers: list[tuple[nn.Module, nn.Module]] = []
    dense: dict[Any, nn.Parameter] = {}
    holders = _holders(model)
    for module, names in module_names(model).items():
        if not isinstance(module, StructuredLinear):
            continue
        name, value = names[0], module.weight()
        shape, params = (module.out_features, module.in_features), value.num_params
        if reason := _keep(name, module, filter_fn, holders):
            row = LayerRow.left_alone(name, shape, params, reason)
            rows.append(dataclasses.replace(row, flops_before=value.flops, flops_after=value.flops))
            continue
        if name == "":
            raise ValueError("the model is itself a structured layer, which cannot be replaced in place")
        key = module.weight, dense_class(module)
        if key not in dense:
            trainable = any(p.requires_grad for p in module.weight.parameters())
            weight = to_dense(value) if key[1] is nn.Linear else to_dense(value).mT.contiguous()
            dense[key] = nn.Parameter(weight, requires_grad=trainable)
        layers.append((module, dense_like(module, dense[key])))
        size, structure = dense[key].numel(), f"{structure_name(value)} to dense"
        rows.append(LayerRow(name, structure, shape, params, size, value.flops, 2 * size))
    if not layers:
        raise ValueError(
            f"there is nothing to replace: looked for structmat.nn.StructuredLinear in {len(list(model.modules()))} "
            "modules" + "".join(f"\n  {row.name}: {row.skipped}" for row in rows)
        )
    swap(model, layers)
    return Report(tuple(rows), before, count_params(model))


@torch.no_grad()
def to_dense(value: StructuredMatrix) -> Tensor:
    """The dense matrix, computed in double precision and rounded once."""
    double = work_dtype(torch.empty(0, dtype=value.dtype, device=value.device))
    return value.detach().to(double).to_dense().to(value.dtype).contiguous()


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and those that hold each structured weight, by identity."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, part in (*module._parameters.items(), *module._modules.items()):
            holders.setdefault(id(part), []).append((module, f"{name}.{key}" if name else key))
    return holders


def _keep(name: str, layer: StructuredLinear, filter_fn: FilterFn | None, holders: dict[int, Any]) -> str | None:
    """Why a structured layer stays as it is, or None."""
    if type(layer).forward is not StructuredLinear.forward or "forward" in vars(layer):
        return f"its class {type(layer).__name__} has a forward method of its own"
    if layer.matrix_batch is not None:
        return f"it holds a batch of {layer.matrix_batch} matrices, which nn.Linear cannot"
    inner = set(layer.weight.modules())
    ties = [other for holder, other in holders[id(layer.weight)] if not isinstance(holder, StructuredLinear)]
    for parameter in layer.weight.parameters():
        ties += [other for holder, other in holders[id(parameter)] if holder not in inner]
    if ties:
        return f"its weight is tied to {', '.join(ties)}"
    return "filter_fn returned false" if filter_fn is not None and not filter_fn(name, layer) else None
