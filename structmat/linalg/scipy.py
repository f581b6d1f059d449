"""Structured matrices as SciPy operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from structmat.base import StructuredMatrix


def linear_operator(A: StructuredMatrix) -> LinearOperator:
    """A SciPy ``LinearOperator`` for A, on the CPU and without gradient.

    Args:
        A: a matrix without batch dimensions whose dtype NumPy has (not bfloat16).

    Raises:
        ValueError: if A has batch dimensions.
        TypeError: if NumPy lacks A's dtype.
    """
    if A.ndim != 2:
        raise ValueError(f"to_scipy needs a matrix without batch dimensions, got shape {tuple(A.shape)}")
    if A.dtype == torch.bfloat16:
        raise TypeError("NumPy has no bfloat16; convert the matrix with .to(torch.float32)")
    value = A.detach().to("cpu")
    dtype = torch.empty(0, dtype=A.dtype).numpy().dtype

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        # The dtype of the result is NumPy's: a float32 matrix times a float64 vector is computed in float64.
        wanted = torch.from_numpy(np.empty(0, np.result_type(dtype, x.dtype))).dtype
        operand = torch.from_numpy(np.ascontiguousarray(x)).to(wanted)
        return getattr(value.to(wanted), name)(operand).resolve_conj().numpy()

    build: Any = LinearOperator  # SciPy's stubs describe the subclass to derive, not this factory
    return build(
        dtype=dtype,
        shape=tuple(A.shape),
        matvec=lambda v: apply("matvec", v.reshape(-1)),
        rmatvec=lambda v: apply("rmatvec", v.reshape(-1)),
        matmat=lambda X: apply("matmul", X),
        rmatmat=lambda X: apply("rmatmul", X),
    )
