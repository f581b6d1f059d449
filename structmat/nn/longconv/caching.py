"""Taps that are made once for many calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from structmat.nn.longconv import _registry
from structmat.nn.longconv.module import LongConv


@contextlib.contextmanager
def cache_taps(model: nn.Module) -> Iterator[None]:
    """A context in which every :class:`~structmat.nn.LongConv` of a model makes its taps once for each length.

    For inference: an implicit filter's network is a good part of a layer's time, the larger the smaller the batch.
    Parameters and buffers of the filters must not change inside, nor be replaced by others (as by
    ``torch.func.functional_call``): taps that are there would not be made anew. They are dropped on leaving, also by an
    exception; contexts may be nested, then on leaving the last one.

    Taps are made as ever, and nothing is kept, where a filter is in training mode, where gradients are enabled and a
    parameter of the filter requires them, inside of transforms of ``torch.func``, and in what ``torch.compile`` or
    ``torch.export`` compiles. A CUDA graph that is captured inside uses the taps that a call before it, for the same
    length, has left: replay it inside only. Without such a call it makes them in every replay.

    Args:
        model: a layer, or a model that has some.

    Raises:
        TypeError: if model is no module.
        ValueError: if it has no LongConv.

    Memory: directions * channels * length * 4 bytes (of float32) for every layer and every length that is asked for.

    Example:
        >>> import torch, structmat
        >>> conv = structmat.nn.LongConv(64, 1024).eval()
        >>> with torch.no_grad(), structmat.nn.cache_taps(conv):
        ...     for u in torch.randn(10, 2, 64, 1000):
        ...         y = conv(u)  # the filter has run once
    """
    model_: Any = model
    if not isinstance(model_, nn.Module):
        raise TypeError(f"model must be a module, got {type(model_).__name__}")
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, LongConv)]
    if not layers:
        raise ValueError(f"model must have a LongConv whose taps can be kept, {type(model).__name__} has none")
    _registry.hold(layers)
    try:
        yield
    finally:
        _registry.release(layers)
