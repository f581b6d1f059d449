"""Block-sparse products with fused low rank, as in Pixelated Butterfly."""

from structmat_kernels.block_sparse.layout import BlockLayout
from structmat_kernels.block_sparse.op import block_sparse, block_sparse_transposed
from structmat_kernels.block_sparse.reference import flat_butterfly_mask, to_dense

__all__ = ["BlockLayout", "block_sparse", "block_sparse_transposed", "flat_butterfly_mask", "to_dense"]
