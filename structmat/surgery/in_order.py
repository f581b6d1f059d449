"""Compression layer after layer, each for what the compressed layers before it give out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from structmat.projecting import Projection
from structmat.projection.moments import Moments
from structmat.surgery.batches import call, device_of, to_device
from structmat.surgery.calibrating import calibrate, undisturbed
from structmat.surgery.fitting import fit_layer, own_bias, own_biases
from structmat.surgery.selection import Target
from structmat.surgery.swap import disable_fused_encoder, structured_like, swap

Fitted = tuple[Projection, Tensor | None, float]


class _Reached(Exception):
    """The layer behind which nothing is needed has run."""


def fit_in_order(
    model: nn.Module,
    targets: list[Target],
    calibration: Mapping[str, Moments],
    damping: float,
    batches: Iterable[Any],
    hidden: bool | None,
) -> dict[str, Fitted]:
    """Projections of all layers, each with the moments of what it is given once those before it are compressed.

    Its bias then makes the mean of its outputs that of the dense layer's. Layers that are given the same tensor are
    done together. The work is done in a copy of the model.

    Args:
        model: is not changed.
        targets: the layers.
        calibration: of the dense model.
        damping: for :func:`structmat.project`.
        batches: as for :func:`calibrate`; run through again for every group of layers.
        hidden: of the progress bar, as for tqdm.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("compensate has no batches")
    by_name = {target.name: target for target in targets}
    work = copy.deepcopy(model)
    found: dict[str, Fitted] = {}
    with tqdm(total=len(targets), desc="compressing", disable=hidden) as bar:
        for group in _groups(work, list(by_name), batches[0]):
            start, own = time.perf_counter(), own_biases(work)
            seen = _seen(work, group, batches)
            pairs = []
            for name in group:
                dense, target = calibration[name], by_name[name]
                here = Target(name, work.get_submodule(name), target.config)
                # The gradients of the outputs are known of the dense model only.
                moments = dataclasses.replace(seen.get(name, dense), outputs=dense.outputs)
                bias = own_bias(here, own)
                result, corrected = fit_layer(here, moments, damping, bias, dense.mean)
                pairs.append((here.module, structured_like(here.module, result.matrix)))
                if bias is not None and corrected is not None:
                    with torch.no_grad():
                        bias.copy_(corrected)
                found[name] = result, corrected, (time.perf_counter() - start) / len(group)
            swap(work, pairs)
            disable_fused_encoder(work)
            bar.update(len(group))
    return found


def _groups(model: nn.Module, names: list[str], batch: Any) -> list[list[str]]:
    """The layers in the order in which a batch reaches them, those with the same input together; then the others."""
    order: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.setdefault(name, args[0] if args else next(iter(kwargs.values()), None))

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n), with_kwargs=True) for n in names]
    try:
        with undisturbed(model, gradients=False):
            call(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Any, list[str]]] = []
    for name, x in order.items():
        if groups and x is not None and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [members for _, members in groups] + [[name] for name in names if name not in order]


def _seen(model: nn.Module, group: list[str], batches: list[Any]) -> Mapping[str, Moments]:
    """The moments of what these layers are given now; none of a layer that no batch reaches."""
    last = model.get_submodule(group[-1])
    calls, expected = 0, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if expected and calls == expected:
            raise _Reached

    def forward(model: nn.Module, batch: Any) -> None:
        nonlocal calls, expected
        calls = 0
        with contextlib.suppress(_Reached):
            call(model, batch)
            # The first batch runs to its end. Later ones stop behind the layer's call if it had just one: how often
            # a layer runs that is called again may depend on the batch.
            expected = 1 if calls == 1 else 0

    handle = last.register_forward_hook(count)
    try:
        return calibrate(model, batches, lambda name, _: name in group, forward=forward, progress=False)
    finally:
        handle.remove()
