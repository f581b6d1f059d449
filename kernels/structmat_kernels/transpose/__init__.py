"""Transposing copies."""

from structmat_kernels.transpose.op import supported, transpose

__all__ = ["supported", "transpose"]
