"""Matrices like Vandermonde and Cauchy matrices: of low displacement rank under diagonals."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_same, check_tensor
from structmat.base import matrix
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement import _pairs
from structmat.matrices.displacement._project import project
from structmat.matrices.displacement.ldr import LDR
from structmat.matrices.displacement.operators import Shift
from structmat.matrices.displacement.toeplitz_like import empty_generators


def check_nodes(name: str, nodes: Tensor, W: Tensor, size: int) -> None:
    """Raise unless there is a node for each of so many rows or columns of W."""
    check_tensor(name, nodes, 1)
    check_same(name, nodes, "W", W)
    if nodes.shape[-1] != size:
        raise ValueError(f"{name} must have {size} entries for W of shape {tuple(W.shape)}, got {nodes.shape[-1]}")


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
        (torch.Size([2, 3]), 3)
    """

    def __init__(self, nodes: Tensor, left: Tensor, right: Tensor, f: float | complex = 1.0) -> None:
        check_tensor("right", right, 2)
        shift = Shift(right.shape[-2], f, dtype=_pairs.dtype_for(right, f))
        self._set(Diagonal(nodes), shift, left, right)

    @classmethod
    def from_dense(cls, W: Tensor, rank: int, nodes: Tensor, f: float | complex = 1.0, sweeps: int = 30) -> Self:
        """A matrix near W in Frobenius norm with these nodes: as :meth:`ToeplitzLike.from_dense`.

        Args:
            W: shape (*batch, m, n), floating point or complex.
            rank: the displacement rank, from 1 to min(m, n).
            nodes: shape (m,) or (*batch, m), dtype and device of W.
            f: corner of the shift, of modulus 1.
            sweeps: of least squares, at most.
        """
        check_tensor("W", W, 2)
        check_nodes("nodes", nodes, W, W.shape[-2])
        A, B = Diagonal(nodes), Shift(W.shape[-1], f, dtype=_pairs.dtype_for(W, f))
        _pairs.check_disjoint(A, B)
        return cls._make(A, B, *project(W, A, B, rank, sweeps))  # pyright: ignore[reportReturnType]

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
    def from_dense(cls, W: Tensor, rank: int, s: Tensor, t: Tensor, sweeps: int = 30) -> Self:
        """A matrix near W in Frobenius norm with these s and t: as :meth:`ToeplitzLike.from_dense`.

        Args:
            W: shape (*batch, m, n), floating point or complex.
            rank: the displacement rank, from 1 to min(m, n).
            s: shape (m,) or (*batch, m), dtype and device of W.
            t: shape (n,) or (*batch, n), likewise.
            sweeps: of least squares, at most.
        """
        check_tensor("W", W, 2)
        check_nodes("s", s, W, W.shape[-2])
        check_nodes("t", t, W, W.shape[-1])
        A, B = Diagonal(s), Diagonal(t)
        _pairs.check_disjoint(A, B)
        return cls._make(A, B, *project(W, A, B, rank, sweeps))  # pyright: ignore[reportReturnType]

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
