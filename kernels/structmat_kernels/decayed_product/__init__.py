"""Products whose entries decay: the last step of implicit filters."""

from structmat_kernels.decayed_product.op import decayed_product

__all__ = ["decayed_product"]
