"""The short causal depthwise convolution in plain PyTorch: the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[c, t] = bias[c] + sum_j weight[c, j] x[c, t - (taps - 1) + j]``, inputs before the beginning being 0.

    Args:
        x: shape (*batch, channels, length).
        weight: shape (channels, taps), taps of at least 1.
        bias: shape (channels,), or None.

    Returns:
        The shape of x. Half precision is accumulated in float32 and rounded once, on CUDA once more before the bias is
        added. Cost: 2 taps operations an entry.
    """
    if x.numel() == 0:  # F.conv1d takes no empty channels and lengths
        y = x * weight.sum(-1, keepdim=True)
        return y if bias is None else y + bias.unsqueeze(-1)
    rows = x.flatten(0, -3) if x.ndim > 3 else x
    rows = F.pad(rows, (weight.shape[-1] - 1, 0))
    y = F.conv1d(rows, weight.unsqueeze(-2), bias, groups=x.shape[-2])
    return y.reshape(x.shape)
