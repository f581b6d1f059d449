"""Launches of the long convolution kernels that work block by block: lengths that one transform on the chip is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.fft_conv import chain, long_carry, long_programs, long_wide, transforms
from structmat_kernels.fft_conv.half import packed, rows
from structmat_kernels.launches import launch, processors
from structmat_kernels.sizes import cdiv
from structmat_kernels.tuning import Config

#: The longest input: the work on spectra grows with the square of the number of blocks.
LONGEST = 1 << 18
#: Radices of the transforms of two blocks: of half precision (order 3; a warp for 8 of N1), and in float32 grade.
RADICES = {True: chain.RADICES[16384], False: transforms.RADICES[8192]}
#: Bytes that the spectra of the input take at most, unless those of a channel take more.
CHUNK = 1 << 29
#: Windows of a causal filter, by the points of a transform, up to which programs carry spectra from block to block: the
#: first that holds, in half precision.
CARRIED = {8192: 4, 16384: 2}
#: Entries that a program looks at together to find the largest.
TILE = 4096

Optional = Tensor | None
#: Spectra, and the scales of what they are of.
Spectra = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Plan:
    """What all launches share. Windows m of the filter are lowest, ..., lowest + count - 1."""

    programs: ModuleType
    constants: dict[str, Any]
    table: Tensor
    dtype: torch.dtype
    channels: int
    points: int
    blocks: int
    taps: int
    behind: int
    lowest: int
    count: int
    step: int  # channels that are computed together
    half: bool
    carried: bool  # from block to block, by long_carry


def _windows_of(taps: int, behind: int, length: int, points: int) -> tuple[int, int, int]:
    """Blocks of an input, and the first and the last window of the filter.

    Window m has the taps of block m and of block m - 1; beyond the last block there is no output.
    """
    block = points // 2
    blocks = cdiv(length, block)
    return blocks, -min(cdiv(behind, block), blocks - 1), min(cdiv(taps, block), blocks - 1)


def _carrying(taps: int, behind: int, u: Tensor) -> int | None:
    """The points of transforms whose spectra are to be carried, or None."""
    if behind or cdiv(u.shape[0], 2) * u.shape[1] < processors(u.device):  # a program has all blocks of a sequence
        return None
    return next((n for n, most in CARRIED.items() if _windows_of(taps, 0, u.shape[2], n)[2] < most), None)


def _plan(u: Tensor, k: Tensor, k_rev: Optional, accurate: bool, given: Config | None, forward: bool) -> _Plan:
    batch, channels, length = u.shape
    half = u.dtype != torch.float32 and not accurate
    taps, behind = min(k.shape[1], length), 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    c = dict(given or {})
    if half and forward and "radices" not in c and (carried := _carrying(taps, behind, u)):
        c |= {"radices": chain.RADICES[carried], "carried": True}
    n1, n2, n3 = radices = c.get("radices", RADICES[half])
    points = n1 * n2 * n3
    blocks, lowest, highest = _windows_of(taps, behind, length, points)
    count, carried = highest - lowest + 1, c.get("carried", False)
    constants = {"N1": n1, "N2": n2, "N3": n3, "num_stages": 1}
    if half:
        programs, dtype, table = long_programs, torch.float16, chain.tables(radices, u.device)
        constants |= {"ASM": not INTERPRETED, "num_warps": n1 // 8}
    else:
        programs, dtype, table = long_wide, torch.float32, transforms.tables(points, u.device)
        constants |= {"PRECISION": "ieee" if INTERPRETED else "tf32x3", "num_warps": max(4, points // 512)}
    size = (count if carried else cdiv(batch, 2) * blocks) * points * (4 if half else 8)
    step = cdiv(channels, cdiv(channels, max(1, c.get("chunk", CHUNK) // size)))
    return _Plan(
        *(programs, constants, table, dtype, channels, points, blocks, taps, behind, lowest, count, step, half, carried)
    )


def _largest(u: Tensor, gate: Optional) -> Tensor:
    """Of each sequence the power of two below its largest entry, (batch, channels)."""
    batch, channels, length = u.shape
    up = torch.empty((batch, channels), dtype=torch.float32, device=u.device)
    (u, su), (gates, sg) = rows(u, u), rows(gate, u)
    constants = {"GATE": gate is not None, "TILE": TILE, "num_warps": 4}
    launch(long_programs.largest, (batch * channels,), (u, gates, up), (channels, length, *su, *sg), **constants)
    return up


def _transform(plan: _Plan, u: Tensor, gate: Optional, apart: bool) -> Spectra:
    """The spectra of all blocks of a gated input, (channels, pairs, blocks, 2, points), and its scales."""
    batch, channels, length = u.shape
    up = _largest(u, gate) if plan.half else u
    pairs = cdiv(batch, 2)
    spectra = torch.empty((channels, pairs, plan.blocks, 2, plan.points), dtype=plan.dtype, device=u.device)
    (u, su), (gates, sg) = rows(u, u), rows(gate, u)
    constants = plan.constants | {"GATE": gate is not None, "APART": apart}
    scalars = (batch, channels, length, plan.blocks, *su, *sg)
    tensors = (u, gates, up, plan.table, spectra)
    launch(plan.programs.transform, (channels * pairs * plan.blocks,), tensors, scalars, **constants)
    return spectra, up


def _windows(plan: _Plan, k: Tensor, k_rev: Optional, skip: Optional) -> Spectra:
    """The spectra of the filters' windows, (channels, count, 2, points), and the filters' scales, (channels,)."""
    channels = k.shape[0]
    k = packed(k, plan.taps, k)
    rev, up = packed(k_rev, plan.behind, k), k
    skipped = k if skip is None else skip.contiguous()
    if plan.half:
        up = _largest(k[None], None)
        if plan.behind:
            up = torch.maximum(up, _largest(rev[None], None))
        if skip is not None:
            up = torch.maximum(up, _largest(skipped[None, :, None], None))
    spectra = torch.empty((channels, plan.count, 2, plan.points), dtype=plan.dtype, device=k.device)
    constants = plan.constants | {"REV": plan.behind > 0, "SKIP": skip is not None}
    scalars = (plan.taps, plan.behind, plan.lowest, plan.count)
    tensors = (k, rev, skipped, up, plan.table, spectra)
    launch(plan.programs.windows, (channels * plan.count,), tensors, scalars, **constants)
    return spectra, up


def _carry(plan: _Plan, u: Tensor, gate: Optional, filters: Spectra, y: Tensor, post: Optional) -> None:
    """Write ``post * (K (gate u))`` to y for a causal filter of few windows."""
    batch, channels, length = u.shape
    (u, su), (gates, sg), (last, sq) = rows(u, u), rows(gate, u), rows(post, u)
    constants = plan.constants | {"GATE": gate is not None, "POST": post is not None}
    scalars = (batch, channels, length, plan.blocks, plan.count, *su, *sg, *sq, y.stride(0), y.stride(1))
    room = 8 // plan.constants["num_warps"]  # so many a processor has registers for
    programs = min(channels * cdiv(batch, 2), room * processors(u.device))
    scratch = torch.empty((programs, plan.count, 2, plan.points), dtype=plan.dtype, device=u.device)
    tensors = (u, gates, *filters, last, scratch, plan.table, y)
    launch(long_carry.carry, (programs,), tensors, scalars, **constants)


def _combine(
    plan: _Plan, spectra: Spectra, filters: Spectra, y: Tensor, post: Optional = None,
    z: Optional = None, other: Optional = None, apart: bool = True, transpose: bool = False,
) -> None:  # fmt: skip
    """Write ``post * (K x)``, K or its transpose, to y, and the same with ``other`` in place of ``post`` to z."""
    batch, channels, length = y.shape
    (last, sq), (third, so) = rows(post, y), rows(other, y)
    constants = plan.constants | {"POST": post is not None, "OTHER": other is not None}
    constants |= {"APART": apart, "TRANSPOSE": transpose}
    scalars = (batch, channels, length, plan.blocks, plan.lowest, plan.count, *sq, *so, y.stride(0), y.stride(1))
    tensors = (spectra[0], filters[0], spectra[1], filters[1], last, third, plan.table, y, y if z is None else z)
    grid = (channels * cdiv(batch, 2) * plan.blocks,)
    launch(plan.programs.combine, grid, tensors, scalars, **constants)


def _correlate(plan: _Plan, w: Spectra, x: Spectra, batch: int) -> Tensor:
    """The gradient of the filter, float32: of blocks lowest - 1, ..., lowest + count - 1 one after the other."""
    channels, pairs, block = w[0].shape[0], w[0].shape[1], plan.points // 2
    programs = channels * plan.count
    steps = cdiv(pairs, max(1, min(pairs, cdiv(2 * processors(w[0].device), programs))))
    parts = cdiv(pairs, steps)
    found = torch.empty((parts, channels, plan.count, 2, block), dtype=torch.float32, device=w[0].device)
    scalars = (batch, channels, plan.blocks, plan.lowest, plan.count, steps)
    tensors = (w[0], x[0], w[1], x[1], plan.table, found)
    launch(plan.programs.correlate, (parts * programs,), tensors, scalars, **plan.constants)
    total, pad = found[0] if parts == 1 else found.sum(0), torch.nn.functional.pad
    return (pad(total[:, :, 1], (0, 0, 0, 1)) + pad(total[:, :, 0], (0, 0, 1, 0))).flatten(1)


def _parts(plan: _Plan, *operands: Optional) -> Iterator[tuple[Any, ...]]:
    """The operands, some channels after the others: their dimension is the second one in three, the first elsewhere."""
    whole = [t if t is None or t.ndim < 3 else rows(t, t)[0] for t in operands]
    for h in range(0, plan.channels, plan.step):
        some = slice(h, h + plan.step)
        yield tuple([None if t is None else t[:, some] if t.ndim == 3 else t[some] for t in whole])


def forward_conv(
    u: Tensor, k: Tensor, k_rev: Optional, skip: Optional, pre_gate: Optional, post_gate: Optional,
    accurate: bool = False, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """y of shape (batch, channels, length) for real operands as those of the reference.

    ``config``: "radices" of the transforms and "chunk" in bytes, where they are not RADICES and CHUNK, and whether
    spectra are "carried".
    """
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y
    plan = _plan(u, k, k_rev, accurate, config, True)
    with launching(u):
        for x, taps, behind, point, pre, post, out in _parts(plan, u, k, k_rev, skip, pre_gate, post_gate, y):
            filters = _windows(plan, taps, behind, point)
            if plan.carried:
                _carry(plan, x, pre, filters, out, post)
            else:
                _combine(plan, _transform(plan, x, pre, True), filters, out, post)
    return y


def backward_conv(
    grad: Tensor, u: Tensor, k: Tensor, k_rev: Optional, skip: Optional, pre_gate: Optional, post_gate: Optional,
    needs: list[bool], accurate: bool = False, config: Config | None = None,
) -> list[Optional]:  # fmt: skip
    """Gradients of u, k, k_rev, skip and the gates, those that ``needs`` asks for; None for the others.

    The sum over the batch needs neighbours of one scale: where gradients of the filter are asked for, what belongs to
    the sequence with the smaller entries has the rounding errors of the larger one.
    """
    operands = (u, k, k_rev, skip, pre_gate, post_gate)
    if u.numel() == 0:
        return [torch.zeros_like(t) if t is not None and n else None for t, n in zip(operands, needs, strict=True)]
    inputs, gate, taps = needs[0] or needs[4], needs[5], needs[1] or needs[2] or needs[3]
    found: list[Optional] = [
        torch.empty(u.shape, dtype=u.dtype, device=u.device) if n else None
        for n in (inputs, False, False, False, needs[4], gate)
    ]
    plan = _plan(u, k, k_rev, accurate, config, False)
    sums = []
    with launching(u):
        for gy, x, *filters, pre, post, gu, gpre, gpost in _parts(plan, grad, *operands, found[0], found[4], found[5]):
            spectra: Any = None
            gradients: Any = None
            windows: Any = None
            if inputs or gate:
                windows = _windows(plan, *filters)
            if inputs or taps:
                gradients = _transform(plan, gy, post, not taps)
            if gate or taps:
                spectra = _transform(plan, x, pre, not taps)
            if inputs:  # the transpose, and its gates in the other order
                _combine(plan, gradients, windows, gu, pre, gpre, x if needs[4] else None, not taps, True)
            if gate:  # y without its gate, times the gradient
                _combine(plan, spectra, windows, gpost, gy, apart=not taps)
            if taps:
                sums.append(_correlate(plan, gradients, spectra, u.shape[0]))
    if sums:
        total = sums[0] if len(sums) == 1 else torch.cat(sums)
        start = (1 - plan.lowest) * (plan.points // 2)
        found[1] = _filled(total[:, start : start + plan.taps], k)
        if k_rev is not None:
            found[2] = _filled(total[:, start - plan.behind : start].flip(-1), k_rev)
        if skip is not None:
            found[3] = total[:, start].to(skip.dtype)
    return [g if n else None for g, n in zip(found, needs, strict=True)]


def _filled(some: Tensor, like: Tensor) -> Tensor:
    """The gradient of the taps that are used, and zeros for the others."""
    return torch.nn.functional.pad(some, (0, like.shape[1] - some.shape[1])).to(like.dtype)
