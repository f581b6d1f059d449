"""Launches of the long convolution kernels for half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.fft_conv import chain_programs as programs
from structmat_kernels.fft_conv.chain import RADICES, tables
from structmat_kernels.launches import launch, processors
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: The longest input of these kernels.
LONGEST = max(RADICES) // 2
#: Transforms side by side in a program, by their points: 1 of those that are not named.
TILES = {512: 4, 1024: 4, 2048: 2}
#: Radices of the filter's gradient where its sums would not stay in the registers of as many threads.
CORRELATION = {8192: (64, 16, 8)}

Optional = Tensor | None


def points_of(length: int) -> int:
    """The size of the transforms: twice the length, rounded up to one that there is."""
    return max(min(RADICES), power(2 * length))


def config(batch: int, points: int) -> Config:
    """Transforms side by side: never more than there are pairs, but at least :func:`fewest`."""
    return {"P": max(fewest(points), min(TILES.get(points, 1), power(cdiv(batch, 2))))}


def fewest(points: int) -> int:
    """The least number of transforms in a tile: two in order 2, and as many as fill 64 columns.

    Tiles of 32 columns compile, and compute something else (Triton 3.6, sm_90).
    """
    _, n2, n3 = RADICES[points]
    return max(2 if n3 == 1 else 1, 64 // (n2 * n3))


def _groups(u: Tensor, points: int, given: Config | None) -> tuple[Config, int, int]:
    """Transforms side by side, the programs that share a channel, and the steps of each."""
    batch, channels, _ = u.shape
    c = given or config(batch, points)
    groups = cdiv(cdiv(batch, 2), c["P"])
    busy = 8 if points < 1024 else 4  # programs for every processor
    parts = max(1, min(groups, cdiv(busy * processors(u.device), channels)))
    steps = cdiv(groups, parts)
    return c, cdiv(groups, steps), steps


def _constants(radices: tuple[int, int, int]) -> Config:
    n1, n2, n3 = radices
    # More stages would keep several copies of the tables that the loop reads, which shared memory does not hold.
    return {"N1": n1, "N2": n2, "N3": n3, "ASM": not INTERPRETED, "num_warps": n1 // 8, "num_stages": 1}


def packed(t: Optional, count: int, other: Tensor) -> Tensor:
    """The first taps of every channel, one channel right after the other; some tensor where there are none."""
    return other if t is None or count == 0 else t[:, :count].contiguous()


def rows(t: Optional, other: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor whose sequences are contiguous, with its strides; some other one if there is none."""
    if t is None:
        return other, (0, 0)
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return t, (t.stride(0), t.stride(1))


def convolve(
    u: Tensor, k: Tensor, k_rev: Optional, skip: Optional, pre: Optional, post: Optional, other: Optional = None,
    transpose: bool = False, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``post * (K (pre u))``, K or its transpose; and with ``other`` in place of ``post``, else the first again."""
    batch, channels, length = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    z = y if other is None else torch.empty_like(y)
    points = points_of(length)
    c, parts, steps = _groups(u, points, config)
    taps, behind = min(k.shape[1], length), 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    (u, su), (first, sp), (last, sq), (third, so) = rows(u, u), rows(pre, u), rows(post, u), rows(other, u)
    constants = _constants(RADICES[points]) | c | {"REV": k_rev is not None, "SKIP": skip is not None}
    constants |= {"PRE": pre is not None, "POST": post is not None, "OTHER": other is not None, "CONJUGATE": transpose}
    taken = packed(k, taps, u), packed(k_rev, behind, u), u if skip is None else skip.contiguous()
    tensors = (u, first, last, third, *taken, tables(RADICES[points], u.device), y, z)
    scalars = (batch, channels, length, taps, behind, steps, *su, *sp, *sq, *so)
    with launching(u):
        launch(programs.convolve, (parts * channels,), tensors, scalars, **constants)
    return y, z


def correlate(grad: Tensor, u: Tensor, pre: Optional, post: Optional, config: Config | None = None) -> Tensor:
    """The gradient of the filter as one of all points, (channels, points), float32: taps ahead, then those behind."""
    batch, channels, length = u.shape
    points = points_of(length)
    c, parts, steps = _groups(u, points, config)
    radices = CORRELATION.get(points, RADICES[points])
    partial = torch.empty((parts, channels, points), dtype=torch.float32, device=u.device)
    (grad, sg), (last, sq), (u, su), (first, sp) = rows(grad, u), rows(post, u), rows(u, u), rows(pre, u)
    constants = _constants(radices) | c | {"PRE": pre is not None, "POST": post is not None}
    tensors = (grad, last, u, first, tables(radices, u.device), partial)
    scalars = (batch, channels, length, steps, *sg, *sq, *su, *sp)
    with launching(u):
        launch(programs.correlate, (parts * channels,), tensors, scalars, **constants)
    return partial[0] if parts == 1 else partial.sum(0)
