"""Replace the linear layers of a model by structured ones, and back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from structmat.base import StructuredMatrix
from structmat.config import BudgetError, Projection, project
from structmat.nn import StructuredLinear
from structmat.projection.truncated import work_dtype
from structmat.surgery.report import LayerRow, Report
from structmat.surgery.selection import (
    Configs,
    FilterFn,
    Selection,
    Target,
    check_model,
    count_params,
    module_names,
    select,
)
from structmat.surgery.spec import structure_name
from structmat.surgery.swap import dense_like, disable_fused_encoder, structured_like, swap


def compress_(
    model: nn.Module,
    config: Configs,
    filter_fn: FilterFn | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replace linear layers, in place, by the nearest structured ones.

    Layers of exact type ``nn.Linear`` and transformers' ``Conv1D`` are projected by :func:`structmat.project`. The new
    ones keep bias, dtype, device, training mode, ``requires_grad``, hooks, extra attributes and every place in the
    model under which the old one stood. Subclasses, parametrized layers and layers whose weight another module shares
    are left alone, and the report says why. Either all layers that the config names are replaced or, after an error
    or an interruption, none: until the last one is ready, the old weights and the new ones are both in memory.

    The weights are new parameters: make the optimizer afterwards. A module that reads ``layer.weight`` of a child as a
    tensor will find a module there.

    Args:
        model: any module that contains such layers.
        config: one config for all layers, or a mapping of patterns for dotted names (``"encoder.*.fc1"``, as in
            :mod:`fnmatch`) to configs, of which the first match counts; what no pattern matches is left alone.
        filter_fn: called with name and module; layers for which it returns false are left alone.
        dry_run: compute sizes and costs only, and change nothing. Weights are not looked at.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        One row for each layer: sizes, operations, the achieved relative error, and the bound that certifies it.

    Raises:
        structmat.BudgetError: if a budget is too small for a layer; all such layers are named.
        TypeError: if an argument has the wrong type.
        ValueError: if nothing is to be replaced, a structure does not exist for a layer's size, a weight has NaN or
            infinite entries or is on the meta device, the model is itself a linear layer, or it is wrapped for
            distributed training.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> report = surgery.compress_(model, structmat.MonarchConfig(nblocks=2, rank=4))
        >>> type(model[0]).__name__, sorted(model[0].state_dict())
        ('MonarchLinear', ['bias', 'weight.left', 'weight.right'])
        >>> report.params_before, report.params_after
        (2688, 1360)
    """
    selection = select(model, config, filter_fn)
    sketches = _sketch(selection)
    if not dry_run:
        _check_values(selection)
    before, rows = count_params(model), []
    layers: list[tuple[nn.Module, nn.Module]] = []
    hidden = True if dry_run else None if progress is None else not progress  # None: shown on a terminal only
    for target, sketch in zip(tqdm(selection.targets, "compressing", disable=hidden), sketches, strict=True):
        if dry_run:
            rows.append(_row(target, sketch))
            continue
        start = time.perf_counter()
        result = project(target.weight, target.config)
        rows.append(_row(target, sketch, result, time.perf_counter() - start))
        layers.append((target.module, structured_like(target.module, result.matrix)))
    swap(model, layers)
    disable_fused_encoder(model)
    return _report(selection, rows, before, dry_run)


def replace_(
    model: nn.Module, config: Configs, filter_fn: FilterFn | None = None, device: torch.device | str | None = None
) -> Report:
    """Replace linear layers, in place, by freshly initialised structured ones, to train from scratch.

    The walk is that of :func:`compress_`. Weights and biases are drawn with the output variance of a fresh
    ``nn.Linear`` (for a ``Conv1D`` too); bias, dtype, device, mode, ``requires_grad`` and hooks are as before. Works on
    the meta device.

    Args:
        model: any module that contains such layers.
        config: as for :func:`compress_`.
        filter_fn: as for :func:`compress_`.
        device: where the new layers are made, by default where the old ones are. Of a model on the meta device the
            new layers alone get memory: the dense weights are never made.

    Returns:
        One row for each layer, without errors.

    Raises:
        structmat.BudgetError: if a budget is too small for a layer.
        TypeError: if an argument has the wrong type.
        ValueError: as for :func:`compress_`, except that weights are not looked at.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64, device="meta"))
        >>> surgery.replace_(model, structmat.BlockDiagonalConfig(nblocks=4)).params_after
        512
    """
    selection = select(model, config, filter_fn)
    sketches = _sketch(selection)
    before, layers = count_params(model), []
    for target in selection.targets:
        weight = target.weight
        value = target.config.random(
            target.shape, dtype=weight.dtype, device=weight.device if device is None else device
        )
        layers.append((target.module, structured_like(target.module, value, fresh_bias=True)))
    swap(model, layers)
    disable_fused_encoder(model)
    rows = [_row(target, sketch) for target, sketch in zip(selection.targets, sketches, strict=True)]
    return _report(selection, rows, before, dry_run=False)


