"""How much a model's output changes for an error in one of its layers, measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from structmat.base import StructuredMatrix
from structmat.calibrated import metric_of
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.surgery.batches import call, device_of, to_device
from structmat.surgery.calibrating import undisturbed
from structmat.surgery.fitting import check_moments, fit_layer, own_bias, own_biases
from structmat.surgery.replace import check_values, sketch_all
from structmat.surgery.selection import Configs, FilterFn, Target, select
from structmat.surgery.spec import is_conv1d

# Rows of logits whose distributions are compared at a time, in double precision.
_CHUNK = 1 << 22


def sensitivity(
    model: nn.Module,
    calibration: Mapping[str, Moments],
    batches: Iterable[Any],
    config: Configs,
    *,
    output: Callable[[Any, Any], Tensor] | None = None,
    distance: str | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    filter_fn: FilterFn | None = None,
    damping: float = 0.1,
    progress: bool | None = None,
) -> dict[str, float]:
    """How far the model's output moves for a unit of each layer's calibrated squared error: ``weight`` of ``allocate``.

    Each layer k alone is replaced by its projection on ``config``, with its bias corrected as :func:`compress_` does,
    while all others stay dense: ``s_k = mean d(f, f_k) / e_k``, where f and f_k are the outputs of the model before and
    after, d their distance, and e_k the squared error ``E |T^(1/2) (W - M) x|^2`` of the layer over the calibration.
    Where errors are small, that of all layers together is about ``sum_k s_k e_k``, which :func:`allocate` makes least.
    A few dozen samples are enough, and one size of one structure: on MiniLM 16 texts, and a quarter or a half.

    A layer whose projection is exact, or moves nothing, tells nothing: it gets the smallest weight of the others. The
    model is run in evaluation mode, uncompiled; it is not changed, and is left as it was, after an exception too.

    Args:
        model: any module that contains linear layers.
        calibration: second moments of the layers' inputs, from :func:`calibrate`.
        batches: as for :func:`calibrate`; they are run through once.
        config: with which errors are made, such as ``LowRankConfig(ratio=0.25)``; as for :func:`compress_`.
        output: called with what the model returned and the batch, returns the tensor (..., d) that counts. By default
            that is the returned tensor, ``logits`` or ``last_hidden_state``, without the positions that a mapping's
            ``attention_mask`` of shape (B, T) leaves out of a tensor of shape (B, T, ...).
        distance: over the last dimension, of which the mean over all others and all batches is taken: "squared", the
            squared Euclidean distance, or "kl", the Kullback-Leibler divergence of softmax(f_k) from softmax(f). None
            for "kl" where the output is the model's ``logits``, of more than one class, else "squared".
        forward: called with the model and the batch in place of ``model(...)``.
        filter_fn: called with name and module; layers for which it returns false are left out.
        damping: of the moments, for :func:`structmat.project`.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        Positive numbers by layer name.

    Raises:
        structmat.BudgetError: if the budget in the config is too small for a layer.
        TypeError: if an argument, a batch or an output has the wrong type.
        ValueError: if there are no batches or no layers, the calibration lacks a layer or is of other sizes, no output
            is found, an output has another shape after the replacement, or a distance is not finite (layer and batch
            are named).

    Cost: one forward pass of every batch for each layer, and one more; one projection of each layer. Memory: the
    projections of all layers, and the outputs of one batch.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
        >>> batches = [torch.randn(200, 32)]
        >>> calibration = surgery.calibrate(model, batches)
        >>> weight = surgery.sensitivity(model, calibration, batches, structmat.LowRankConfig(rank=4))
        >>> round(weight["1"], 4)  # the last layer's error is the model's
        1.0
        >>> plan = surgery.allocate(
        ...     model, 0.5, structmat.LowRankConfig(ratio=1), calibration=calibration, weight=weight
        ... )
    """
    if distance not in (None, "squared", "kl"):
        raise ValueError(f'distance must be "squared", "kl" or None, got {distance!r}')
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got a {type(batches).__name__}; put one in a list")
    selection = select(model, config, filter_fn)
    sketch_all(selection)
    check_values(selection)
    check_moments(selection.targets, calibration)
    targets, own = selection.targets, own_biases(model)
    device = device_of(model)
    hidden = None if progress is None else not progress
    replaced, errors = [], []
    for target in targets:
        value, bias, error = _replacement(target, calibration[target.name], damping, own_bias(target, own))
        replaced.append((value, bias))
        errors.append(error)
    moved, rows = [0.0] * len(targets), 0

    def run(batch: Any) -> tuple[Tensor, bool]:
        found = call(model, batch) if forward is None else forward(model, batch)
        return _counted(found, batch, output)

    with undisturbed(model, gradients=False), tqdm(desc="sensitivity", disable=hidden, unit="pass") as bar:
        for index, batch in enumerate(batches):
            batch = to_device(batch, device)
            dense, logits = run(batch)
            kind = distance or ("kl" if logits and dense.shape[-1] > 1 else "squared")
            rows += dense.shape[:-1].numel()
            for k, (target, (value, bias)) in enumerate(zip(targets, replaced, strict=True)):
                if not errors[k]:
                    continue
                with _standing_in(target, value, bias):
                    after, _ = run(batch)
                if after.shape != dense.shape:
                    raise ValueError(
                        f"with {target.name} replaced, batch {index} (counted from 0) gives an output of shape "
                        f"{tuple(after.shape)} instead of {tuple(dense.shape)}: its shape must not depend on values"
                    )
                found = _distance(dense, after, kind)
                if not math.isfinite(found):
                    raise ValueError(
                        f"with {target.name} replaced, the output of batch {index} (counted from 0), or that of the "
                        "dense model, has NaN or infinite entries"
                    )
                moved[k] += found
                bar.update()
    if not rows:
        raise ValueError("batches is empty, or nothing of the outputs counts: there is nothing to measure")
    weights = {t.name: d / rows / e if e > 0 else 0.0 for t, d, e in zip(targets, moved, errors, strict=True)}
    least = min((w for w in weights.values() if w > 0), default=1.0)
    return {name: w if w > 0 else least for name, w in weights.items()}


def _replacement(
    target: Target, moments: Moments, damping: float, bias: Tensor | None
) -> tuple[StructuredMatrix, Tensor | None, float]:
    """A layer's projection, the bias with it, and the squared calibrated error, 0 where that is rounding."""
    result, corrected = fit_layer(target, moments, damping, bias)
    relative = result.calibrated_error or 0.0
    metric = metric_of(moments if corrected is None else moments.centred(), target.weight)
    error = relative**2 * metric.squared(target.weight.to(work_dtype(target.weight)))
    exact = relative <= 16 * torch.finfo(target.weight.dtype).eps
    after = target.module._parameters.get("bias") if corrected is None else corrected
    return result.matrix, after, 0.0 if exact else error


