"""Walsh-Hadamard transforms."""

from structmat_kernels.hadamard.op import hadamard

__all__ = ["hadamard"]
