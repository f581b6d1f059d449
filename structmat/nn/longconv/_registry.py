"""Which layers keep their taps at the moment, and the taps they have kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from structmat._autocast import autocast_dtype
from structmat_kernels.autograd import is_plain


@dataclasses.dataclass
class Kept:
    """The taps of a layer by what they were made for, and how many contexts hold them."""

    taps: dict[tuple[Any, ...], Tensor] = dataclasses.field(default_factory=dict)
    holders: int = 0


# Not attributes of the layers: copies and pickles of a model must not take taps along that their parameters outdate.
_LAYERS: dict[nn.Module, Kept] = {}
_REGIONS = (torch.device("cpu"), torch.device("cuda"))


def hold(layers: list[nn.Module]) -> None:
    """Keep the taps of layers from now on."""
    for layer in layers:
        _LAYERS.setdefault(layer, Kept()).holders += 1


def release(layers: list[nn.Module]) -> None:
    """Take back one :func:`hold`; with the last one the taps go."""
    for layer in layers:
        kept = _LAYERS[layer]
        kept.holders -= 1
        if kept.holders == 0:
            del _LAYERS[layer]


def taps_of(layer: nn.Module, filter: nn.Module, length: int) -> Tensor:
    """``filter(length)``, or what it was before for this layer if that is kept and holds no graph."""
    # The first question is the only one that torch.compile sees: compiled code makes taps itself.
    if torch.compiler.is_compiling() or layer not in _LAYERS or not _constant(filter):
        return filter(length)
    # A custom filter may be rounded by an autocast region; tensors of inference mode are of no use outside of it.
    key = (length, torch.is_inference_mode_enabled(), *map(autocast_dtype, _REGIONS))
    kept = _LAYERS[layer].taps
    if key not in kept:
        taps = filter(length)
        # What a graph under capture makes is not there before its first replay, and is lost with it.
        lasting = isinstance(taps, Tensor) and not taps.requires_grad
        if not lasting or (taps.is_cuda and torch.cuda.is_current_stream_capturing()):
            return taps
        kept[key] = taps
    return kept[key]


def _constant(filter: nn.Module) -> bool:
    """Whether taps made now are good for later: no dropout, no gradients, nobody who looks at the operations."""
    if filter.training or not is_plain(()):
        return False
    return not torch.is_grad_enabled() or not any([p.requires_grad for p in filter.parameters()])