@contextlib.contextmanager
def _standing_in(target: Target, value: StructuredMatrix, bias: Tensor | None) -> Iterator[None]:
    """While entered, the layer puts out what another weight and bias make of its input."""
    weight = value.to_dense()  # as nn.Linear under autocast too

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if bias is not None and is_conv1d(target.module):  # which multiplies in the dtype of its weight
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)

    # Before the other hooks, which are to see and change what the replaced layer puts out.
    handle = target.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- what of the output counts
def _counted(found: Any, batch: Any, output: Callable[[Any, Any], Tensor] | None) -> tuple[Tensor, bool]:
    """The output as (..., d), and whether it is the model's logits."""
    logits = False
    if output is not None:
        value: Any = output(found, batch)
    elif isinstance(found, Tensor):
        value = found
    else:
        value = getattr(found, "logits", None)
        logits = isinstance(value, Tensor)
        value = value if logits else getattr(found, "last_hidden_state", None)
        if value is None:
            raise ValueError(
                f"the model returned a {type(found).__name__} without logits or last_hidden_state: give output"
            )
    if not isinstance(value, Tensor):
        raise TypeError(f"output must return a tensor, got a {type(value).__name__}")
    value = value.detach()
    if output is None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.ndim == 2 and value.ndim > 2 and value.shape[:2] == mask.shape:
            value = value[mask.to(value.device) != 0]
    return value if value.ndim > 1 else value.reshape(-1, 1), logits


def _distance(dense: Tensor, after: Tensor, kind: str) -> float:
    """The sum over all vectors of the last dimension."""
    total, step = 0.0, max(1, _CHUNK // max(dense.shape[-1], 1))
    double = work_dtype(dense) if dense.is_floating_point() or dense.is_complex() else torch.float64
    pairs = (t.reshape(-1, t.shape[-1]).split(step) for t in (dense, after))
    for a, b in zip(*pairs, strict=True):
        a, b = a.to(double), b.to(double)
        if kind == "kl":
            total += F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True).item()
        else:
            total += (a - b).abs().square().sum().item()
    return total
