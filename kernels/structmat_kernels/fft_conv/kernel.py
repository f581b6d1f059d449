"""Launches of the long convolution kernels: sizes, tiles, operands."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.fft_conv import programs
from structmat_kernels.fft_conv.transforms import RADICES, tables
from structmat_kernels.launches import launch, processors
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: The longest input of the kernels.
LONGEST = max(RADICES) // 2
#: With more, Triton keeps several copies of the tables that the loop reads, and shared memory does not hold them.
STAGES = 1


def config(batch: int, points: int, half: bool, backward: bool) -> Config:
    """Transforms side by side in a program and its warps."""
    most = 8192 if half and not backward else 4096
    P = max(1, min(most // points, power(cdiv(batch, 2))))
    tile = P * points
    warps = max(4, min(16, tile // (512 if backward or not half else 1024)))
    return {"P": P, "num_warps": warps, "num_stages": STAGES}


def points_of(length: int) -> int:
    """The size of the transforms: twice the length, rounded up to one that there is."""
    return max(min(RADICES), power(2 * length))


def _plan(
    u: Tensor, k: Tensor, k_rev: Tensor | None, accurate: bool, backward: bool, given: Config | None
) -> tuple[tuple[int], int, int, tuple[int, ...], Config, Tensor]:
    """Grid, number of parts, steps and constants of both kernels."""
    batch, channels, length = u.shape
    half, points = u.dtype != torch.float32 and not accurate, points_of(length)
    c = given or config(batch, points, half, backward)
    groups = cdiv(cdiv(batch, 2), c["P"])
    parts = max(1, min(groups, cdiv(4 * processors(u.device), channels)))
    steps = cdiv(groups, parts)
    parts = cdiv(groups, steps)
    n1, n2, n3 = RADICES[points]
    constants = {"N1": n1, "N2": n2, "N3": n3, "REV": k_rev is not None, "SCALED": half}
    constants |= {"OP": tl.float16 if half else tl.float32, "PRECISION": "ieee" if half or INTERPRETED else "tf32x3"}
    constants |= {"PACKED": half and not INTERPRETED}
    behind = 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    sizes = (batch, channels, length, min(k.shape[1], length), behind, steps)
    return (parts * channels,), parts, points, sizes, constants | c, tables(points, u.device, half)


def _packed(t: Tensor | None, count: int, other: Tensor) -> Tensor:
    """The first taps of every channel, one channel right after the other; some tensor where there are none."""
    return other if t is None or count == 0 else t[:, :count].contiguous()


def _rows(t: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor whose sequences are contiguous, with its strides; some other one if there is none."""
    if t is None:
        return other, (0, 0)
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return t, (t.stride(0), t.stride(1))


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
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    grid, _, _, sizes, constants, table = _plan(u, k, k_rev, accurate, False, config)
    (u, su), (pre, sp), (post, sq) = _rows(u, u), _rows(pre_gate, u), _rows(post_gate, u)
    k, rev = _packed(k, sizes[3], u), _packed(k_rev, sizes[4], u)
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
    channels = u.shape[1]
    inputs, gate, taps = needs[0] or needs[4], needs[5], needs[1] or needs[2] or needs[3]
    shapes = (inputs, needs[4], gate)
    gu, gpre, gpost = (torch.empty(u.shape, dtype=u.dtype, device=u.device) if n else None for n in shapes)
    if u.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (k, k_rev, skip)]
        return [g if n else None for g, n in zip((gu, *zeros, gpre, gpost), needs, strict=True)]
    grid, parts, points, sizes, constants, table = _plan(u, k, k_rev, accurate, True, config)
    partial = torch.empty((parts, channels, points) if taps else (1,), dtype=torch.float32, device=u.device)
    (grad, sg), (u, su), (pre, sp), (post, sq) = _rows(grad, u), _rows(u, u), _rows(pre_gate, u), _rows(post_gate, u)
    packed, rev = _packed(k, sizes[3], u), _packed(k_rev, sizes[4], u)
    if pre_gate is not None and inputs and gpre is None:
        gpre = torch.empty_like(gu)  # the kernel writes both  # pyright: ignore[reportArgumentType]
    constants |= {"PRE": pre_gate is not None, "POST": post_gate is not None, "SKIP": skip is not None}
    constants |= {"INPUT": inputs, "GATE": gate, "FILTER": taps}
    outputs = [u if g is None else g for g in (gu, gpre, gpost)]
    tensors = (grad, u, pre, post, packed, rev, u if skip is None else skip.contiguous(), table, *outputs, partial)
    with launching(u):
        launch(programs.gradients, grid, tensors, (*sizes, *sg, *su, *sp, *sq), **constants)
    found: list[Tensor | None] = [gu, None, None, None, gpre, gpost]
    if taps:
        total = partial[0] if parts == 1 else partial.sum(0)
        if needs[1]:
            found[1] = _filled(total[:, : sizes[3]], k)
        if needs[2] and k_rev is not None:
            found[2] = _filled(total[:, points - sizes[4] :].flip(-1), k_rev)
        if needs[3] and skip is not None:
            found[3] = total[:, 0].to(skip.dtype)
    return [g if n else None for g, n in zip(found, needs, strict=True)]


def _filled(some: Tensor, like: Tensor) -> Tensor:
    """The gradient of the taps that are used, and zeros for the others."""
    return torch.nn.functional.pad(some, (0, like.shape[1] - some.shape[1])).to(like.dtype)
