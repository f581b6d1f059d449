"""What lazy values of several parts share: checks, the common batch, operation counts."""

from __future__ import annotations

import math
from typing import Any

import torch

from structmat._checks import check_broadcast
from structmat.base import StructuredMatrix


def check_pair(a: StructuredMatrix, b: StructuredMatrix, what: str) -> None:
    for name, value in (("left", a), ("right", b)):
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"the {name} operand of {what} must be a StructuredMatrix, got {type(value).__name__}")
    if a.dtype != b.dtype:
        raise TypeError(f"{what} needs one dtype, got {a.dtype} and {b.dtype}; convert one with .to(dtype)")
    if a.device != b.device:
        raise ValueError(f"{what} needs one device, got {a.device} and {b.device}; move one with .to(device)")
    check_broadcast("the left operand", a.batch_shape, "the right operand", b.batch_shape)


def check_tuple(name: str, values: Any, what: str) -> tuple[StructuredMatrix, ...]:
    """Return values as a tuple; raise unless they are structured matrices of one dtype and device that broadcast."""
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"{name} of a {what} must be a non-empty tuple of structured matrices, got {values!r}")
    for value in values:
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"{name} of a {what} must be StructuredMatrix values, got a {type(value).__name__}")
        check_pair(values[0], value, f"a {what}")
    return tuple(values)


def common_batch(values: tuple[StructuredMatrix, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(v.batch_shape for v in values)))


def broadcast_count(parts: tuple[StructuredMatrix, ...], counts: list[int]) -> int:
    """Operations of the parts together: a part with fewer batches is applied once for each batch of the whole."""
    batch = math.prod(common_batch(parts))
    return sum(c * batch // max(math.prod(p.batch_shape), 1) for p, c in zip(parts, counts, strict=True))
