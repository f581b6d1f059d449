"""One layer of a model in the metric of its data: its moments, its projection, and what its bias takes up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.base import StructuredMatrix
from structmat.projecting import Projection, project
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.surgery.selection import Target


def own_biases(model: nn.Module) -> set[Tensor]:
    """The biases that no other module shares: they can take up the mean of an error."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return {p for p, count in owners.items() if count == 1}


def own_bias(target: Target, own: set[Tensor]) -> Tensor | None:
    """The layer's bias, or None where it has none of its own: then its moments are not centred."""
    bias = target.module._parameters.get("bias")
    return bias if bias in own else None


def check_moments(targets: list[Target], calibration: Mapping[str, Moments]) -> None:
    """Raise unless the calibration has moments of every layer, of the layers' sizes."""
    if not isinstance(calibration, Mapping):
        raise TypeError(f"calibration must be what calibrate returned, got {type(calibration).__name__}")
    if missing := [t.name for t in targets if t.name not in calibration]:
        raise ValueError(
            f"the calibration has no moments of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}: "
            f"it is of another model, or these layers saw no input. It has {len(calibration)} layers. Exclude them "
            "with filter_fn, or calibrate on data that reaches them"
        )
    for target in targets:
        if (size := len(calibration[target.name].mean)) != target.shape[1]:
            raise ValueError(
                f"the calibration is of another model: {target.name} has {target.shape[1]} inputs, its moments are of "
                f"{size}"
            )


def fit_layer(
    target: Target, moments: Moments | None, damping: float, bias: Tensor | None, mean: Tensor | None = None
) -> tuple[Projection, Tensor | None]:
    """A layer's projection, and its bias with the mean of what the weight misses.

    Args:
        target: the layer.
        moments: of what the layer is given, or None for the nearest weight.
        damping: for :func:`structmat.project`.
        bias: of the layer, if it may be changed.
        mean: of what the layer was given in the dense model, if that is something else.
    """
    if moments is None or bias is None:
        return project(target.weight, target.config, moments, damping), None
    result = project(target.weight, target.config, moments.centred(), damping)
    mean = moments.mean if mean is None else mean
    return result, _corrected(bias, target.weight, result.matrix, mean, moments.mean)


@torch.no_grad()
def _corrected(bias: Tensor, weight: Tensor, value: StructuredMatrix, dense: Tensor, seen: Tensor) -> Tensor:
    place = {"dtype": work_dtype(weight), "device": weight.device}
    missed = F.linear(dense.to(**place), weight.to(**place)) - value.to(place["dtype"]).linear(seen.to(**place))
    return (bias.to(**place) + missed).to(bias.dtype)
