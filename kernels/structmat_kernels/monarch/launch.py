"""The forward product from tensors to kernel launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from structmat_kernels.launches import Launch, Preferences, arithmetic, processors
from structmat_kernels.monarch import kernel as kf
from structmat_kernels.monarch import large
from structmat_kernels.monarch import resident as kr
from structmat_kernels.monarch.rules import Factors, choose
from structmat_kernels.sizes import cdiv, pad, power
from structmat_kernels.tuning import Config

#: From x, left, right, bias to y.
Plan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """Matrices of tokens as kernels address them: G of T rows, each of ``width`` adjacent entries."""

    tensor: Tensor
    G: int
    T: int
    width: int
    batch_stride: int
    token_stride: int


def rows(x: Tensor, batched: bool) -> Rows:
    """x (G, T, n), or of shape (*lead, n) as one matrix; copied only where no two strides describe it."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if batched:
        return Rows(x, x.shape[0], x.shape[1], x.shape[2], x.stride(0), x.stride(1))
    if x.ndim > 2:
        if not x.is_contiguous():
            x = x.reshape(-1, x.shape[-1])
        elif x.shape[-1]:
            return Rows(x, 1, x.numel() // x.shape[-1], x.shape[-1], 0, x.shape[-1])
        else:
            x = x.flatten(0, -2)
    return Rows(x, 1, x.shape[0], x.shape[1], 0, x.stride(0))


class Call(NamedTuple):
    """What the launches of a forward product depend on."""

    device: torch.device
    dtype: torch.dtype
    precision: str
    G: int
    T: int
    n: int
    strides: tuple[int, ...]
    z: Factors
    nrows: int
    activation: str
    has_bias: bool


def forward(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    nrows: int,
    activation: str,
    config: Config | None = None,
) -> Tensor | None:
    """``activation(x @ M.mT + bias)``, or None where no kernel serves these sizes.

    Args:
        x: shape (G, T, n) where left has four dimensions, else (*lead, n).
        left: shape (G, l, s, r) or (l, s, r).
        right: shape (G, k, q, p) or (k, q, p).
        bias: shape (G, nrows) or (nrows,); None or without entries: none.
        nrows: number of outputs.
        activation: a name, or "".
        config: path and tiles; those of ``choose`` by default.
    """
    lead = x.shape[:-1]
    x, G, T, n, *strides = rows(x, left.ndim == 4)
    z = Factors(*left.shape[-3:], *right.shape[-3:])
    has_bias = bias is not None and bias.numel() > 0
    precision = torch.get_float32_matmul_precision()
    call = Call(x.device, x.dtype, precision, G, T, n, tuple(strides), z, nrows, activation, has_bias)
    plan = _plan(call) if config is None else _prefer(call, [config])
    if plan is None:
        return None
    left, right = left.contiguous(), right.contiguous()
    y = plan(x, left, right, bias.contiguous() if has_bias and bias is not None else x)
    return y if y.ndim == len(lead) + 1 else y.view(*lead, nrows)


@functools.lru_cache(1024)
def _plan(call: Call) -> Plan | None:
    return _prefer(call, choose(call.z, call.T, call.dtype, call.device))


def _prefer(call: Call, configs: list[Config]) -> Plan | None:
    return None if configs[0]["path"] == "reference" else Preferences(configs, functools.partial(_build, call))


def _build(call: Call, c: Config) -> Plan:
    if call.G * call.T * call.nrows == 0:
        return lambda x, left, right, bias: x.new_empty((*x.shape[:-1], call.nrows))
    if c["path"] == "cublas":
        return functools.partial(large.forward, nrows=call.nrows, activation=call.activation, has_bias=call.has_bias)
    return {"small": _small, "resident": _resident, "stages": _stages}[c["path"]](call, c)


def _epilogue(call: Call) -> dict:
    return {"ACT": call.activation, "HAS_BIAS": call.has_bias}


def _output(call: Call, x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], call.nrows), dtype=x.dtype, device=x.device)


