"""The operations of structmat_kernels, looked up when a case is made: a missing one makes a row that says so."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch


def operation(module: str, name: str) -> Callable[..., Any] | str:
    """The public function ``structmat_kernels.<module>.<name>`` if it chooses between backends, else what is wrong."""
    path = f"structmat_kernels.{module}"
    try:
        found = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        return str(error)
    if "backend" not in inspect.signature(found).parameters:
        return f"{path}.{name} takes no backend: it has no kernel"
    return found


def ways(
    module: str, name: str, device: torch.device, reference: Callable[..., Any] | None = None
) -> list[tuple[str, str, Callable[..., Any] | str]]:
    """How an operation can be run on a device: (suffix of the name, kind, function or what is wrong).

    Args:
        module: the operation's folder.
        name: the function's name.
        device: kernels run on a GPU only.
        reference: plain PyTorch for operations whose public function has no backends yet.
    """
    found = operation(module, name)
    plain = reference or found if isinstance(found, str) else functools.partial(found, backend="torch")
    kernel = found if isinstance(found, str) else functools.partial(found, backend="triton")
    found_ways = [("", "ours", kernel), (", PyTorch", "reference", plain)]
    return found_ways if device.type == "cuda" else found_ways[1:]
