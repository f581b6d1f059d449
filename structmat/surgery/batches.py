"""Batches of whatever a model takes: brought to its device, and given to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device and without their graphs; mappings become dicts, what holds none stays."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def call(model: nn.Module, batch: Any, options: Mapping[str, Any] | None = None) -> Any:
    """What a model returns for a batch.

    Args:
        model: any module.
        batch: a mapping becomes keyword arguments, a tuple or list positional ones, a tensor the only one.
        options: further keyword arguments; those of a mapping go before.

    Raises:
        TypeError: if the batch is something else.
    """
    options = options or {}
    if isinstance(batch, Mapping):
        return model(**{**options, **batch})
    if isinstance(batch, (tuple, list)):
        return model(*batch, **options)
    if isinstance(batch, Tensor):
        return model(batch, **options)
    raise TypeError(
        f"a batch must be a mapping, tuple, list or tensor, got a {type(batch).__name__}; for others, give forward, a "
        "function of model and batch"
    )


def device_of(model: nn.Module, default: torch.device | None = None) -> torch.device:
    """Where a model's tensors are, by the first that is anywhere (offloaded ones are on the meta device)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return default or torch.device("cpu")
