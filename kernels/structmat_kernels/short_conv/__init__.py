"""Causal convolutions of every channel with a few taps."""

from structmat_kernels.short_conv.op import short_conv

__all__ = ["short_conv"]
