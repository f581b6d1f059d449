"""Low-rank matrices by some of their own rows: fewer numbers than in a product of two factors."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.matrices._blocks import uniform_
from structmat.matrices.low_rank import LowRank
from structmat.matrices.permutation import _gather
from structmat.projection.truncated import GRAM_SHARE_SINGLE, truncated_svd, work_dtype


class _Traced(torch.autograd.Function):
    """Entries of the last dimension in another order; the backward pass gathers too.

    That of ``index_select`` adds up entry by entry, by atomic operations on a GPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, perm: Tensor) -> Tensor:
        return x.index_select(-1, perm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reorder(grads[0], _inverse(ctx.saved_tensors[0])), None


class _Reorder(_Traced):
    """With forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _reorder(tangents[0], ctx.saved_tensors[0])


def _reorder(x: Tensor, perm: Tensor) -> Tensor:
    """``y[..., i] = x[..., perm[i]]`` for x of shape (*batch, tokens, n) and perm of shape (*batch, n)."""
    if perm.ndim > 1:
        return _gather(x, perm.unsqueeze(-2), -1)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.index_select(-1, perm)  # a function of its own costs as much time as a small kernel
    found: Any = (_Traced if torch.compiler.is_compiling() else _Reorder).apply(x, perm)
    return found


def _inverse(perm: Tensor) -> Tensor:
    places = torch.arange(perm.shape[-1], device=perm.device)
    return torch.empty_like(perm).scatter(-1, perm, places.expand_as(perm))


@matrix
class PivotedLowRank(StructuredMatrix):
    """A matrix of rank at most r: r of its rows, its pivots, and the other rows as combinations of them.

    The same matrices as :class:`LowRank`, of which one factor is a block of the identity here: r (m + n - r)
    parameters and m integers in place of r (m + n), and 2 r (m + n - r) operations a product. At rank min(m, n) that is
    m n, the dense size, so every rank below saves; at half of the parameters of a square matrix the rank is 0.29 n in
    place of 0.25 n, at 70 % it is 0.45 n in place of 0.35 n.

    Args:
        pivots: shape (*batch, r, n): the rows that are stored.
        rest: shape (*batch, m - r, r): the coefficients of the others; same dtype, device and batch.
        perm: int64 of shape (*batch, m): row i of the matrix is row ``perm[i]`` of the pivots followed by the others.
            That it is a permutation is not checked.

    Raises:
        TypeError: if one is not a tensor, or dtypes do not fit.
        ValueError: if shapes or devices do not fit.

    Source: Zhao et al. 2025, "Pivoting factorization" (PIFA, arXiv:2501.19090); interpolative decompositions, Cheng et
    al. 2005.

    Example:
        >>> import torch, structmat
        >>> A = structmat.LowRank.random((6, 4), rank=3, generator=torch.Generator().manual_seed(0))
        >>> B = structmat.PivotedLowRank.from_low_rank(A)
        >>> A.num_params, B.num_params, torch.allclose(A.to_dense(), B.to_dense(), atol=1e-6)
        (30, 21, True)
    """

    pivots: Tensor
    rest: Tensor
    perm: Tensor

    def __post_init__(self) -> None:
        for name, ndim in (("pivots", 2), ("rest", 2), ("perm", 1)):
            check_tensor(name, getattr(self, name), ndim)
        check_inexact("pivots", self.pivots)
        check_same("rest", self.rest, "pivots", self.pivots)
        if self.perm.dtype != torch.int64:
            raise TypeError(f"perm must have dtype torch.int64, got {self.perm.dtype}")
        if self.perm.device != self.pivots.device:
            raise ValueError(f"perm is on {self.perm.device} but pivots is on {self.pivots.device}")
        *batch, r, _ = self.pivots.shape
        if self.rest.shape != (*batch, self.rest.shape[-2], r):
            raise ValueError(
                f"pivots (*batch, r, n) and rest (*batch, m - r, r) must share r and batch, got "
                f"{tuple(self.pivots.shape)} and {tuple(self.rest.shape)}"
            )
        if self.perm.shape != (*batch, r + self.rest.shape[-2]):
            raise ValueError(f"perm must have shape {(*batch, r + self.rest.shape[-2])}, got {tuple(self.perm.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.perm.shape, self.pivots.shape[-1]))

    @property
    def rank(self) -> int:
        """The number of pivots r."""
        return self.pivots.shape[-2]

    def _linear(self, x: Tensor) -> Tensor:
        inner = x @ self.pivots.mT
        return _reorder(torch.cat([inner, inner @ self.rest.mT], -1), self.perm)

    def _linear_mT(self, x: Tensor) -> Tensor:
        first, others = _reorder(x, _inverse(self.perm)).split([self.rank, self.rest.shape[-2]], -1)
        return (first + others @ self.rest) @ self.pivots

    @property
    def flops(self) -> int:
        m, n = self.shape[-2:]
        return 2 * math.prod(self.batch_shape) * self.rank * (m + n - self.rank)

    def _scale(self, scalar: Tensor) -> Self:
        return self._rebuild((scalar * self.pivots, self.rest, self.perm), ())

    def to_dense(self) -> Tensor:
        rows = torch.cat([self.pivots, self.rest @ self.pivots], -2)
        return rows.index_select(-2, self.perm) if self.perm.ndim == 1 else _gather(rows, self.perm.unsqueeze(-1), -2)

    def low_rank(self) -> LowRank:
        """The same matrix as a product of two factors, the left one with r rows of the identity."""
        identity = torch.eye(self.rank, dtype=self.dtype, device=self.device).expand(*self.batch_shape, -1, -1)
        left = torch.cat([identity, self.rest], -2)
        return LowRank(_gather(left, self.perm.unsqueeze(-1), -2), self.pivots)

    @classmethod
    @torch.no_grad()
    def from_low_rank(cls, A: LowRank) -> Self:
        """The same matrix by its pivots, up to rounding; it does not carry A's gradient.

        Pivots are the rows that Gaussian elimination with partial pivoting takes from an orthonormal basis of the
        columns, in double precision: on the layers of a language model no coefficient in ``rest`` was above 3.

        Args:
            A: of a rank up to min(m, n).

        Raises:
            ValueError: if A's inner size is above its sizes, or it has NaN or infinite entries.
        """
        batch, (m, n), rank = A.shape[:-2], A.shape[-2:], A.rank
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"A must have an inner size from 1 to min(m, n) = {min(m, n)}, got {rank}")
        double = work_dtype(A.left)
        left, right = A.left.expand(*batch, m, rank).to(double), A.right.expand(*batch, rank, n).to(double)
        if not (left.isfinite().all() and right.isfinite().all()):  # elimination would find no pivots
            raise ValueError("A has NaN or infinite entries")
        basis, scale = torch.linalg.qr(left)
        P, lower, _ = torch.linalg.lu(basis)
        order = P.real.argmax(-2)  # row i of the eliminated matrix is row order[i] of the basis
        first, others = lower.split([rank, m - rank], -2)
        rest = torch.linalg.solve_triangular(first, others, upper=False, left=False, unitriangular=True)
        pivots = _gather(basis, order[..., :rank].unsqueeze(-1), -2) @ (scale @ right)
        return cls(pivots.to(A.dtype), rest.to(A.dtype), _inverse(order))

    @classmethod
    def from_dense(cls, W: Tensor, rank: int) -> Self:
        """The best approximation of W of rank at most ``rank`` in Frobenius norm (Eckart-Young).

        The result does not carry W's gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex; decomposed in double precision.
            rank: from 1 to min(m, n).

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the rank is out of range, or W has NaN or infinite entries.
        """
        return cls._project(W, rank)[0]

    @classmethod
    def _project(cls, W: Tensor, rank: int) -> tuple[Self, Tensor]:
        """The projection, and the norm of what it misses."""
        check_tensor("W", W, 2)
        check_inexact("W", W)
        check_int("rank", rank)
        if rank > min(W.shape[-2:]):
            raise ValueError(f"rank must be at most min(m, n) = {min(W.shape[-2:])} for W of shape {tuple(W.shape)}")
        # In double precision throughout, but no more exactly than W's own precision asks for.
        share = GRAM_SHARE_SINGLE if W.dtype != work_dtype(W) else None
        left, right, lost = truncated_svd(W.to(work_dtype(W)), rank, gram_share=share)
        value = cls.from_low_rank(LowRank(left, right))
        return value.to(W.dtype), lost

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
        """A random matrix of the given rank, its pivots anywhere, whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            rank: from 1 to min(m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        check_int("rank", rank)
        if rank > min(m, n):
            raise ValueError(f"rank must be at most min(m, n) = {min(m, n)}, got {rank}")
        pivots = torch.empty((*batch, rank, n), dtype=dtype, device=device)
        rest = torch.empty((*batch, m - rank, rank), dtype=dtype, device=device)
        perm = torch.empty((*batch, m), dtype=torch.int64, device=device)
        return cls(pivots, rest, perm).randomize_(generator=generator)

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        if self.pivots.device.type == "meta":
            return self
        uniform_(self.pivots, std / math.sqrt(self.shape[-1]), generator)
        uniform_(self.rest, 1 / math.sqrt(self.rank), generator)
        keys = torch.empty(self.perm.shape, dtype=torch.float64, device=self.device).uniform_(generator=generator)
        self.perm.copy_(keys.argsort(-1))
        return self
