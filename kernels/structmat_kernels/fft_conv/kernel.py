"""Launches of the long convolution kernels: those of half precision, and here those that compute in float32 grade."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.fft_conv import half, programs
from structmat_kernels.fft_conv.half import packed, rows
from structmat_kernels.fft_conv.transforms import RADICES, tables
from structmat_kernels.launches import launch, processors
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: The longest input of the kernels that compute in float32 grade; those of half precision take more.
LONGEST = max(RADICES) // 2
#: With more, Triton keeps several copies of the tables that the loop reads, and shared memory does not hold them.
STAGES = 1


def config(batch: int, points: int) -> Config:
    """Transforms side by side in a program and its warps."""
    P = max(1, min(4096 // points, power(cdiv(batch, 2))))
    warps = max(4, min(16, P * points // 512))
    return {"P": P, "num_warps": warps, "num_stages": STAGES}


def points_of(length: int) -> int:
    """The size of the transforms: twice the length, rounded up to one that there is."""
    return max(min(RADICES), power(2 * length))


def _plan(
    u: Tensor, k: Tensor, k_rev: Tensor | None, given: Config | None
) -> tuple[tuple[int], int, int, tuple[int, ...], Config, Tensor]:
    """Grid, number of parts, steps and constants of both kernels."""
    batch, channels, length = u.shape
    points = points_of(length)
    c = given or config(batch, points)
    groups = cdiv(cdiv(batch, 2), c["P"])
    parts = max(1, min(groups, cdiv(4 * processors(u.device), channels)))
    steps = cdiv(groups, parts)
    parts = cdiv(groups, steps)
    n1, n2, n3 = RADICES[points]
    constants = {"N1": n1, "N2": n2, "N3": n3, "REV": k_rev is not None}
    constants |= {"PRECISION": "ieee" if INTERPRETED else "tf32x3"}
    behind = 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    sizes = (batch, channels, length, min(k.shape[1], length), behind, steps)
    return (parts * channels,), parts, points, sizes, constants | c, tables(points, u.device)


def forward_conv(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    accurate: bool = False,
    config: Config | None = None,
) -> Tensor:
    """y of shape (batch, channels, length) for real operands as those of the reference, length at most LONGEST."""
    if u.numel() == 0:
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.dtype != torch.float32 and not accurate:
        return half.convolve(u, k, k_rev, skip, pre_gate, post_gate, config=config)[0]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    grid, _, _, sizes, constants, table = _plan(u, k, k_rev, config)
    (u, su), (pre, sp), (post, sq) = rows(u, u), rows(pre_gate, u), rows(post_gate, u)
    k, rev = packed(k, sizes[3], u), packed(k_rev, sizes[4], u)
    constants |= {"PRE": pre_gate is not None, "POST": post_gate is not None, "SKIP": skip is not None}
    tensors = (u, pre, post, k, rev, u if skip is None else skip.contiguous(), table, y)
    with launching(u):
        launch(programs.convolve, grid, tensors, (*sizes, *su, *sp, *sq), **constants)
    return y


def backward_conv(
    grad: Tensor,
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    needs: list[bool],
    accurate: bool = False,
    config: Config | None = None,
) -> list[Tensor | None]:
    """Gradients of u, k, k_rev, skip and the gates, those that ``needs`` asks for; None for the others."""
    if u.numel() == 0:
        return [
            torch.zeros_like(t) if t is not None and n else None
            for t, n in zip((u, k, k_rev, skip, pre_gate, post_gate), needs, strict=True)
        ]
    inputs, gate, taps = needs[0] or needs[4], needs[5], needs[1] or needs[2] or needs[3]
    found: list[Tensor | None] = [None] * 6
    if u.dtype != torch.float32 and not accurate:
        if inputs:  # the transpose is a correlation, and its gates are in the other order
            other = u if needs[4] else None
            found[0], found[4] = half.convolve(grad, k, k_rev, skip, post_gate, pre_gate, other, True, config)
        if gate:  # y without its gate, times the gradient
            found[5] = half.convolve(u, k, k_rev, skip, pre_gate, grad, config=config)[0]
        total = half.correlate(grad, u, pre_gate, post_gate, config) if taps else None
    else:
        found[0], found[4], found[5], total = _gradients(
            grad, u, k, k_rev, skip, pre_gate, post_gate, inputs, gate, taps, config
        )
    if total is not None:
        length = u.shape[2]
        found[1] = _filled(total[:, : min(k.shape[1], length)], k)
        if k_rev is not None:
            behind = min(k_rev.shape[1], length - 1)
            found[2] = _filled(total[:, total.shape[1] - behind :].flip(-1), k_rev)
        if skip is not None:
            found[3] = total[:, 0].to(skip.dtype)
    return [g if n else None for g, n in zip(found, needs, strict=True)]


def _gradients(
    grad: Tensor, u: Tensor, k: Tensor, k_rev: Tensor | None, skip: Tensor | None, pre_gate: Tensor | None,
    post_gate: Tensor | None, inputs: bool, gate: bool, taps: bool, config: Config | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """In float32 grade those of u, of both gates, and of all points of the filter."""
    grid, parts, points, sizes, constants, table = _plan(u, k, k_rev, config)
    shapes = (inputs, inputs and pre_gate is not None, gate)
    gu, gpre, gpost = (torch.empty(u.shape, dtype=u.dtype, device=u.device) if n else None for n in shapes)
    partial = torch.empty((parts, u.shape[1], points) if taps else (1,), dtype=torch.float32, device=u.device)
    (grad, sg), (u, su), (pre, sp), (post, sq) = rows(grad, u), rows(u, u), rows(pre_gate, u), rows(post_gate, u)
    taken = packed(k, sizes[3], u), packed(k_rev, sizes[4], u), u if skip is None else skip.contiguous()
    constants |= {"PRE": pre_gate is not None, "POST": post_gate is not None, "SKIP": skip is not None}
    constants |= {"INPUT": inputs, "GATE": gate, "FILTER": taps}
    outputs = [u if g is None else g for g in (gu, gpre, gpost)]
    tensors = (grad, u, pre, post, *taken, table, *outputs, partial)
    with launching(u):
        launch(programs.gradients, grid, tensors, (*sizes, *sg, *su, *sp, *sq), **constants)
    return gu, gpre, gpost, (partial[0] if parts == 1 else partial.sum(0)) if taps else None


def _filled(some: Tensor, like: Tensor) -> Tensor:
    """The gradient of the taps that are used, and zeros for the others."""
    return torch.nn.functional.pad(some, (0, like.shape[1] - some.shape[1])).to(like.dtype)
