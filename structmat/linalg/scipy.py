"""Structured matrices as SciPy operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

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

    def tensor(x: np.ndarray) -> Tensor:
        # SciPy probes with its own dtypes; the operator computes in A's, as a NumPy matrix of that dtype would store.
        return torch.from_numpy(np.ascontiguousarray(x, dtype=dtype))

    build: Any = LinearOperator  # SciPy stubs describe the subclass to derive, not this factory
    return build(
        dtype=dtype,
        shape=tuple(A.shape),
        matvec=lambda v: value.matvec(tensor(v).reshape(-1)).resolve_conj().numpy(),
        rmatvec=lambda v: value.rmatvec(tensor(v).reshape(-1)).resolve_conj().numpy(),
        matmat=lambda X: value.matmul(tensor(X)).resolve_conj().numpy(),
        rmatmat=lambda X: value.rmatmul(tensor(X)).resolve_conj().numpy(),
    )
