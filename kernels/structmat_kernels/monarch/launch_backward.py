"""The gradients of the Monarch product from tensors to kernel launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from structmat_kernels.launches import Launch, Preferences, arithmetic
from structmat_kernels.monarch import backward as kb
from structmat_kernels.monarch import large
from structmat_kernels.monarch import wide as kw
from structmat_kernels.monarch.launch import Call, hidden, rows
from structmat_kernels.monarch.rules import Factors, choose_backward
from structmat_kernels.sizes import cdiv, pad
from structmat_kernels.tuning import Config

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
#: From gy, x, left, right, gx, gleft, gright, gbias to nothing: the last four are filled.
Plan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


class BackwardCall(NamedTuple):
    """What the launches of a backward pass depend on; ``call`` is that of the forward product of x."""

    call: Call
    gy_strides: tuple[int, ...]
    ncols: int
    want_x: bool
    want_w: bool
    want_b: bool


def backward(
    gy: Tensor,
    x: Tensor | None,
    left: Tensor,
    right: Tensor,
    ncols: int,
    want_x: bool,
    want_w: bool,
    config: Config | None = None,
    want_b: bool = False,
) -> Gradients:
    """Gradients (x, left, right, bias), None for what is not wanted.

    Without ``want_w``, x is not read: this is the transposed product. Shapes are those of ``launch.forward``.
    """
    z = Factors(*left.shape[-3:], *right.shape[-3:])
    lead, nrows = gy.shape[:-1], gy.shape[-1]
    gy, G, T, _, *gy_strides = rows(gy, left.ndim == 4)
    left, right = left.contiguous(), right.contiguous()
    if T == 0 or G == 0:
        gx = gy.new_empty((*lead, ncols)) if want_x else None
        gbias = gy.new_zeros((*left.shape[:-3], nrows)) if want_b else None
        return gx, torch.zeros_like(left) if want_w else None, torch.zeros_like(right) if want_w else None, gbias
    # What is not wanted is neither read nor written: any tensor stands for it.
    x, _, _, n, *strides = rows(x, left.ndim == 4) if want_w and x is not None else (gy, G, T, ncols, 0, 0)
    precision = torch.get_float32_matmul_precision()
    call = Call(gy.device, gy.dtype, precision, G, T, n, tuple(strides), z, nrows, "", False)
    key = BackwardCall(call, tuple(gy_strides), ncols, want_x, want_w, want_b)
    plan = _plan(key) if config is None else _prefer(key, [config])
    if plan is None:
        return *large.backward(gy, x, left, right, ncols, want_x, want_w, lead), _sums(gy, left) if want_b else None
    gx = torch.empty((*lead, ncols), dtype=gy.dtype, device=gy.device) if want_x else gy
    gleft, gright = (torch.empty_like(left), torch.empty_like(right)) if want_w else (gy, gy)
    gbias = torch.empty((*left.shape[:-3], nrows), dtype=gy.dtype, device=gy.device) if want_b else gy
    plan(gy, x, left, right, gx, gleft, gright, gbias)
    grads = (gx if want_x else None, gleft if want_w else None, gright if want_w else None)
    return *grads, gbias if want_b else None


def _sums(gy: Tensor, left: Tensor) -> Tensor:
    """The gradient of a bias where no kernel makes it on its way."""
    return gy.sum(-2) if left.ndim == 4 else gy.flatten(0, -2).sum(0)


@functools.lru_cache(1024)
def _plan(key: BackwardCall) -> Plan | None:
    call = key.call
    return _prefer(key, choose_backward(call.z, call.T, call.dtype, call.device))


def _prefer(key: BackwardCall, configs: list[Config]) -> Plan | None:
    return None if configs[0]["path"] == "cublas" else Preferences(configs, functools.partial(_build, key))


def _split(tiles: int, programs: int, target: int) -> int:
    """Programs for each of ``programs`` pieces of work on ``tiles`` tiles, about ``target`` in all."""
    return max(1, min(tiles, target // max(programs, 1)))


def _build(key: BackwardCall, c: Config) -> Plan:
    """Hidden entries again (for the gradients of left), left stage, right stage, the sums of partial sums."""
    call = key.call
    z, G, TT = call.z, call.G, c["TT"]
    tiles = cdiv(call.T, TT)
    h_shape, first = hidden(call, c["hidden"] | {"TT": TT})
    second, lefts = (_wide_left if c["path"] == "wide" else _general_left)(key, c, tiles)
    third, rights = (_wide_right if c["path"] == "wide" else _right)(key, c, tiles)
    sizes = (G * z.L * z.S * z.R, G * z.K * z.Q * z.P, G * call.nrows)
    # The copy that sorts gy by left blocks makes sums for the bias, too.
    parts = cdiv(call.T, large.PART) if key.want_b else 0
    reduce = _reduction(sizes, (lefts, rights, parts), key.want_w)

    def plan(
        gy: Tensor, x: Tensor, left: Tensor, right: Tensor, gx: Tensor, gleft: Tensor, gright: Tensor, gbias: Tensor
    ) -> None:
        gh = torch.empty(h_shape, dtype=gy.dtype, device=gy.device)
        h = left_sums = right_sums = bias_sums = gy
        if key.want_w:
            h = torch.empty(h_shape, dtype=gy.dtype, device=gy.device)
            left_sums = torch.empty(lefts * sizes[0], dtype=torch.float32, device=gy.device)
            right_sums = torch.empty(rights * sizes[1], dtype=torch.float32, device=gy.device)
            first(x, right, h)
        if parts:
            bias_sums = torch.empty(parts * sizes[2], dtype=torch.float32, device=gy.device)
        second(gy, left, h, gh, left_sums, bias_sums)
        third(gh, right, x, gx, right_sums)
        if reduce is not None:
            reduce(left_sums, gleft, right_sums, gright, bias_sums, gbias)

    return plan


def _right(key: BackwardCall, c: Config, tiles: int) -> tuple[Callable[..., None], int]:
    """The launch (gh, right, x, gx, sums) and its number of partial sums."""
    call, r = key.call, c["right"]
    z, G = call.z, call.G
    TX = max(r["TX"], c["TT"])
    spans = cdiv(call.T, TX)
    walkers = _split(spans, G * z.K, r["programs"])
    run = Launch(
        kb.right_backward, (z.K, walkers, G), (call.T, key.ncols, tiles, spans, walkers, G, *call.strides), L=z.L,
        R=z.R, K=z.K, Q=z.Q, P=z.P, TT=c["TT"], TX=TX, BQ=pad(z.Q), BP=pad(z.P), STAGES=r["STAGES"],
        WANT_X=key.want_x, WANT_W=key.want_w, **arithmetic(call.dtype), num_warps=r["num_warps"],
    )  # fmt: skip
    return run, walkers


def _wide_left(key: BackwardCall, c: Config, tiles: int) -> tuple[Callable[..., None], int]:
    """As ``_general_left``, for blocks that are larger than a tile."""
    call = key.call
    z, T, G, TT = call.z, call.T, call.G, c["TT"]
    BS, BR = min(c["SIDE"], pad(z.S)), min(c["SIDE"], pad(z.R))
    TX = max(c["TX"], TT)
    pieces = z.L * cdiv(z.S, BS) * cdiv(z.R, BR)
    walkers = _split(tiles, G * pieces, c["programs"])
    sort = large.deinterleaving(T, call.nrows, key.gy_strides, z.L, z.S, G, key.want_b)
    common = {"L": z.L, "S": z.S, "R": z.R, "TT": TT, "BR": BR, "STAGES": c["STAGES"], **arithmetic(call.dtype)}
    common |= {"num_warps": c["num_warps"]}
    grid = (cdiv(T, TX) * z.L * cdiv(z.R, BR), G)
    multiply = Launch(kw.hidden_gradient, grid, (T, tiles), TX=TX, BK=min(c["BK"], pad(z.S)), **common)
    add = Launch(kw.left_sums, (pieces, walkers, G), (T, tiles, walkers, G), BS=BS, **common)

    def both(gy: Tensor, left: Tensor, h: Tensor, gh: Tensor, sums: Tensor, bias_sums: Tensor) -> None:
        by_left = torch.empty((G, z.L, T, z.S), dtype=gy.dtype, device=gy.device)
        sort(gy, by_left, bias_sums)
        multiply(by_left, left, gh)
        if key.want_w:
            add(by_left, h, sums)

    return both, walkers


def _wide_right(key: BackwardCall, c: Config, tiles: int) -> tuple[Callable[..., None], int]:
    """As ``_right``, for blocks that are larger than a tile."""
    call = key.call
    z, T, G, TT = call.z, call.T, call.G, c["TT"]
    BQ, BP = min(c["SIDE"], pad(z.Q)), min(c["SIDE"], pad(z.P))
    TX = max(c["TX"], TT)
    pieces = z.K * cdiv(z.Q, BQ) * cdiv(z.P, BP)
    walkers = _split(tiles, G * pieces, c["programs"])
    common = {"L": z.L, "R": z.R, "K": z.K, "Q": z.Q, "P": z.P, "TT": TT, "BP": BP, "STAGES": c["STAGES"]}
    common |= arithmetic(call.dtype) | {"num_warps": c["num_warps"]}
    grid = (cdiv(T, TX) * z.K * cdiv(z.P, BP), G)
    multiply = Launch(kw.input_gradient, grid, (T, key.ncols, tiles), TX=TX, BK=min(c["BK"], pad(z.Q)), **common)
    sizes = (T, key.ncols, tiles, walkers, G, *call.strides)
    add = Launch(kw.right_sums, (pieces, walkers, G), sizes, BQ=BQ, **common)

    def both(gh: Tensor, right: Tensor, x: Tensor, gx: Tensor, sums: Tensor) -> None:
        if key.want_x:
            multiply(gh, right, gx)
        if key.want_w:
            add(gh, x, sums)

    return both, walkers


def _general_left(key: BackwardCall, c: Config, tiles: int) -> tuple[Callable[..., None], int]:
    """The launches (gy, left, h, gh, sums, sums for the bias) and their number of partial sums."""
    call = key.call
    z, T, G = call.z, call.T, call.G
    walkers = _split(tiles, G * z.L, c["programs"])
    sort = large.deinterleaving(T, call.nrows, key.gy_strides, z.L, z.S, G, key.want_b)
    run = Launch(
        kb.left_backward, (z.L, walkers, G), (T, tiles, walkers, G), L=z.L, S=z.S, R=z.R, TT=c["TT"], BS=pad(z.S),
        BR=pad(z.R), STAGES=c["STAGES"], WANT_W=key.want_w, **arithmetic(call.dtype), num_warps=c["num_warps"],
    )  # fmt: skip

    def both(gy: Tensor, left: Tensor, h: Tensor, gh: Tensor, sums: Tensor, bias_sums: Tensor) -> None:
        by_left = torch.empty((G, z.L, T, z.S), dtype=gy.dtype, device=gy.device)
        sort(gy, by_left, bias_sums)
        run(by_left, left, h, gh, sums)

    return both, walkers


def _reduction(sizes: tuple[int, int, int], splits: tuple[int, int, int], want_w: bool) -> Launch | None:
    """Adds up the stacks of partial sums in one launch: (sums, result) for left, right and bias."""
    if not want_w and not splits[2]:
        return None
    BLOCK = 128 if max(sizes[:2]) <= 1 << 17 else 512
    SHORT = 32
    blocks = (cdiv(sizes[0], BLOCK), cdiv(sizes[1], BLOCK)) if want_w else (0, 0)
    programs = sum(blocks) + (cdiv(sizes[2], SHORT) if splits[2] else 0)
    tiles = {"BLOCK": BLOCK, "ROWS": 2048 // BLOCK, "SHORT": SHORT, "LONG": 2048 // SHORT}
    return Launch(kb.reduce, (programs,), (*blocks, *sizes, *splits), **tiles, num_warps=4)
