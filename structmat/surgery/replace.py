"""Replace the linear layers of a model by structured ones."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from structmat.base import StructuredMatrix
from structmat.config import BudgetError
from structmat.projecting import Projection
from structmat.projection.moments import Moments
from structmat.surgery.fitting import check_moments, fit_layer, own_bias, own_biases
from structmat.surgery.in_order import fit_in_order
from structmat.surgery.plan import Allocation
from structmat.surgery.report import LayerRow, Report
from structmat.surgery.selection import (
    Configs,
    FilterFn,
    Selection,
    Target,
    check_model,
    count_params,
    select,
)
from structmat.surgery.spec import structure_name
from structmat.surgery.swap import disable_fused_encoder, structured_like, swap


def compress_(
    model: nn.Module,
    config: Configs,
    filter_fn: FilterFn | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    calibration: Mapping[str, Moments] | None = None,
    damping: float = 0.1,
    compensate: Iterable[Any] | None = None,
) -> Report:
    """Replace linear layers, in place, by the nearest structured ones.

    Layers of exact type ``nn.Linear`` and transformers' ``Conv1D`` are projected by :func:`structmat.project`. The new
    ones keep bias, dtype, device, training mode, ``requires_grad``, hooks, extra attributes and every place in the
    model under which the old one stood. Subclasses, parametrized layers and layers whose weight another module shares
    are left alone, and the report says why. Convolutions are none of these layers, those of kernel 1 neither, although
    :func:`calibrate` watches them: project ``conv.weight.flatten(1)`` with the moments of such a one by
    :func:`structmat.project`, and put a :class:`structmat.nn.StructuredLinear` in its place that is given the channels
    last. Either all layers that the config names are replaced or, after an error
    or an interruption, none: until the last one is ready, the old weights and the new ones are both in memory.

    With a calibration the outputs of the layers are kept instead of the entries of their weights: see
    :func:`structmat.project`. Of a layer with a bias of its own the centred moments count, and the bias takes up the
    mean of what the weight misses, ``(W - M) E[x]``, in place.

    The weights are new parameters: make the optimizer afterwards. A module that reads ``layer.weight`` of a child as a
    tensor will find a module there.

    Args:
        model: any module that contains such layers.
        config: one config for all layers, or a mapping of patterns for dotted names (``"encoder.*.fc1"``, as in
            :mod:`fnmatch`) to configs, of which the first match counts; what no pattern matches is left alone. Such a
            mapping is the plan that :func:`allocate` makes.
        filter_fn: called with name and module; layers for which it returns false are left alone.
        dry_run: compute sizes and costs only, and change nothing. Weights are not looked at.
        progress: whether to show a progress bar; None shows it on a terminal.
        calibration: second moments of the layers' inputs by name, from :func:`calibrate`, or None for the nearest
            weights.
        damping: of the moments, for :func:`structmat.project`.
        compensate: batches as for :func:`calibrate`, which needs to have seen the dense model. The layers are then
            compressed one after the other (those with the same input together) in a copy of the model, each for what
            it is given by the compressed ones before it, and each bias makes the mean of what the layer gives out that
            of the dense model. The batches run through a part of the model once for every such group.

    Returns:
        One row for each layer: sizes, operations, the achieved relative error, and the bound that certifies it.

    Raises:
        structmat.BudgetError: if a budget is too small for a layer; all such layers are named.
        TypeError: if an argument has the wrong type.
        ValueError: if nothing is to be replaced, a structure does not exist for a layer's size, a weight has NaN or
            infinite entries or is on the meta device, the calibration lacks a layer or is of other sizes, a plan is
            for another model, the model is itself a linear layer, or it is wrapped for distributed training.

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
    selection = _select(model, config, filter_fn)
    sketches = sketch_all(selection)
    if not dry_run:
        check_values(selection)
    if calibration is not None:
        check_moments(selection.targets, calibration)
    elif compensate is not None:
        raise ValueError("compensate needs the calibration of the dense model")
    before, own = count_params(model), own_biases(model)
    hidden = True if dry_run else None if progress is None else not progress  # None: shown on a terminal only
    if dry_run:
        rows = [row_of(target, sketch) for target, sketch in zip(selection.targets, sketches, strict=True)]
        return report_of(selection, rows, before, dry_run)
    if compensate is not None and calibration is not None:
        fitted = fit_in_order(model, selection.targets, calibration, damping, compensate, hidden)
    else:
        fitted = {}
        for target in tqdm(selection.targets, "compressing", disable=hidden):
            start = time.perf_counter()
            moments = None if calibration is None else calibration[target.name]
            found = fit_layer(target, moments, damping, own_bias(target, own))
            fitted[target.name] = *found, time.perf_counter() - start
    rows, layers, biases = [], [], []
    for target in selection.targets:
        result, corrected, seconds = fitted[target.name]
        rows.append(row_of(target, result.matrix, result, seconds))
        layers.append((target.module, structured_like(target.module, result.matrix)))
        if corrected is not None:
            biases.append((own_bias(target, own), corrected))
    swap(model, layers)
    with torch.no_grad():
        for bias, corrected in biases:
            bias.copy_(corrected)
    disable_fused_encoder(model)
    return report_of(selection, rows, before, dry_run=False)


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
    selection = _select(model, config, filter_fn)
    sketches = sketch_all(selection)
    before, layers = count_params(model), []
    for target in selection.targets:
        weight = target.weight
        value = target.config.random(
            target.shape, dtype=weight.dtype, device=weight.device if device is None else device
        )
        layers.append((target.module, structured_like(target.module, value, fresh_bias=True)))
    swap(model, layers)
    disable_fused_encoder(model)
    rows = [row_of(target, sketch) for target, sketch in zip(selection.targets, sketches, strict=True)]
    return report_of(selection, rows, before, dry_run=False)


# ---------------------------------------------------------------- what compress_ and replace_ share
def _select(model: nn.Module, config: Configs, filter_fn: FilterFn | None) -> Selection:
    if isinstance(config, Allocation):
        check_model(model)
        config.check(model)
    return select(model, config, filter_fn)


def sketch_all(selection: Selection) -> list[StructuredMatrix]:
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


def check_values(selection: Selection) -> None:
    """Raise unless all weights are there and finite."""
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


def row_of(target: Target, after: StructuredMatrix, result: Projection | None = None, seconds: Any = None) -> LayerRow:
    """A layer's row of the report, with errors where there is a projection."""
    size = math.prod(target.shape)
    name, words = target.name, structure_name(after)
    row = LayerRow(name, words, target.shape, size, after.num_params, 2 * size, after.flops, seconds=seconds)
    if result is None:
        return row
    names = ("error", "bound", "calibrated_error", "plain_calibrated_error")
    return dataclasses.replace(row, **{name: getattr(result, name) for name in names})


def report_of(selection: Selection, rows: list[LayerRow], before: int, dry_run: bool) -> Report:
    """The report: rows of the layers that are replaced, in the order of the selection's targets, and of the others."""
    new = iter(rows)
    every = tuple(next(new) if row is None else row for row in selection.rows)
    change = sum(row.params_after - row.params_before for row in rows)
    return Report(every, before, before + change, dry_run, selection.unused_patterns)
