"""Matrices like Toeplitz and Hankel matrices: of low displacement rank under two shifts."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_int, check_matrix_shape, check_tensor
from structmat.base import matrix
from structmat.matrices.displacement import _pairs
from structmat.matrices.displacement._project import project
from structmat.matrices.displacement.ldr import LDR


def empty_generators(shape: Any, rank: int, dtype: torch.dtype | None, device: Any) -> tuple[Tensor, Tensor]:
    """G (*batch, m, rank) and H (*batch, n, rank), not filled."""
    batch, m, n = check_matrix_shape(shape)
    check_int("rank", rank)
    G = torch.empty((*batch, m, rank), dtype=dtype, device=device)
    return G, torch.empty((*batch, n, rank), dtype=dtype, device=device)


@matrix
class ToeplitzLike(LDR):
    """A matrix M with ``Z_e M - M Z_f = G H^T``; a Toeplitz matrix has rank at most 2. See :class:`LDR`.

    ``M = (e - f)^-1 sum_j Z_e(g_j) Z_f(J h_j)`` if it is square, Z_f(v) the f-circulant with first column v.

    Args:
        left: G, shape (*batch, m, r), floating point or complex.
        right: H, shape (*batch, n, r), same dtype and device; batches broadcast.
        e: corner of the left shift; by default 1, or where that meets -1, -1.
        f: corner of the right shift, -e by default.

    Raises:
        TypeError: if left or right is no floating-point or complex tensor, dtypes differ, or a corner is no number.
        ValueError: if sizes, batches or devices do not match, or the shifts have a common eigenvalue.

    Example:
        >>> import structmat
        >>> M = structmat.ToeplitzLike.random((6, 6), 2)
        >>> M.inverse().displacement_rank, (M + M.mT.mT).displacement_rank, M.num_params
        (2, 4, 24)
    """

    def __init__(
        self, left: Tensor, right: Tensor, e: float | complex | None = None, f: float | complex | None = None
    ) -> None:
        A, B = _pairs.shifts(left, right, e, f)
        self._set(A, B, left, right)

    @classmethod
    def from_dense(
        cls, W: Tensor, rank: int, e: float | complex | None = None, f: float | complex | None = None, sweeps: int = 30
    ) -> Self:
        """A matrix near W in Frobenius norm, by alternating least squares on the entries of the matrix itself.

        Truncating the displacement of W is where they start, which is exact for members, but for a W far from all of
        them it is worse than nothing: an error in the displacement is divided by differences of eigenvalues. No result
        is farther from W than zero is. Not the nearest matrix, which no known method finds. It does not carry W's
        gradient. O(m n log(m n) + sweeps m n r^2) operations, in double precision.

        Args:
            W: shape (*batch, m, n), floating point or complex.
            rank: the displacement rank, from 1 to min(m, n).
            e: corner of the left shift, of modulus 1; as the constructor's.
            f: corner of the right shift, of modulus 1; as the constructor's.
            sweeps: of least squares, at most; 0 truncates the displacement only.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the rank is out of range, a corner has another modulus, or W has NaN or infinite entries.
        """
        check_tensor("W", W, 2)
        A, B = _pairs.shifts(W, W.mT, e, f)
        return cls._make(A, B, *project(W, A, B, rank, sweeps))  # pyright: ignore[reportReturnType]

    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        e: float | complex | None = None,
        f: float | complex | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random member whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            rank: the displacement rank, at least 1.
            e: corner of the left shift, as the constructor's.
            f: corner of the right shift, as the constructor's.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        G, H = empty_generators(shape, rank, dtype, device)
        return cls(G, H, e, f).randomize_(generator=generator)


@matrix
class HankelLike(LDR):
    """A matrix M with ``Z_e M - M Z_f^T = G H^T``; a Hankel matrix has rank at most 2. See :class:`LDR`.

    Its columns in reverse order make a Toeplitz-like matrix. The arguments are those of :class:`ToeplitzLike`.

    Example:
        >>> import torch, structmat
        >>> M = structmat.HankelLike.random((6, 6), 2)
        >>> type(M @ M).__name__
        'ToeplitzLike'
    """

    def __init__(
        self, left: Tensor, right: Tensor, e: float | complex | None = None, f: float | complex | None = None
    ) -> None:
        A, B = _pairs.shifts(left, right, e, f)
        self._set(A, B.mT, left, right)

    @classmethod
    def from_dense(
        cls, W: Tensor, rank: int, e: float | complex | None = None, f: float | complex | None = None, sweeps: int = 30
    ) -> Self:
        """A matrix near W in Frobenius norm: :meth:`ToeplitzLike.from_dense` with the columns in reverse order."""
        check_tensor("W", W, 2)
        A, B = _pairs.shifts(W, W.mT, e, f)
        left, right = project(W.flip(-1), A, B, rank, sweeps)
        return cls._make(A, B.mT, left, right.flip(-2))  # pyright: ignore[reportReturnType]

    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        e: float | complex | None = None,
        f: float | complex | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random member whose outputs have ``nn.Linear``'s variance; the arguments of :meth:`ToeplitzLike.random`."""
        return cls(*empty_generators(shape, rank, dtype, device), e, f).randomize_(generator=generator)
