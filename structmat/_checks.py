"""Argument checks shared by the whole library: every message names the argument, what came and what would be right."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, value: Any, min_ndim: int = 0) -> None:
    """Raise unless ``value`` is a tensor with at least ``min_ndim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} dimensions, got shape {tuple(value.shape)}")


def check_inexact(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is floating point or complex."""
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be floating point or complex, got {value.dtype}; convert it with .to(dtype)")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors share dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype} but {other_name} has {other.dtype}; convert one of them with .to(dtype)"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {other.device}; move one of them with .to(device)"
        )


def check_int(name: str, value: Any, low: int = 1) -> int:
    """Return ``value`` as an ``int``; raise unless it is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value  # pyright: ignore[reportReturnType]


def check_matrix_shape(shape: Any, min_size: int = 1) -> tuple[tuple[int, ...], int, int]:
    """Split a requested ``(*batch, rows, columns)`` into batch, rows and columns."""
    try:
        sizes = tuple(int(n) for n in shape)
    except TypeError:
        raise TypeError(f"shape must be a sequence of integers (*batch, rows, columns), got {shape!r}") from None
    if len(sizes) < 2:
        raise ValueError(f"shape must be (*batch, rows, columns), got {sizes}")
    if min(sizes[-2:]) < min_size or min(sizes) < 0:
        raise ValueError(f"shape must have at least {min_size} row and {min_size} column, got {sizes}")
    return sizes[:-2], sizes[-2], sizes[-1]


def check_broadcast(name: str, shape: tuple[int, ...], other_name: str, other: tuple[int, ...]) -> tuple[int, ...]:
    """Return the broadcast of two batch shapes, or raise naming both."""
    for a, b in zip(reversed(shape), reversed(other), strict=False):
        if a != b and a != 1 and b != 1:
            raise ValueError(
                f"batch dimensions {tuple(shape)} of {name} do not broadcast with {tuple(other)} of {other_name}"
            )
    return tuple(torch.broadcast_shapes(shape, other))


def as_scalar(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Turn a Python number or a 0-d tensor into a 0-d tensor of ``dtype``; anything that would lose a part raises."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise TypeError(
                f"* takes a scalar, got a tensor of shape {tuple(value.shape)}; "
                "multiply by structmat.Diagonal(d) to scale rows or columns"
            )
        is_complex = value.is_complex()
    elif isinstance(value, numbers.Number) and not isinstance(value, bool):
        is_complex = isinstance(value, complex)
    else:
        raise TypeError(f"* takes a number or a 0-d tensor, got {type(value).__name__}; use @ for products")
    if is_complex and not dtype.is_complex:
        raise TypeError(f"a complex scalar cannot scale a matrix of {dtype}; convert it with .to(torch.complex128)")
    if isinstance(value, Tensor):
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"the scalar is on {value.device} but the matrix is on {device}")
        return value.to(dtype=dtype, device=device)
    return torch.tensor(value, dtype=dtype, device=device)
