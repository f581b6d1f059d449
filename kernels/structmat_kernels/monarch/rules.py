"""Which path and which tiles serve a Monarch product: by a table of measurements, else by rule.

The rules come from measurements on an H100 with blocks of 32 to 2048 (see docs/benchmarks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from structmat_kernels.launches import shared_memory
from structmat_kernels.sizes import pad, power
from structmat_kernels.tuning import Config, lookup

# Blocks wider than this go to cuBLAS: its products of large blocks are nearer to the hardware's rate than ours.
WIDEST = 128


class Factors(NamedTuple):
    """The sizes of left (l, s, r) and right (k, q, p)."""

    L: int
    S: int
    R: int
    K: int
    Q: int
    P: int

    @property
    def widest(self) -> int:
        """The longest side of a block."""
        return max(self.S, self.R, self.Q, self.P)


def choose(z: Factors, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Configurations of the forward product: the best first, others that need less shared memory after it."""
    found = lookup("monarch", device, dtype, tuple(z), tokens)
    if found:
        return [found]
    L, S, R, K, Q, P = z
    half, large = dtype.itemsize == 2, shared_memory(device) > 200_000
    if z.widest > WIDEST:
        return [_large_blocks(z, tokens, half, large)]
    if tokens * K * P <= 16384 or (K * P <= 2048 and tokens <= 16):
        return [{"path": "small", "TT": 1, "BI": 64, "num_warps": 8}]
    # Sixteen kilobytes of x a program.
    BA, TX = (64 if Q <= 64 or not half else 128), (256 if P <= 32 and half else 64)
    stages = {"path": "stages", "BATCHED": True, "BA": BA, "TX": TX, "right_warps": 8 if BA * TX > 1 << 14 else 4}
    if tokens <= 128:
        tile = {"TT": 16, "TX": 16, "BA": 32, "JB": 4 if tokens <= 16 else 8, "BU": 16, "BR": 64 if half else 32}
        return [stages | tile | {"STAGES": 2, "num_warps": 4}]
    configs = _resident(z, dtype.itemsize, shared_memory(device))
    # Left blocks in shared memory, JB of them (all where fewer than 32: rows of outputs are then adjacent in memory),
    # whole or, where the outputs are most of the traffic, pieces of them.
    BU, room = pad(S), shared_memory(device)
    JB = 32 if 16 < L < 32 else 16
    tile = {"TT": 16, "JB": JB, "BR": pad(R), "STAGES": 3, "num_warps": 8, "CTAS": 1}
    # The outputs' tile counts where room is short; an H100 has room for more than this bound says.
    outputs = 0 if large else 16
    for rows in (BU, BU // 2, BU // 4) if S > R or JB == 32 or not half else (BU,):
        fits = dtype.itemsize * JB * (pad(R) * (rows + 2 * 16) + outputs * rows) <= room
        if L >= 16 and rows >= 16 and fits and (half or rows <= 32):  # more spills registers
            configs.append(stages | tile | {"BU": rows})
    if L < 16:
        JB, BU = (4 if L <= 4 else 8), (64 if half else 32)
        tile = {"JB": JB, "TT": 64, "BU": BU, "BR": BU, "num_warps": JB if half else 8, "BATCHED": False}
    elif half and large:  # masks take registers
        tile = {"JB": 16, "TT": 32 if S % 32 or R % 32 else 64, "BU": 32, "BR": 32, "num_warps": 8}
    else:
        tile = {"JB": 16, "TT": 16, "BU": 32, "BR": 16, "num_warps": 8}
    return [*configs, stages | {"STAGES": 2} | tile, SMALLEST]


#: Tiles that any device has room for.
SMALLEST: Config = {"path": "stages", "BATCHED": True, "TT": 16, "TX": 16, "BA": 16, "JB": 4, "BU": 16, "BR": 16}
SMALLEST |= {"STAGES": 1, "RSTAGES": 1, "num_warps": 4, "right_warps": 4}


def _large_blocks(z: Factors, tokens: int, half: bool, large: bool) -> Config:
    if tokens <= 128:  # the factors are most of the traffic: many programs with deep pipelines
        TT, deep = max(16, min(64, power(tokens))), 5 if half and large else 3
        tile = {"TX": TT, "TT": TT, "BA": 64 if z.Q >= 512 else 32, "JB": 1 if TT == 16 else 2, "BU": 16, "BR": 64}
        depths = {"RSTAGES": deep, "STAGES": deep}
        return {"path": "stages", "right_warps": 4, "BATCHED": False, "num_warps": 4} | tile | depths
    if z.Q % z.L == 0 and not (half and z.L <= 8 and z.Q // z.L < 256):
        return {"path": "cublas"}
    stages = 3 if half and large else 2
    side, depth = (128, 64) if half else (64, 32)
    tile = {"TX": side, "BA": side, "right_warps": 8, "RSTAGES": stages, "TT": 64, "BU": depth, "BR": depth}
    return {"path": "stages", "JB": 4, "BATCHED": False, "STAGES": stages, "num_warps": 4} | tile


def _resident(z: Factors, item: int, room: int) -> list[Config]:
    """Both factors of JB left blocks in shared memory, where the hidden entries that they read are adjacent rows."""
    BI, BP, BU = pad(z.R), pad(z.P), pad(z.S)
    for JB, warps in ((32, 16), (16, 8)):
        direct = z.Q % z.L == 0 or (z.Q % JB == 0 and z.L % JB == 0)
        needed = item * (JB * BI * (BP + BU) + 2 * BI * 16 * BP + JB * 16 * max(BI, BU))
        if direct and pad(z.L) >= JB and needed <= room:
            warps = 16 if item == 4 and BU >= 64 else warps
            return [{"path": "resident", "TT": 16, "JB": JB, "STAGES": 3, "num_warps": warps, "CTAS": 1}]
    return []


def choose_backward(z: Factors, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Configurations of the gradients, as for ``choose``.

    Paths: "general" (a program keeps a block of a factor and the sums of its gradient), "wide" (tiles of a block),
    "cublas".
    """
    found = lookup("monarch_backward", device, dtype, tuple(z), tokens)
    if found:
        return [found]
    half, large = dtype.itemsize == 2, shared_memory(device) > 200_000
    smallest = {"path": "wide", "TT": 16, "TX": 16, "SIDE": 32, "BK": 16, "STAGES": 1, "num_warps": 4, "programs": 264}
    smallest |= {"hidden": {"TX": 16, "BA": 16, "RSTAGES": 1, "right_warps": 4}}
    if z.widest > (WIDEST if half else 32):  # sums of larger blocks of float32 do not fit the registers
        if z.Q % z.L == 0 and z.Q // z.L >= 256:
            return [{"path": "cublas"}]
        first = {"TX": 128, "BA": 128, "RSTAGES": 3 if large else 2, "right_warps": 8}
        first = first if half else {"TX": 64, "BA": 64, "RSTAGES": 2, "right_warps": 4}
        side, depth, stages = (128, 32, 5 if large else 3) if half else (64, 32, 2)
        tile = {"TT": 64, "TX": side, "SIDE": side, "BK": depth, "STAGES": stages, "num_warps": 8}
        programs = 132 if max(z.S * z.R, z.Q * z.P) <= 1 << 16 else 264
        return [{"path": "wide", "programs": programs, "hidden": first} | tile, smallest]
    first = {"TX": 128 if z.P <= 32 else 64, "BA": 64, "RSTAGES": 2, "right_warps": 4}
    stages = {"STAGES": 3 if half else 1, "num_warps": 8 if z.widest > 64 else 4}
    many = 512 if z.widest <= 64 or min(z.Q, z.P) <= 32 else 256
    masked = pad(z.Q) * pad(z.P) >= 4096 and z.P % 8 > 0  # masks take registers
    right = stages | {"TX": 64, "programs": many, "num_warps": 8 if z.Q * z.P > 4096 or masked else 4}
    c = {"path": "general", "TT": 64, "hidden": first, "right": right} | stages
    if z.S * z.R <= 1024:
        return [c | {"programs": 512, "STAGES": 4 if half else 1}, smallest]
    return [c | {"programs": 128 if min(z.S, z.R) > 64 else 256, "num_warps": 4 if z.S * z.R <= 4096 else 8}, smallest]
