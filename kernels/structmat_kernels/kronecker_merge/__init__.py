"""The product of neighbouring Kronecker-sparse factors as one factor."""

from structmat_kernels.kronecker_merge.op import kronecker_merge

__all__ = ["kronecker_merge"]
