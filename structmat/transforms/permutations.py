"""Named permutations, as matrices: ``(P x)[i] = x[perm[i]]``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.matrices.permutation import Permutation
from structmat.transforms._build import real_dtype, reversed_digits


def _permutation(perm: Tensor, dtype: torch.dtype | None, device: Any) -> Permutation:
    return Permutation(perm.to(torch.get_default_device() if device is None else device), real_dtype(dtype))


def power_of_two(name: str, n: int) -> int:
    """The exponent of n; raise unless it is a power of two."""
    if check_int(name, n) & (n - 1):
        raise ValueError(f"{name} must be a power of two, got {n}")
    return n.bit_length() - 1


def bit_reversal(n: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Permutation:
    """``perm[i]`` is i with its log2 n binary digits reversed: its own inverse. No parameters, no operations.

    Args:
        n: a power of two.
        dtype: what the permutation multiplies, torch's default dtype if None; complex too.
        device: where the indices live, the default device if None.

    Returns:
        A :class:`~structmat.Permutation` of shape (n, n).

    Raises:
        ValueError: if n is no power of two or dtype is an integer type.

    Example:
        >>> from structmat.transforms import bit_reversal
        >>> bit_reversal(8).perm
        tensor([0, 4, 2, 6, 1, 5, 3, 7])
    """
    return _permutation(reversed_digits([2] * power_of_two("n", n) or [1]), dtype, device)


def digit_reversal(radices: Iterable[int], *, dtype: torch.dtype | None = None, device: Any = None) -> Permutation:
    """Reversed digits in mixed radices: what sorts the inputs of a Cooley-Tukey transform.

    With radices r_1, ..., r_k, digits i_j < r_j, and i = ((i_1 r_2 + i_2) r_3 + ...) + i_k, it is
    ``perm[i] = i_1 + r_1 (i_2 + r_2 (i_3 + ...))``. The inverse is the permutation of the reversed radices.

    Args:
        radices: integers of at least 1, as [2, 5, 5] for n = 50.
        dtype: see :func:`bit_reversal`.
        device: see :func:`bit_reversal`.

    Returns:
        A :class:`~structmat.Permutation` of the product of the radices.

    Raises:
        TypeError: if a radix is not an integer.
        ValueError: if there is none, or one is below 1.

    Example:
        >>> from structmat.transforms import digit_reversal
        >>> digit_reversal([2, 3]).perm
        tensor([0, 2, 4, 1, 3, 5])
    """
    sizes = [check_int("a radix", r) for r in radices]
    if not sizes:
        raise ValueError("radices must hold at least one number, got none")
    return _permutation(reversed_digits(sizes), dtype, device)


def stride_permutation(n: int, s: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Permutation:
    """Reads with stride s: entries 0, s, 2 s, ..., then 1, s + 1, ...: the transpose of an (n / s) x s array.

    The inverse is ``stride_permutation(n, n // s)``.

    Args:
        n: size.
        s: stride, a divisor of n.
        dtype: see :func:`bit_reversal`.
        device: see :func:`bit_reversal`.

    Returns:
        A :class:`~structmat.Permutation` of shape (n, n).

    Raises:
        ValueError: if s does not divide n.

    Example:
        >>> from structmat.transforms import stride_permutation
        >>> stride_permutation(6, 3).perm
        tensor([0, 3, 1, 4, 2, 5])
    """
    check_int("n", n)
    if n % check_int("s", s):
        raise ValueError(f"s must divide n = {n}, got {s}")
    return _permutation(reversed_digits([s, n // s]), dtype, device)


def reversal(n: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Permutation:
    """``(P x)[i] = x[n - 1 - i]``, its own inverse.

    Args:
        n: size.
        dtype: see :func:`bit_reversal`.
        device: see :func:`bit_reversal`.

    Returns:
        A :class:`~structmat.Permutation` of shape (n, n).
    """
    return _permutation(torch.arange(check_int("n", n) - 1, -1, -1), dtype, device)


def even_odd(n: int, reverse_odd: bool = False, *, dtype: torch.dtype | None = None, device: Any = None) -> Permutation:
    """Even indices first, then the odd ones, for any n.

    Args:
        n: size.
        reverse_odd: the odd ones backwards, the order that makes a cosine transform a Fourier transform (Makhoul 1980).
        dtype: see :func:`bit_reversal`.
        device: see :func:`bit_reversal`.

    Returns:
        A :class:`~structmat.Permutation` of shape (n, n).

    Example:
        >>> from structmat.transforms import even_odd
        >>> even_odd(5).perm, even_odd(5, reverse_odd=True).perm
        (tensor([0, 2, 4, 1, 3]), tensor([0, 2, 4, 3, 1]))
    """
    return _permutation(even_then_odd(check_int("n", n), reverse_odd), dtype, device)


def even_then_odd(n: int, reverse_odd: bool) -> Tensor:
    """The indices of :func:`even_odd`."""
    odd = torch.arange(1, n, 2)
    return torch.cat([torch.arange(0, n, 2), odd.flip(0) if reverse_odd else odd])


def sequency(n: int) -> Tensor:
    """Rows of the Hadamard matrix in the order of their sign changes: bit-reversed Gray code."""
    code = torch.arange(n)
    return reversed_digits([2] * int(math.log2(n)) or [1])[code ^ (code >> 1)]
