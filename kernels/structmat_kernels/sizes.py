"""Arithmetic of tile sizes; Triton's own versions cost microseconds a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def pad(size: int) -> int:
    """A tile's extent for ``size`` entries: a power of two, as Triton asks, of at least a matrix unit's 16."""
    return max(16, power(size))
