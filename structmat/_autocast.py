"""What an autocast region does to operands and biases, as ``F.linear`` does it."""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: torch.compile of torch 2.11 does not trace is_autocast_available.
_AUTOCAST_KINDS = frozenset(
    kind
    for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region around the caller on ``device``, or None outside one."""
    kind = device.type
    if kind not in _AUTOCAST_KINDS or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def match_bias(bias: Tensor, like: Tensor) -> Tensor:
    """The bias in the dtype of ``like``, cast inside an autocast region only, as ``F.linear`` does."""
    if bias.dtype != like.dtype and autocast_dtype(like.device) is None:
        raise TypeError(f"bias has dtype {bias.dtype} but the product has {like.dtype}")
    return bias.to(like.dtype)
