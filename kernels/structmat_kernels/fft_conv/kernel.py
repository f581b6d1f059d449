"""Long convolutions in Triton, one pass over memory: all transforms of a sequence stay on the chip.

A program convolves the sequences of one channel, two by two: u + i u' is transformed as one complex sequence, and as
the filter is real the parts of the result are those of u and u'. The filter is transformed once in a program and stays
in registers. Gates and the skip term cost no pass of their own; the zeros behind the input cost no arithmetic in the
first product, the outputs that nobody wants none in the last.

Floor: reading u and gates, writing y. Arithmetic of 64 x 768 sequences of 4096 entries: 206 Gflop of products.
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import INTERPRETED, launching
from structmat_kernels.fft_conv.transforms import RADICES, forward, inverse, pairs, tables
from structmat_kernels.launches import launch, processors
from structmat_kernels.sizes import cdiv, power
from structmat_kernels.tuning import Config

#: The longest input of the kernels.
LONGEST = max(RADICES) // 2


@triton.jit
def _power_below(m):
    """The power of two below each positive m, and its inverse; 2^-126 of zeros."""
    bits = m.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _scales(x, P: tl.constexpr):
    """Of P tiles one below the other the powers of two below their largest entries, and the inverses: (P,)."""
    tiles = tl.reshape(tl.abs(x), (P, x.shape[0] // P, x.shape[1]))
    return _power_below(tl.max(tl.max(tiles, 2), 1))


@triton.jit
def _scaled(x, factors, P: tl.constexpr):
    """P tiles one below the other, each times its factor.

    In three dimensions: a column of factors for all rows would have a layout of its own, which x would have to take.
    """
    tiles = tl.reshape(x, (P, x.shape[0] // P, x.shape[1]))
    return tl.reshape(tiles * factors[:, None, None], x.shape)


@triton.jit
def _filter(
    k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV: tl.constexpr, SKIP: tl.constexpr, SCALED: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The transform of a channel's filter, P times, and the factor by which it is too small."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    t = (tl.arange(0, P * R) % R)[:, None] + tl.arange(0, N1)[None, :] * R
    k = tl.load(k_ptr + h * taps + t, mask=t < taps, other=0.0).to(tl.float32)
    if REV:  # rev[j] is j + 1 places before the end
        k += tl.load(rev_ptr + h * behind + M - 1 - t, mask=M - 1 - t < behind, other=0.0).to(tl.float32)
    if SKIP:
        k += tl.where(t == 0, tl.load(skip_ptr + h).to(tl.float32), 0.0)
    factor = 1.0
    if SCALED:
        up, down = _power_below(tl.max(tl.abs(k)))
        x = pairs(k * down, tl.zeros_like(k), OP)
        kr, ki = forward(x, table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
        high, low = _power_below(tl.maximum(tl.max(tl.abs(kr)), tl.max(tl.abs(ki))))
        kr = kr * low
        ki = ki * low
        factor = up * high
    else:
        kr, ki = forward(pairs(k, tl.zeros_like(k), OP), table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
    return kr.to(OP), ki.to(OP), factor


@triton.jit
def convolve(
    u_ptr, pre_ptr, post_ptr, k_ptr, rev_ptr, skip_ptr, table, y_ptr,
    batch, channels, length, taps, behind, steps, u_b, u_h, pre_b, pre_h, post_b, post_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    REV: tl.constexpr, SKIP: tl.constexpr, OP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """``y = post * (k * (pre u))`` for ``steps`` groups of P pairs of one channel's sequences."""
    R: tl.constexpr = N2 * N3
    H: tl.constexpr = N1 // 2
    h = (tl.program_id(0) % channels).to(tl.int64)
    group = (tl.program_id(0) // channels) * steps
    kr, ki, factor = _filter(
        k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, SCALED, P, N1, N2, N3, OP, PRECISION, PACKED
    )
    row = tl.arange(0, P * R)
    t = (row % R)[:, None] + tl.arange(0, H)[None, :] * R
    for step in range(steps):
        b = (2 * ((group + step) * P + row // R))[:, None].to(tl.int64)
        live = (t < length) & (b < batch)
        live2 = (t < length) & (b + 1 < batch)
        at = u_ptr + b * u_b + h * u_h + t
        xr = tl.load(at, mask=live, other=0.0).to(tl.float32)
        xi = tl.load(at + u_b, mask=live2, other=0.0).to(tl.float32)
        if PRE:
            at = pre_ptr + b * pre_b + h * pre_h + t
            xr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
            xi *= tl.load(at + pre_b, mask=live2, other=0.0).to(tl.float32)
        if SCALED:
            up, down = _scales(xr, P)
            up2, down2 = _scales(xi, P)
            xr = _scaled(xr, down, P)
            xi = _scaled(xi, down2, P)
        ar, ai = forward(pairs(xr, xi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        kr32 = kr.to(tl.float32)
        ki32 = ki.to(tl.float32)
        br = ar * kr32 - ai * ki32
        bi = ar * ki32 + ai * kr32
        yr, yi = inverse(br, bi, table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        if SCALED:
            yr = _scaled(yr, up * factor, P)
            yi = _scaled(yi, up2 * factor, P)
        if POST:
            at = post_ptr + b * post_b + h * post_h + t
            yr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
            yi *= tl.load(at + post_b, mask=live2, other=0.0).to(tl.float32)
        tl.store(y_ptr + (b * channels + h) * length + t, yr.to(y_ptr.dtype.element_ty), mask=live)
        tl.store(y_ptr + ((b + 1) * channels + h) * length + t, yi.to(y_ptr.dtype.element_ty), mask=live2)


@triton.jit
def gradients(
    gy_ptr, u_ptr, pre_ptr, post_ptr, k_ptr, rev_ptr, skip_ptr, table, gu_ptr, gpre_ptr, gpost_ptr, gk_ptr,
    batch, channels, length, taps, behind, steps, gy_b, gy_h, u_b, u_h, pre_b, pre_h, post_b, post_h,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    REV: tl.constexpr, SKIP: tl.constexpr, INPUT: tl.constexpr, GATE: tl.constexpr, FILTER: tl.constexpr,
    OP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """All gradients for ``steps`` groups of P pairs; that of the filter, of all M places, is a partial sum.

    INPUT: of u (and of the first gate). GATE: of the second gate, for which y is computed again. FILTER: of the filter.
    Neighbours share a scale here, as the sum over them needs: the smaller gradient of a pair has the larger one's
    rounding errors.
    """
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    H: tl.constexpr = N1 // 2
    W: tl.constexpr = N2 if N3 == 1 else N3
    h = (tl.program_id(0) % channels).to(tl.int64)
    part = tl.program_id(0) // channels
    group = part * steps
    kr, ki, factor = _filter(
        k_ptr, rev_ptr, skip_ptr, table, h, taps, behind, REV, SKIP, SCALED, P, N1, N2, N3, OP, PRECISION, PACKED
    )
    row = tl.arange(0, P * R)
    column = tl.arange(0, N1)
    t = (row % R)[:, None] + tl.arange(0, H)[None, :] * R
    sr = tl.zeros((P * M // W, W), tl.float32)
    si = tl.zeros((P * M // W, W), tl.float32)
    for step in range(steps):
        b = (2 * ((group + step) * P + row // R))[:, None].to(tl.int64)
        live = (t < length) & (b < batch)
        live2 = (t < length) & (b + 1 < batch)
        at = gy_ptr + b * gy_b + h * gy_h + t
        wr = tl.load(at, mask=live, other=0.0).to(tl.float32)
        wi = tl.load(at + gy_b, mask=live2, other=0.0).to(tl.float32)
        if POST:
            at = post_ptr + b * post_b + h * post_h + t
            wr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
            wi *= tl.load(at + post_b, mask=live2, other=0.0).to(tl.float32)
        if SCALED:
            up, down = _scales(tl.maximum(tl.abs(wr), tl.abs(wi)), P)
            wr = _scaled(wr, down, P)
            wi = _scaled(wi, down, P)
        ar, ai = forward(pairs(wr, wi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
        kr32 = kr.to(tl.float32)
        ki32 = ki.to(tl.float32)
        out = (b * channels + h) * length + t
        out2 = ((b + 1) * channels + h) * length + t
        if INPUT:
            xr, xi = inverse(
                ar * kr32 + ai * ki32, ai * kr32 - ar * ki32, table, False, P, N1, N2, N3, OP, PRECISION, PACKED
            )
            if SCALED:
                xr = _scaled(xr, up * factor, P)
                xi = _scaled(xi, up * factor, P)
            if PRE:
                at = u_ptr + b * u_b + h * u_h + t
                gr = xr * tl.load(at, mask=live, other=0.0).to(tl.float32)
                gi = xi * tl.load(at + u_b, mask=live2, other=0.0).to(tl.float32)
                tl.store(gpre_ptr + out, gr.to(gpre_ptr.dtype.element_ty), mask=live)
                tl.store(gpre_ptr + out2, gi.to(gpre_ptr.dtype.element_ty), mask=live2)
                at = pre_ptr + b * pre_b + h * pre_h + t
                xr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
                xi *= tl.load(at + pre_b, mask=live2, other=0.0).to(tl.float32)
            tl.store(gu_ptr + out, xr.to(gu_ptr.dtype.element_ty), mask=live)
            tl.store(gu_ptr + out2, xi.to(gu_ptr.dtype.element_ty), mask=live2)
        if FILTER or GATE:
            at = u_ptr + b * u_b + h * u_h + t
            xr = tl.load(at, mask=live, other=0.0).to(tl.float32)
            xi = tl.load(at + u_b, mask=live2, other=0.0).to(tl.float32)
            if PRE:
                at = pre_ptr + b * pre_b + h * pre_h + t
                xr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
                xi *= tl.load(at + pre_b, mask=live2, other=0.0).to(tl.float32)
            if SCALED:
                rise, fall = _scales(tl.maximum(tl.abs(xr), tl.abs(xi)), P)
                xr = _scaled(xr, fall, P)
                xi = _scaled(xi, fall, P)
            zr, zi = forward(pairs(xr, xi, OP), table, False, P, N1, N2, N3, OP, PRECISION, PACKED)
            if FILTER:  # the real part, in time, of conj(Z) W is the sum of both correlations
                fr = zr * ar + zi * ai
                fi = zr * ai - zi * ar
                if SCALED:
                    fr = _scaled(fr, up * rise, P)
                    fi = _scaled(fi, up * rise, P)
                sr += fr
                si += fi
            if GATE:
                yr, yi = inverse(
                    zr * kr32 - zi * ki32, zr * ki32 + zi * kr32, table, False, P, N1, N2, N3, OP, PRECISION, PACKED
                )
                if SCALED:
                    yr = _scaled(yr, rise * factor, P)
                    yi = _scaled(yi, rise * factor, P)
                at = gy_ptr + b * gy_b + h * gy_h + t
                yr *= tl.load(at, mask=live, other=0.0).to(tl.float32)
                yi *= tl.load(at + gy_b, mask=live2, other=0.0).to(tl.float32)
                tl.store(gpost_ptr + out, yr.to(gpost_ptr.dtype.element_ty), mask=live)
                tl.store(gpost_ptr + out2, yi.to(gpost_ptr.dtype.element_ty), mask=live2)
    if FILTER:
        if SCALED:
            large, small = _power_below(tl.maximum(tl.max(tl.abs(sr)), tl.max(tl.abs(si))))
            sr *= small
            si *= small
        gr, gi = inverse(sr, si, table, True, P, N1, N2, N3, OP, PRECISION, PACKED)
        if SCALED:
            gr *= large
        total = tl.sum(tl.reshape(gr, (P, R, N1)), 0)
        at = (part * channels + h) * M + tl.arange(0, R)[:, None] + column[None, :] * R
        tl.store(gk_ptr + at, total)


def config(batch: int, points: int, half: bool, backward: bool) -> Config:
    """Transforms side by side in a program and its warps."""
    most = 8192 if half and not backward else 4096
    P = max(1, min(most // points, power(cdiv(batch, 2))))
    tile = P * points
    warps = max(4, min(16, tile // (512 if backward or not half else 1024)))
    return {"P": P, "num_warps": warps}


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
        launch(convolve, grid, tensors, (*sizes, *su, *sp, *sq), **constants)
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
        launch(gradients, grid, tensors, (*sizes, *sg, *su, *sp, *sq), **constants)
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
