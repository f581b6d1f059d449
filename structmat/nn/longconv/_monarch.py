"""Cyclic convolutions by Monarch-factored Fourier transforms: block products, twiddles, no permutation."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from structmat.transforms._build import turns


def balanced_radices(size: int, order: int) -> tuple[int, ...]:
    """``order`` radices of about equal size whose product is at least ``size``; multiples of 8 beyond 8."""
    found = []
    rest = max(size, 1)
    for left in range(order, 0, -1):
        radix = round(rest ** (1 / left))
        radix += radix**left < rest
        radix = radix if radix <= 8 else -(-radix // 8) * 8
        found.append(radix)
        rest = -(-rest // radix)
    return tuple(found)


def product(radices: tuple[int, ...]) -> int:
    """The number of points."""
    return functools.reduce(operator.mul, radices, 1)


def stage_tables(radices: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For every digit its DFT matrix (n, n) and the twiddles (n, rest) that follow it.

    Stage a transforms digit a, of which the last one is the fastest in memory: outputs come with the first digit the
    least significant one, in the order of :func:`frequencies`.
    """
    tables = []
    rest = product(radices)
    for n in radices:
        size, rest = rest, rest // n
        digit = torch.arange(n, device=device)
        twiddle = turns(digit[:, None] * torch.arange(rest, device=device), size).to(dtype)
        tables.append((turns(digit[:, None] * digit, n).to(dtype), twiddle))
    return tables


def frequencies(radices: tuple[int, ...], device: torch.device) -> Tensor:
    """The frequency at every place of the transform."""
    places = torch.arange(product(radices), device=device).view(tuple(reversed(radices)))
    return places.permute(tuple(range(len(radices) - 1, -1, -1))).flatten()


def dft(x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The DFT over the last dimension, frequencies in the order of :func:`frequencies`."""
    for block, twiddle in tables:
        x = (torch.matmul(block, _digits(x, twiddle)) * twiddle).flatten(-3)
    return x


def idft(x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse of :func:`dft`, from the same tables."""
    size = x.shape[-1]
    for block, twiddle in reversed(tables):
        x = torch.matmul(block.conj(), _digits(x, twiddle) * twiddle.conj()).flatten(-3)
    return x / size


def _digits(x: Tensor, twiddle: Tensor) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // twiddle.numel(), *twiddle.shape))


def monarch_convolution(x: Tensor, kernel: Callable[[int], Tensor], needed: int, order: int) -> Tensor:
    """The cyclic convolution of x with ``kernel(size)``, of a size of at least ``needed``, cut to x's length."""
    length = x.shape[-1]
    if x.is_complex():
        radices = balanced_radices(needed, order)
        tables = stage_tables(radices, x.dtype, x.device)
        size = product(radices)
        return idft(dft(pad(x, (0, size - length)), tables) * dft(kernel(size), tables), tables)[..., :length]
    # Even and odd entries are the real and the imaginary parts of half as many numbers z. With E and O the transforms
    # of the kernel's even and odd taps, W = exp(-2 pi i f / M) and ~ for the conjugate at the frequency -f, those of y
    # have the transform E Z + O (i U_even + W U_odd), where U_even = (Z + Z~) / 2 and U_odd = (Z - Z~) / 2i.
    radices = balanced_radices(-(-needed // 2), order)
    half = product(radices)
    tables = stage_tables(radices, torch.promote_types(x.dtype, torch.complex64), x.device)
    frequency = frequencies(radices, x.device)
    place = frequencies(radices[::-1], x.device)  # the inverse permutation
    negative = place[-frequency % half]
    z = dft(_paired(pad(x, (0, 2 * half - length))), tables)
    both = dft(_paired(kernel(2 * half)), tables)
    mirrored = both.index_select(-1, negative).conj()
    even, odd = (both + mirrored) / 2, (both - mirrored) / 2  # the latter times i
    turn = turns(frequency, half).to(z.dtype)
    first, second = even + odd * (1 - turn) / 2, odd * (1 + turn) / 2
    y = idft(first * z + second * z.index_select(-1, negative).conj(), tables)
    return torch.view_as_real(y).flatten(-2)[..., :length]


def _paired(x: Tensor) -> Tensor:
    return torch.complex(x[..., 0::2], x[..., 1::2])