def _one_launch(call: Call, run: Launch) -> Plan:
    def plan(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        y = _output(call, x)
        run(x, left, right, bias, y)
        return y

    return plan


def _small(call: Call, c: Config) -> Plan:
    z = call.z
    tiles = {"TT": c["TT"], "BI": min(c["BI"], pad(z.R)), "BR": pad(z.R), "BP": pad(z.P), "BU": pad(z.S)}
    run = Launch(
        kf.small, (z.L, cdiv(call.T, c["TT"]), call.G), (call.T, call.n, call.nrows, *call.strides),
        **z._asdict(), **tiles, **_epilogue(call), num_warps=c["num_warps"],
    )  # fmt: skip
    return _one_launch(call, run)


def _resident(call: Call, c: Config) -> Plan:
    z, T = call.z, call.T
    JB = min(c["JB"], pad(z.L))
    groups, tiles = cdiv(z.L, JB), cdiv(T, c["TT"])
    walkers = min(tiles, cdiv(processors(call.device) * c["CTAS"], groups * call.G))
    run = Launch(
        kr.resident, (groups * walkers, call.G), (T, call.n, call.nrows, tiles, walkers, *call.strides), **z._asdict(),
        TT=c["TT"], JB=JB, BI=pad(z.R), BP=pad(z.P), BU=pad(z.S), STAGES=c["STAGES"], **_epilogue(call),
        **arithmetic(call.dtype), num_warps=c["num_warps"],
    )  # fmt: skip
    return _one_launch(call, run)


def _stages(call: Call, c: Config) -> Plan:
    z, T, G = call.z, call.T, call.G
    TT, JB, BU, BR = c["TT"], min(c["JB"], power(z.L)), min(c["BU"], pad(z.S)), min(c["BR"], pad(z.R))
    tiles, parts = cdiv(T, TT), cdiv(z.L, JB) * cdiv(z.S, BU)
    shape, first = hidden(call, c)
    shared = {"L": z.L, "S": z.S, "R": z.R, "TT": TT, "JB": JB, "BU": BU, "STAGES": c["STAGES"], **_epilogue(call)}
    shared |= arithmetic(call.dtype) | {"num_warps": c["num_warps"]}
    if "CTAS" in c:
        walkers = min(tiles, cdiv(processors(call.device) * c["CTAS"], parts * G))
        sizes = (T, call.nrows, tiles, walkers)
        second = Launch(kr.resident_left, (parts * walkers, G), sizes, BR=pad(z.R), **shared)
    else:
        sizes = (T, call.nrows, tiles)
        second = Launch(kf.left_stage, (tiles * parts, G), sizes, BR=BR, BATCHED=c["BATCHED"], **shared)

    def plan(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        h = torch.empty(shape, dtype=x.dtype, device=x.device)
        y = _output(call, x)
        first(x, right, h)
        second(h, left, bias, y)
        return y

    return plan


def hidden(call: Call, c: Config) -> tuple[tuple[int, ...], Launch]:
    """The shape (G, token tiles, l, r, TT) of ``right x`` and the launch (x, right, h) that computes it."""
    z, T = call.z, call.T
    TT, TX, BA = c["TT"], max(c.get("TX", 0), c["TT"]), min(c["BA"], pad(z.Q))
    tiles, BP = cdiv(T, TT), min(64 if call.dtype.itemsize == 2 else 32, pad(z.P))
    run = Launch(
        kf.right_stage, (cdiv(T, TX) * z.K * cdiv(z.Q, BA), call.G), (T, call.n, tiles, *call.strides), L=z.L, R=z.R,
        K=z.K, Q=z.Q, P=z.P, TT=TT, TX=TX, BA=BA, BP=BP, STAGES=c.get("RSTAGES", 2),
        **arithmetic(call.dtype), num_warps=c.get("right_warps", 4),
    )  # fmt: skip
    return (call.G, tiles, z.L, z.R, TT), run
