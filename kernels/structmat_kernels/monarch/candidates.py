"""Configurations worth measuring; those that do not fit a device fail at their first launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from structmat_kernels.tuning import Config


def forward(sizes: tuple[int, ...]) -> Iterator[Config]:
    """Of the forward product with ``sizes`` (l, s, r, k, q, p)."""
    L, S, R, _, Q, _ = sizes
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
    for JB, BU in itertools.product((4, 8), (16, 32)):
        tile = {"TX": 16, "TT": 16, "JB": JB, "BU": BU, "BR": 64, "STAGES": 2, "num_warps": 4}
        yield common | tile


def backward(sizes: tuple[int, ...]) -> Iterator[Config]:
    """Of the gradients."""
    L, _, _, _, Q, _ = sizes
    widest = max(sizes[1:3] + sizes[4:])
    hidden = {"TX": 64, "BA": min(128, max(64, Q)), "RSTAGES": 2, "right_warps": 4}
    right = {"TX": 64, "STAGES": 3, "num_warps": 4, "programs": 256}
    if L % Q == 0 and widest <= 32:
        base = {"path": "resident", "TT": 16, "STAGES": 2, "HOLD": True, "SPREAD": True, "CTAS": 1}
        for share, warps in itertools.product((0.33, 0.37, 0.4, 0.45, 0.5), (8, 16)):
            yield base | {"SHARE": share, "num_warps": warps}
        yield base | {"SHARE": 0.4, "num_warps": 16, "SPREAD": False}
        yield base | {"SHARE": 0.4, "num_warps": 16, "SPREAD": False, "HOLD": False}
    if widest <= 64:
        base = {
            "path": "strided",
            "TT": 16,
            "JB": 8,
            "STAGES": 2,
            "HOLD": True,
            "SPREAD": True,
            "num_warps": 8,
            "CTAS": 1,
        }
        base |= {"hidden": hidden, "right": right}
        for BR, stages in ((64, 2), (64, 3), (32, 2), (32, 3)):
            yield base | {"BR": BR, "STAGES": stages}
        yield base | {"BR": 64, "HOLD": False, "SPREAD": False}
        yield base | {"BR": 64, "SPREAD": False}
        yield base | {"BR": 32, "TT": 32}
        yield base | {"BR": 32, "JB": 16, "num_warps": 16}
        yield base | {"BR": 64, "right": right | {"TX": 128, "num_warps": 8}}
        yield base | {"BR": 64, "right": right | {"programs": 512}}
    for stages, warps, programs in itertools.product((2, 3), (4, 8), (128, 256)):
        more = {"right": right | {"num_warps": warps, "programs": programs}, "hidden": hidden}
        yield {"path": "general", "TT": 64, "STAGES": stages, "num_warps": warps, "programs": programs} | more
