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


def choose(z: Factors, tokens: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of the forward product."""
    found = lookup("monarch", device, dtype, tuple(z), tokens)
    if found:
        return found
    L, S, R, K, Q, P = z
    item, room = dtype.itemsize, shared_memory(device)
    half, large = item == 2, room > 200_000
    if z.widest > WIDEST:
        if tokens <= 128:  # the factors are most of the traffic: many programs with deep pipelines
            TT, deep = max(16, min(64, power(tokens))), 5 if half and large else 3
            tile = {"TX": TT, "TT": TT, "BA": 64 if Q >= 512 else 32, "JB": 1 if TT == 16 else 2, "BU": 16, "BR": 64}
            deep = {"RSTAGES": deep, "STAGES": deep}
            return {"path": "stages", "right_warps": 4, "BATCHED": False, "num_warps": 4} | tile | deep
        if Q % L == 0 and not (half and L <= 8 and Q // L < 256):
            return {"path": "cublas"}
        stages = 3 if half and large else 2
        tile = {"TX": 128, "BA": 128, "right_warps": 8, "RSTAGES": stages, "TT": 64, "BU": 64, "BR": 64 if half else 32}
        return {"path": "stages", "JB": 4, "BATCHED": False, "STAGES": stages, "num_warps": 4} | tile
    if tokens * K * P <= 16384 or (K * P <= 2048 and tokens <= 16):
        return {"path": "small", "TT": 1, "BI": 64, "num_warps": 8}
    # Sixteen kilobytes of x a program.
    stages = {"path": "stages", "BA": 64 if Q <= 64 else 128, "TX": 256 if P <= 32 else 64, "right_warps": 4}
    stages |= {"BATCHED": True}
    if tokens <= 128:
        tile = {"TT": 16, "TX": 16, "BA": 32, "JB": 4 if tokens <= 16 else 8, "BU": 16, "BR": 64 if half else 32}
        return stages | tile | {"STAGES": 2, "num_warps": 4}
    BI, BP, BU = pad(R), pad(P), pad(S)
    for JB, warps in ((32, 16), (16, 8)):
        direct = Q % L == 0 or (Q % JB == 0 and L % JB == 0)
        needed = item * (JB * BI * (BP + BU) + 2 * BI * 16 * BP + JB * 16 * max(BI, BU))
        if direct and pad(L) >= JB and needed <= room:
            return {"path": "resident", "TT": 16, "JB": JB, "STAGES": 3, "num_warps": warps, "CTAS": 1}
    # Left blocks in shared memory, JB of them (all where fewer than 32: rows of outputs are then adjacent in memory),
    # whole or, where the outputs are most of the traffic, pieces of them.
    JB = 32 if 16 < L < 32 else 16
    for rows in (BU, BU // 2, BU // 4) if S > R or JB == 32 else (BU,):
        if L >= 16 and rows >= 16 and item * JB * (rows * BI + 2 * BI * 16 + 17 * rows) <= room:
            return stages | {"TT": 16, "JB": JB, "BU": rows, "BR": BI, "STAGES": 3, "num_warps": 8, "CTAS": 1}
    if L < 16:
        tile = {"TT": 64, "BU": 64, "BR": 64 if half else 32, "num_warps": 4, "BATCHED": False}
    elif half and large:
        tile = {"TT": 64, "BU": 32, "BR": 32, "num_warps": 8}
    else:
        tile = {"TT": 16, "BU": 32, "BR": 16, "num_warps": 8}
    return stages | {"JB": 16, "STAGES": 2} | tile


def choose_backward(z: Factors, tokens: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of the gradients.

    Paths: "strided" (the left kernel reads the gradient of the outputs as it lies: the faster way for blocks up to 32),
    "general" (a copy sorts it by left block first), "wide" (the same for blocks larger than a tile), "cublas".
    """
    found = lookup("monarch_backward", device, dtype, tuple(z), tokens)
    if found:
        return found
    half = dtype.itemsize == 2
    stages = {"STAGES": 3 if half else 1, "num_warps": 8 if z.widest > 64 else 4}
    if z.widest > WIDEST:
        if z.Q % z.L == 0 and z.Q // z.L >= 256:
            return {"path": "cublas"}
        first = {"TX": 128, "BA": 128, "RSTAGES": 3 if half else 2, "right_warps": 8}
        tile = (
            {"SIDE": 128, "TX": 128, "BK": 64, "STAGES": 3} if half else {"SIDE": 64, "TX": 64, "BK": 32, "STAGES": 2}
        )
        return {"path": "wide", "TT": 64, "num_warps": 8, "programs": 132, "hidden": first} | tile
    first = {"TX": 64, "BA": 64, "RSTAGES": 2, "right_warps": 4}
    c = {"hidden": first, "right": stages | {"TX": 64, "programs": 256}}
    if half and z.widest <= 32 and z.L >= 8:
        c |= {"path": "strided", "TT": 16, "JB": 8, "BR": 32, "HOLD": True, "SPREAD": True, "CTAS": 1}
        return c | stages | {"num_warps": 8}
    return c | {"path": "general", "TT": 64, "programs": 128 if z.widest > 64 else 256} | stages
