"""Gated units: gelu of one half of the entries times the other half."""

from structmat_kernels.gated_gelu.op import gated_gelu

__all__ = ["gated_gelu"]
