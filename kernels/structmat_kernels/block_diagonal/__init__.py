"""Block-diagonal products."""

from structmat_kernels.block_diagonal.op import block_diagonal

__all__ = ["block_diagonal"]
