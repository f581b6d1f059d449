"""The classes of matrices of low displacement rank by their operators."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_int, check_matrix_shape, check_tensor
from structmat.base import matrix
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement import _algebra
from structmat.matrices.displacement.ldr import LDR
from structmat.matrices.displacement.operators import Shift


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
        A, B = _algebra.shifts(left, right, e, f)
        self._set(A, B, left, right)

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
        A, B = _algebra.shifts(left, right, e, f)
        self._set(A, B.mT, left, right)

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


@matrix
class VandermondeLike(LDR):
    """A matrix M with ``diag(v) M - M Z_f = G H^T``; a Vandermonde matrix has rank 1. See :class:`LDR`.

    ``M = sum_j diag(g_j / (v^n - f)) V(v) Z_f(J h_j)`` with the Vandermonde matrix V of the nodes. Powers are computed
    so that none overflows, but with nodes far from the unit circle matrices of this kind are ill-conditioned.

    Args:
        nodes: v, shape (*batch, m) with ``v_i^n`` not f.
        left: G, shape (*batch, m, r), same dtype and device.
        right: H, shape (*batch, n, r), same dtype and device; batches broadcast.
        f: corner of the shift.

    Raises:
        TypeError: if a tensor is not floating point or complex, dtypes differ, or f is not a number.
        ValueError: if sizes, batches or devices do not match, or a node is an eigenvalue of the shift (seen on a CPU).

    Example:
        >>> import torch, structmat
        >>> M = structmat.VandermondeLike(torch.tensor([0.5, -0.5]), torch.ones(2, 1), torch.ones(3, 1))
        >>> M.shape, (M.mT @ M).displacement_rank
        (torch.Size([2, 3]), 2)
    """

    def __init__(self, nodes: Tensor, left: Tensor, right: Tensor, f: float | complex = 1.0) -> None:
        check_tensor("right", right, 2)
        shift = Shift(right.shape[-2], f, dtype=_algebra.dtype_for(right, f))
        self._set(Diagonal(nodes), shift, left, right)

    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        f: float | complex = 1.0,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random member whose outputs have ``nn.Linear``'s variance.

        Nodes of a complex dtype lie on the circle of radius 1 between the eigenvalues of the shift, as far from them as
        can be for m <= n; real ones are Chebyshev's, scaled to stay within 0.95.

        Args:
            shape: (*batch, m, n).
            rank: the displacement rank, at least 1.
            f: corner of the shift.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        G, H = empty_generators(shape, rank, dtype, device)
        (*batch, m, _), n = G.shape, H.shape[-2]
        i = torch.arange(m, dtype=torch.float64, device=device)
        if G.is_complex():
            angle = math.atan2(complex(f).imag, complex(f).real) + math.pi
            where = i if m == n else i * (n / m)
            nodes = torch.polar(torch.ones_like(i), (angle + 2 * math.pi * where.floor()) / n)
        else:
            nodes = 0.95 * torch.cos(math.pi * (i + 0.5) / m)
        return cls(nodes.to(G.dtype).expand(*batch, m).clone(), G, H, f).randomize_(generator=generator)


@matrix
class CauchyLike(LDR):
    """A matrix M with ``diag(s) M - M diag(t) = G H^T``: ``M[i, j] = (G H^T)[i, j] / (s_i - t_j)``. See :class:`LDR`.

    Args:
        s: shape (*batch, m).
        t: shape (*batch, n), with no number in common with s.
        left: G, shape (*batch, m, r).
        right: H, shape (*batch, n, r). All of the same dtype and device; batches broadcast.

    Raises:
        TypeError: if a tensor is not floating point or complex, or dtypes differ.
        ValueError: if sizes, batches or devices do not match, or s and t have a common number (seen on the CPU).

    Example:
        >>> import torch, structmat
        >>> s, t = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
        >>> structmat.CauchyLike(s, t, torch.ones(2, 1), torch.ones(2, 1)).to_dense()
        tensor([[1.0000, 0.5000],
                [0.5000, 0.3333]])
    """

    def __init__(self, s: Tensor, t: Tensor, left: Tensor, right: Tensor) -> None:
        self._set(Diagonal(s), Diagonal(t), left, right)

    def to_dense(self) -> Tensor:
        s, t = self.A.diag, self.B.diag  # pyright: ignore[reportAttributeAccessIssue]
        return (self.left @ self.right.mT) / (s.unsqueeze(-1) - t.unsqueeze(-2))

    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random member whose outputs have ``nn.Linear``'s variance.

        Its s and t alternate on a line from -1 to 1, of a complex dtype on the unit circle.

        Args:
            shape: (*batch, m, n).
            rank: the displacement rank, at least 1.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        G, H = empty_generators(shape, rank, dtype, device)
        (*batch, m, _), n = G.shape, H.shape[-2]
        # A line in n cells: t in the middle of each, s in its first half; if there are more s, several of them.
        i = torch.arange(m, dtype=torch.float64, device=device)
        cell, copies = (i * n / m).floor(), -(-m // n)
        q = (cell + (i % copies) / (2 * copies)) / n
        p = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
        if G.is_complex():
            s, t = (torch.polar(torch.ones_like(z), 2 * math.pi * z) for z in (q, p))
        else:
            s, t = 2 * q - 1, 2 * p - 1
        s, t = (z.to(G.dtype).expand(*batch, len(z)).clone() for z in (s, t))
        return cls(s, t, G, H).randomize_(generator=generator)
