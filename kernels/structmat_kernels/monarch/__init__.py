"""Monarch products: two block-diagonal factors around a stride permutation."""

from structmat_kernels.monarch.op import monarch, monarch_transposed

__all__ = ["monarch", "monarch_transposed"]
