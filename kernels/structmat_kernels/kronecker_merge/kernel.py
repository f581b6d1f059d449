"""Triton kernels of the product of chained Kronecker-sparse factors and of its gradients.

A thread computes entries of the result by multiplying one entry of each factor; a gradient's entry is a sum over the
entries of the result that it is part of. Both are bound by latency: the numbers are few and stay in the cache.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat_kernels.backend import INTERPRETED
from structmat_kernels.kronecker_merge.reference import shapes
from structmat_kernels.launches import launch

# The interpreter takes as long for a long vector as for a short one.
_BLOCK = 4096 if INTERPRETED else 512
_BLOCK_BACKWARD = 4096 if INTERPRETED else 128


# LEVELS holds eight numbers for each factor: where its values start, b, c, the products of the b's and of the c's whose
# digits are less significant, those of the digits in its a and in its d beyond the common ones, its number of values.


@triton.jit
def _offset(A, D, B, C, LEVELS: tl.constexpr, AT: tl.constexpr, ND: tl.constexpr, MIRROR: tl.constexpr):
    """Where the entry of a level stands that entry (A, D, B, C) of the result has for a factor."""
    start: tl.constexpr = LEVELS[AT + 0]
    b: tl.constexpr = LEVELS[AT + 1]
    c: tl.constexpr = LEVELS[AT + 2]
    bdiv: tl.constexpr = LEVELS[AT + 3]
    cdiv: tl.constexpr = LEVELS[AT + 4]
    apre: tl.constexpr = LEVELS[AT + 5]
    dpost: tl.constexpr = LEVELS[AT + 6]
    o = B // bdiv % b
    i = C // cdiv % c
    if MIRROR:
        head = B // (bdiv * b)
        tail = C % cdiv
    else:
        head = C // (cdiv * c)
        tail = B % bdiv
    return start + (((A * apre + head) * b + o) * c + i) * (dpost * ND) + tail * ND + D


@triton.jit
def _forward(
    flat_ptr, out_ptr, LEVELS: tl.constexpr, COUNT: tl.constexpr, ND: tl.constexpr, NB: tl.constexpr,
    NC: tl.constexpr, SIZE: tl.constexpr, TOTAL: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < TOTAL
    C = at % NC
    B = at // NC % NB
    D = at // (NC * NB) % ND
    A = at // (NC * NB * ND)
    product = tl.full((BLOCK,), 1.0, tl.float32)
    for level in tl.static_range(COUNT):
        where = _offset(A, D, B, C, LEVELS, 8 * level, ND, MIRROR)
        product *= tl.load(flat_ptr + batch * SIZE + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * TOTAL + at, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, flat_ptr, out_ptr, LEVELS: tl.constexpr, COUNT: tl.constexpr, ND: tl.constexpr, NB: tl.constexpr,
    NC: tl.constexpr, SIZE: tl.constexpr, TOTAL: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    mine = tl.program_id(2)
    for level in tl.static_range(COUNT):
        if mine == level:
            start: tl.constexpr = LEVELS[8 * level + 0]
            b: tl.constexpr = LEVELS[8 * level + 1]
            c: tl.constexpr = LEVELS[8 * level + 2]
            bdiv: tl.constexpr = LEVELS[8 * level + 3]
            cdiv: tl.constexpr = LEVELS[8 * level + 4]
            apre: tl.constexpr = LEVELS[8 * level + 5]
            dpost: tl.constexpr = LEVELS[8 * level + 6]
            entries: tl.constexpr = LEVELS[8 * level + 7]
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = at < entries
            D = at % ND
            tail = at // ND % dpost
            i = at // (ND * dpost) % c
            o = at // (ND * dpost * c) % b
            head = at // (ND * dpost * c * b) % apre
            A = at // (ND * dpost * c * b * apre)
            total = tl.zeros((BLOCK,), tl.float32)
            outputs: tl.constexpr = bdiv if MIRROR else NB // (b * bdiv)
            inputs: tl.constexpr = NC // (c * cdiv) if MIRROR else cdiv
            for free in range(outputs * inputs):
                u = free // inputs
                v = free % inputs
                if MIRROR:
                    B = (head * b + o) * bdiv + u
                    C = (v * c + i) * cdiv + tail
                else:
                    B = (u * b + o) * bdiv + tail
                    C = (head * c + i) * cdiv + v
                entry = ((A * ND + D) * NB + B) * NC + C
                product = tl.load(grad_ptr + batch * TOTAL + entry, mask=inside, other=0.0).to(tl.float32)
                for other in tl.static_range(COUNT):
                    if other != level:
                        where = _offset(A, D, B, C, LEVELS, 8 * other, ND, MIRROR)
                        product *= tl.load(flat_ptr + batch * SIZE + where, mask=inside, other=0.0).to(tl.float32)
                total += product
            tl.store(out_ptr + batch * SIZE + start + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(1024)
def _constants(radices: tuple[tuple[int, int], ...], a: int, d: int, mirror: bool) -> dict:
    levels, start = [], 0
    for i, (outer, b, c, inner) in enumerate(shapes(radices, a, d, mirror)):
        others = radices[:i] if mirror else radices[i + 1 :]
        bdiv, cdiv = (math.prod(r[side] for r in others) for side in (0, 1))
        entries = outer * b * c * inner
        levels += [start, b, c, bdiv, cdiv, outer // a, inner // d, entries]
        start += entries
    nb, nc = (math.prod(r[side] for r in radices) for side in (0, 1))
    sizes = {"ND": d, "NB": nb, "NC": nc, "SIZE": start, "TOTAL": a * d * nb * nc}
    return {"LEVELS": tuple(levels), "COUNT": len(radices), **sizes, "MIRROR": mirror}


def merge(flat: Tensor, radices: tuple[tuple[int, int], ...], a: int, d: int, mirror: bool) -> Tensor:
    """The blocks (G, a, d, b, c) of the product, in the dtype of the packed values (G, size)."""
    constants = _constants(radices, a, d, mirror)
    out = torch.empty((len(flat), a, d, constants["NB"], constants["NC"]), dtype=flat.dtype, device=flat.device)
    grid = (triton.cdiv(constants["TOTAL"], _BLOCK), len(flat))
    launch(_forward, grid, (flat.contiguous(), out), (), **constants, BLOCK=_BLOCK, num_warps=4)
    return out


def gradient(grad: Tensor, flat: Tensor, radices: tuple[tuple[int, int], ...], a: int, d: int, mirror: bool) -> Tensor:
    """The gradient of the packed values (G, size), from that of the blocks."""
    constants = _constants(radices, a, d, mirror)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    most = max(constants["LEVELS"][7::8])
    grid = (triton.cdiv(most, _BLOCK_BACKWARD), len(flat), constants["COUNT"])
    tensors = (grad.contiguous(), flat.contiguous(), out)
    launch(_backward, grid, tensors, (), **constants, BLOCK=_BLOCK_BACKWARD, num_warps=4)
    return out
