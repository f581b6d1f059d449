"""Products with one Kronecker-sparse factor: a butterfly level, or several merged."""

from structmat_kernels.kronecker_sparse.op import kronecker_sparse

__all__ = ["kronecker_sparse"]