def densify_(model: nn.Module, filter_fn: FilterFn | None = None) -> Report:
    """Replace structured layers, in place, by ``nn.Linear`` with the dense weight, rounded once to the dtype.

    Bias, dtype, device, mode, ``requires_grad`` (of the weight: if any factor has it) and hooks are kept. Layers that
    share their weight with another module are left alone, unless they share all of it with each other.

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
    dense: dict[nn.Module, nn.Parameter] = {}
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
        if module.weight not in dense:
            trainable = any(p.requires_grad for p in module.weight.parameters())
            dense[module.weight] = nn.Parameter(to_dense(value), requires_grad=trainable)
        layers.append((module, dense_like(module, dense[module.weight])))
        size, structure = dense[module.weight].numel(), f"{structure_name(value)} to dense"
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


# ---------------------------------------------------------------- what compress_ and replace_ share
def _sketch(selection: Selection) -> list[StructuredMatrix]:
    """The new weights without memory; raises for all layers that cannot take their config."""

    def sketch(target: Target) -> Callable[[], StructuredMatrix]:
        return lambda: target.config.random(target.shape, dtype=target.weight.dtype, device="meta")

    return collect(
        [(target.name, sketch(target)) for target in selection.targets],
        "Exclude them with filter_fn, or give them another config",
    )


def collect(
    sketches: list[tuple[str, Callable[[], StructuredMatrix]]], advice: str, most: int | None = None
) -> list[StructuredMatrix]:
    """Call every function, and raise one error for all that fail.

    Args:
        sketches: names of layers, and functions that make their weights on the meta device.
        advice: what to do about those that fail.
        most: how many failures to tell of, all by default.

    Raises:
        structmat.BudgetError: if a budget is too small for a layer.
        ValueError: if the structure does not exist for a layer's size.
    """
    done: list[StructuredMatrix] = []
    problems: list[tuple[str, ValueError]] = []
    for name, make in sketches:
        try:
            done.append(make())
        except ValueError as error:
            problems.append((name, error))
    if problems:
        kind = BudgetError if any(isinstance(error, BudgetError) for _, error in problems) else ValueError
        told = [f"  {name}: {error}" for name, error in problems[:most]]
        text = "\n".join(told + ([f"  and {len(problems) - len(told)} more"] if len(told) < len(problems) else []))
        count = f"{len(problems)} of {len(sketches)} layers cannot take their config; nothing was changed"
        raise kind(f"{count}. {advice}:\n{text}")
    return done


def _check_values(selection: Selection) -> None:
    meta = [t.name for t in selection.targets if t.weight.device.type == "meta"]
    if meta:
        raise ValueError(
            f"the weights of {', '.join(meta[:5])}{' and others' if len(meta) > 5 else ''} are on the meta device: "
            "there is nothing to project. Load them first, or use dry_run=True or replace_"
        )
    broken = [t.name for t in selection.targets if not torch.isfinite(t.weight).all()]
    if broken:
        raise ValueError(
            f"these weights have NaN or infinite entries, nothing was changed: {', '.join(broken)}; exclude them with "
            "filter_fn"
        )


def _row(target: Target, after: StructuredMatrix, result: Projection | None = None, seconds: Any = None) -> LayerRow:
    size = math.prod(target.shape)
    error, bound = (result.error, result.bound) if result else (None, None)
    name, words = target.name, structure_name(after)
    return LayerRow(name, words, target.shape, size, after.num_params, 2 * size, after.flops, error, bound, seconds)


def _report(selection: Selection, rows: list[LayerRow], before: int, dry_run: bool) -> Report:
    new = iter(rows)
    every = tuple(next(new) if row is None else row for row in selection.rows)
    change = sum(row.params_after - row.params_before for row in rows)
    return Report(every, before, before + change, dry_run, selection.unused_patterns)
