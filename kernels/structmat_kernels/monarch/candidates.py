"""Configurations worth measuring; those that do not fit a device fail at their first launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from structmat_kernels.tuning import Config


def forward(sizes: tuple[int, ...]) -> Iterator[Config]:
    """Of the forward product with ``sizes`` (l, s, r, k, q, p)."""
    L, S, R, _, Q, _ = sizes
    widest = max(sizes[1:3] + sizes[4:])
    for JB, TT, stages, warps in itertools.product((16, 32), (16, 32), (2, 3), (8, 16)):
        if Q % L == 0 or (Q % JB == 0 and L % JB == 0):
            yield {"path": "resident", "JB": JB, "TT": TT, "STAGES": stages, "num_warps": warps, "CTAS": 1}
    common = {"path": "stages", "BA": 64 if Q <= 64 else 128, "TX": 64, "right_warps": 4, "BATCHED": True}
    for TT, BU, stages in itertools.product((16, 32), (32, 64), (2, 3)):
        yield common | {"JB": 16, "TT": TT, "BU": min(BU, S), "BR": R, "STAGES": stages, "num_warps": 8, "CTAS": 1}
        yield common | {"JB": 16, "TT": TT, "BU": min(BU, S), "BR": 32, "STAGES": stages, "num_warps": 8}
    for TT, JB, warps in itertools.product((64, 128), (4, 8), (4, 8)):
        wide = {"BA": 128, "TX": 128, "right_warps": 8, "RSTAGES": 3, "BATCHED": False}
        yield common | wide | {"JB": JB, "TT": TT, "BU": 64, "BR": 64, "STAGES": 3, "num_warps": warps}
    if Q % L == 0:
        yield {"path": "cublas"}
    for TT, warps in itertools.product((1, 2, 4), (4, 8)):
        yield {"path": "small", "TT": TT, "BI": 64, "num_warps": warps}
    if widest > 64:
        for JB, TT, BU, BR in ((16, 64, 32, 32), (16, 32, 64, 64), (8, 64, 64, 64)):
            yield common | {"JB": JB, "TT": TT, "BU": BU, "BR": BR, "STAGES": 2, "num_warps": 8}
    for JB, BU in itertools.product((4, 8), (16, 32)):
        tile = {"TX": 16, "TT": 16, "JB": JB, "BU": BU, "BR": 64, "STAGES": 2, "num_warps": 4}
        yield common | tile


def backward(sizes: tuple[int, ...]) -> Iterator[Config]:
    """Of the gradients."""
    L, _, _, _, Q, _ = sizes
    widest = max(sizes[1:3] + sizes[4:])
    if widest <= 128:
        for TT, stages, warps in itertools.product((64, 128), (3, 4), (4, 8)):
            for left, right in ((128, 256), (256, 256), (256, 512), (512, 512)):
                more = {"hidden": {"TX": 128, "BA": 64, "RSTAGES": 2, "right_warps": 4}}
                more["right"] = {"TX": TT, "STAGES": 3, "num_warps": 4 if TT == 64 else 8, "programs": right}
                yield {"path": "general", "TT": TT, "STAGES": stages, "num_warps": warps, "programs": left} | more
        return
    if Q % L == 0:
        yield {"path": "cublas"}
    hidden = {"TX": 128, "BA": 128, "RSTAGES": 3, "right_warps": 8}
    for depth, stages in ((64, 3), (32, 5)):
        for programs, warps in itertools.product((132, 264), (4, 8)):
            tile = {"TT": 64, "TX": 128, "SIDE": 128, "BK": depth, "STAGES": stages}
            yield {"path": "wide", "num_warps": warps, "programs": programs, "hidden": hidden} | tile
