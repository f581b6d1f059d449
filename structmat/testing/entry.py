"""What is tested: a factory with what it promises; and how: relative Frobenius error against double precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.projection.truncated import work_dtype

#: Largest relative Frobenius error against a double-precision dense reference, by dtype.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 5e-6,
    torch.complex64: 5e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 5e-3,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A matrix to be tested, made anew for every dtype, device and seed.

    Args:
        name: how the entry is called in reports.
        make: ``make(dtype, device)`` returns the matrix; it may draw from torch's global generator, which the entry
            seeds. Small sizes (up to about 15) keep the gradient checks fast.
        dense: the dense reference of a matrix of the entry in double precision, written independently of the class;
            without one, ``to_dense`` is taken at its word.
        invertible: whether ``solve``, ``inverse`` and ``logdet`` must work.
        dtypes: the dtypes that the class supports.

    Example:
        >>> import torch, structmat
        >>> from structmat.testing import Entry, check_all
        >>> entry = Entry("mine", lambda dtype, device: structmat.LowRank.random((5, 7), 2, dtype=dtype, device=device))
        >>> check_all(entry, only=["products", "adjoint"])
        ['products', 'adjoint']
    """

    name: str
    make: Callable[[torch.dtype, Any], StructuredMatrix]
    dense: Callable[[StructuredMatrix], Tensor] | None = None
    invertible: bool = False
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)

    def __call__(self, dtype: torch.dtype | None = None, device: Any = "cpu", seed: int = 0) -> StructuredMatrix:
        """The matrix of this dtype (the entry's first one if None), device and seed."""
        dtype = self.dtypes[0] if dtype is None else dtype
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make(dtype, device)

    def reference(self, A: StructuredMatrix) -> Tensor:
        """The dense matrix of A in double precision."""
        double = A.detach().to(work_dtype(torch.empty(0, dtype=A.dtype, device=A.device)))
        return self.dense(double) if self.dense is not None else double.to_dense()

    def __repr__(self) -> str:
        return self.name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected|_F / |expected|_F`` in double precision (the absolute norm where expected is zero).

    Raises:
        AssertionError: if shapes differ: nothing is broadcast.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    double = work_dtype(actual if actual.is_complex() else expected)
    difference = torch.linalg.vector_norm(actual.detach().to(double) - expected.detach().to(double)).item()
    size = torch.linalg.vector_norm(expected.detach().to(double)).item()
    return difference / size if size else difference


def assert_close(actual: Tensor, expected: Tensor, tol: float | None = None, what: str = "result") -> None:
    """Assert that the relative error is within the tolerance of the dtype of ``actual``.

    Args:
        actual: what was computed.
        expected: the reference, in any precision.
        tol: the tolerance; by default that of ``TOLERANCES``.
        what: named in the message.
    """
    tol = TOLERANCES[actual.dtype] if tol is None else tol
    error = relative_error(actual, expected)
    assert error <= tol, f"{what}: relative error {error:.2e} exceeds {tol:.2e}"  # also catches NaN


def draw(shape: tuple[int, ...], like: StructuredMatrix, seed: int = 1) -> Tensor:
    """Standard normal numbers of the dtype and on the device of a matrix, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=like.dtype, generator=generator).to(like.device)
