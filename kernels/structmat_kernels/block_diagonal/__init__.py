"""Block-diagonal products."""

from structmat_kernels.block_diagonal.reference import block_diagonal

__all__ = ["block_diagonal"]
