"""Parameter groups for optimisers."""

from __future__ import annotations

from typing import Any

from torch import nn

from structmat.nn.kaleidoscope_conv import _Transform
from structmat.nn.linear import StructuredLinear
from structmat.nn.parameters import MatrixParameters
from structmat.nn.permutation import LearnablePermutation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: no weight decay on the factors of structured weights, their biases, nor on vectors.

    Decay of factors is not decay of their product; butterflies are trained without (Dao et al. 2019).

    Args:
        model: its trainable parameters are sorted.
        weight_decay: of the other ones.

    Example:
        >>> import torch, structmat
        >>> model = torch.nn.Sequential(structmat.nn.ButterflyLinear(8, 8), torch.nn.Linear(8, 2))
        >>> groups = structmat.nn.parameter_groups(model, 0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.1), (5, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    kinds = (StructuredLinear, MatrixParameters, LearnablePermutation, _Transform)
    structured = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trainable if p.ndim > 1 and id(p) not in structured]
    kept = {id(p) for p in decays}
    others = [p for p in trainable if id(p) not in kept]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
