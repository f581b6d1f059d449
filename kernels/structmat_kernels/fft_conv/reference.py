"""Long convolutions in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def fft_conv(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """``y[t] = post_gate[t] (sum_{s <= t} k[t - s] x[s] + sum_{s > t} k_rev[s - t - 1] x[s] + skip x[t])``.

    x = pre_gate u. By real FFTs of a power of two without overlap; half precision is computed in float32.

    Args:
        u: shape (batch, channels, length), real.
        k: shape (channels, taps).
        k_rev: shape (channels, taps2).
        skip: shape (channels,).
        pre_gate: shape of u.
        post_gate: shape of u.

    Returns:
        The shape and dtype of u.
    """
    if u.numel() == 0:
        return u.clone()
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    length = u.shape[-1]
    x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
    k = k[..., :length].to(wide)
    size = 1 << max(2 * length - 1, 1).bit_length()
    spectrum = torch.fft.rfft(k, size)
    if k_rev is not None:
        behind = torch.fft.rfft(k_rev[..., :length].to(wide).flip(-1), size)
        # flip(k_rev) ends right before time 0: at places size - taps2, ..., size - 1.
        taps = min(k_rev.shape[-1], length)
        turns = torch.arange(size // 2 + 1, device=u.device) * taps % size
        angle = turns.to(wide) * (2 * torch.pi / size)
        spectrum = spectrum + behind * torch.polar(torch.ones_like(angle), angle)
    y = torch.fft.irfft(torch.fft.rfft(x, size) * spectrum, size)[..., :length]
    if skip is not None:
        y = y + skip.to(wide).unsqueeze(-1) * x
    if post_gate is not None:
        y = y * post_gate.to(wide)
    return y.to(u.dtype)
