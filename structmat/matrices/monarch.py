"""Monarch matrices: two block-diagonal factors around a stride permutation."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.lazy import Transposed
from structmat.matrices._blocks import solve_columns, uniform_
from structmat.matrices.block_diagonal import block_std, crop_size, live_columns
from structmat.projection.blockwise import project_monarch
from structmat_kernels.monarch import monarch, monarch_transposed


@matrix
class Monarch(StructuredMatrix):
    """A Monarch matrix (Dao et al. 2022): two block-diagonal factors around a stride permutation.

    With k q = l r,

    ``h[i q + a] = sum_b right[i, a, b] x[i p + b]`` and ``y[u l + j] = sum_t left[j, u, t] h[t l + j]``.

    l s r + k q p parameters, twice as many operations a product; the transpose costs the same. ``nrows`` and
    ``ncols`` crop rows and columns at the end, for sizes that the blocks do not divide. The layout is that of fly's
    ``blockdiag_butterfly_multiply`` with w1 = right and w2 = left. Slices of uniform rank rho (rows j, l + j, ... and
    columns i p, ..., i p + p - 1) have q = l rho and r = k rho; the whole matrix then has rank at most k l rho.

    Args:
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p), same batch, dtype and device.
        nrows: rows to keep, l s by default.
        ncols: columns to keep, k p by default.

    Raises:
        TypeError: if a factor is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if k q differs from l r, batches or devices differ, or a crop is out of range.

    Example:
        >>> import torch, structmat
        >>> M = structmat.Monarch.random((6, 10), nblocks=2)
        >>> M.left.shape, M.right.shape, M.num_params
        (torch.Size([2, 3, 3]), torch.Size([2, 3, 5]), 48)
        >>> M.linear(torch.ones(7, 10)).shape
        torch.Size([7, 6])
    """

    left: Tensor
    right: Tensor
    nrows: int = static(default=None)
    ncols: int = static(default=None)

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            check_tensor(name, getattr(self, name), 3)
            check_inexact(name, getattr(self, name))
        check_same("right", self.right, "left", self.left)
        (l, s, r), (k, q, p) = self.left.shape[-3:], self.right.shape[-3:]
        if k * q != l * r:
            raise ValueError(
                f"left (*batch, l, s, r) and right (*batch, k, q, p) must satisfy k q = l r, "
                f"got {tuple(self.left.shape)} and {tuple(self.right.shape)}: {k} * {q} != {l} * {r}"
            )
        if self.left.shape[:-3] != self.right.shape[:-3]:
            raise ValueError(
                f"left and right must have the same batch dimensions, got {tuple(self.left.shape[:-3])} "
                f"and {tuple(self.right.shape[:-3])}"
            )
        object.__setattr__(self, "nrows", crop_size("nrows", self.nrows, l * s))
        object.__setattr__(self, "ncols", crop_size("ncols", self.ncols, k * p))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.left.shape[:-3], self.nrows, self.ncols))

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """``(l, s, r, k, q, p)``."""
        (l, s, r), (k, q, p) = self.left.shape[-3:], self.right.shape[-3:]
        return l, s, r, k, q, p

    def _linear(self, x: Tensor) -> Tensor:
        return monarch(x, self.left, self.right, self.nrows)

    def _linear_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        return monarch(x, self.left, self.right, self.nrows, bias)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return monarch_transposed(x, self.left, self.right, self.ncols)

    @property
    def flops(self) -> int:
        return 2 * (self.left.numel() + self.right.numel())

    # ---------------------------------------------------------------- solving
    def _check_invertible(self, what: str) -> None:
        self._check_factorisable(what)
        l, s, r, k, q, p = self.sizes
        if s != r or q != p:
            raise ValueError(f"{what} needs square blocks, got left blocks {s} x {r} and right blocks {q} x {p}")
        if self.nrows != l * s or self.ncols != k * p:
            raise ValueError(
                f"{what} needs an uncropped matrix: the blocks make {l * s} x {k * p}, of which "
                f"{self.nrows} x {self.ncols} is kept, and the inverse of a part is not a Monarch matrix"
            )

    @property
    def _solve_flops(self) -> int:
        batch, (l, s, _, k, _, p) = math.prod(self.batch_shape), self.sizes
        return batch * sum(blocks * (2 * size**3 // 3 + 2 * size * size) for blocks, size in ((l, s), (k, p)))

    # Tokens stay the first dimension, as in the products: torch 2.11 does not export the other order with a dynamic
    # number of them.
    def _solve(self, b: Tensor) -> Tensor:
        self._check_invertible("solve")
        l, s, _, k, q, _ = self.sizes
        y = b.mT.unflatten(-1, (s, l)).movedim(-1, -3)  # (*batch, l, tokens, s)
        h = solve_columns(self.left, y.mT).mT.movedim(-3, -1).flatten(-2)
        h = h.unflatten(-1, (k, q)).movedim(-2, -3)  # (*batch, k, tokens, q)
        return solve_columns(self.right, h.mT).mT.movedim(-3, -2).flatten(-2).mT

    def _solve_mT(self, b: Tensor) -> Tensor:
        self._check_invertible("solve")
        l, _, r, k, q, _ = self.sizes
        x = b.mT.unflatten(-1, (k, q)).movedim(-2, -3)  # (*batch, k, tokens, q)
        h = solve_columns(self.right.mT, x.mT).mT.movedim(-3, -2).flatten(-2)
        h = h.unflatten(-1, (r, l)).movedim(-1, -3)  # (*batch, l, tokens, r)
        return solve_columns(self.left.mT, h.mT).mT.movedim(-3, -1).flatten(-2).mT

    def inverse(self) -> StructuredMatrix:
        """The inverse, the transpose of a Monarch matrix whose blocks are the inverse transposes of these.

        Raises:
            ValueError: if the matrix is cropped or its blocks are not square.
        """
        self._check_invertible("inverse")
        return Transposed(Monarch(torch.linalg.inv(self.left).mT, torch.linalg.inv(self.right).mT))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        # Of square blocks, the two stride permutations have the same parity: their signs cancel.
        self._check_invertible("slogdet")
        left_sign, left_log = torch.linalg.slogdet(self.left)
        right_sign, right_log = torch.linalg.slogdet(self.right)
        return left_sign.prod(-1) * right_sign.prod(-1), left_log.sum(-1) + right_log.sum(-1)

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> Monarch:
        return Monarch(scalar * self.left, self.right, self.nrows, self.ncols)

    def diagonal(self) -> Tensor:
        # Row d meets column d in the hidden units that both blocks touch: every l-th one of right block d // p.
        l, _, _, _, q, p = self.sizes
        d = torch.arange(min(self.nrows, self.ncols), device=self.device)[:, None]
        i, b, j, u = d // p, d % p, d % l, d // l
        a = (j - i * q) % l + l * torch.arange(-(-q // l), device=self.device)
        inside, a = a < q, a.clamp_max(q - 1)
        terms = self.right[..., i, a, b] * self.left[..., j, u, (i * q + a) // l]
        return torch.where(inside, terms, 0).sum(-1)

    # ---------------------------------------------------------------- construction
    @classmethod
    def structure(
        cls, m: int, n: int, nblocks: int | tuple[int, int] | list[int] = 4, rank: int | None = None
    ) -> dict[str, int]:
        """Factor sizes l, s, r, k, q, p of an m x n Monarch matrix.

        s = ceil(m / l) and p = ceil(n / k). With a rank every slice has this rank: q = l rank, r = k rank. Without,
        the hidden width is the largest useful one, the largest multiple of lcm(k, l) up to min(k p, l s): for k = l
        that is q = r = min(ceil(n / k), ceil(m / l)), fly's rule.

        Args:
            m: rows.
            n: columns.
            nblocks: number of blocks, one number for both factors or (k, l): right blocks, left blocks.
            rank: rank of the slices, from 1 to min(s, p), or None.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if k > n, l > m, or the rank is out of range.
        """
        pair = tuple(nblocks) if isinstance(nblocks, (tuple, list)) else (nblocks, nblocks)
        if len(pair) != 2:
            raise ValueError(f"nblocks must be one number or (k, l), got {nblocks!r}")
        k, l = (check_int("nblocks", v) for v in pair)
        if k > n or l > m:
            raise ValueError(
                f"nblocks (k, l) = ({k}, {l}) must not exceed (columns, rows) = ({n}, {m}) of the {m} x {n} matrix"
            )
        s, p = -(-m // l), -(-n // k)
        if rank is None:
            common = math.lcm(k, l)
            hidden = max(min(k * p, l * s) // common, 1) * common
            return {"l": l, "s": s, "r": hidden // l, "k": k, "q": hidden // k, "p": p}
        check_int("rank", rank)
        if rank > min(s, p):
            raise ValueError(
                f"rank must be at most min(s, p) = {min(s, p)}, the size of a slice of {s} x {p}, got {rank}"
            )
        return {"l": l, "s": s, "r": k * rank, "k": k, "q": l * rank, "p": p}

    @classmethod
    def _project(
        cls, W: Tensor, nblocks: int | tuple[int, int] | list[int] = 4, rank: int | None = None
    ) -> tuple[Self, Tensor]:
        check_tensor("W", W, 2)
        check_inexact("W", W)
        m, n = W.shape[-2:]
        left, right, lost = project_monarch(W, **cls.structure(m, n, nblocks, rank))
        return cls(left, right, m, n), lost

    @classmethod
    def from_dense(cls, W: Tensor, nblocks: int | tuple[int, int] | list[int] = 4, rank: int | None = None) -> Self:
        """The nearest Monarch matrix in Frobenius norm: a truncated SVD of every slice (Dao et al. 2022).

        Exact optimum for every size; singular values are split evenly between the factors. float16 and bfloat16 are
        decomposed in double precision and rounded at the end. The result does not carry W's gradient. Cost: the SVD of
        k l blocks of ceil(m / l) x ceil(n / k).

        Args:
            W: shape (*batch, m, n), floating point or complex.
            nblocks: number of blocks, one number or (k, l): right blocks, left blocks.
            rank: rank of the slices; None gives the largest hidden width (see :meth:`structure`).

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if nblocks or rank is out of range, or W has NaN or infinite entries.
        """
        return cls._project(W, nblocks, rank)[0]

    @classmethod
    def random(
        cls,
        shape: Any,
        nblocks: int | tuple[int, int] | list[int] = 4,
        rank: int | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random Monarch matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            nblocks: as in :meth:`from_dense`.
            rank: as in :meth:`from_dense`.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        size = cls.structure(m, n, nblocks, rank)
        left = torch.empty((*batch, size["l"], size["s"], size["r"]), dtype=dtype, device=device)
        right = torch.empty((*batch, size["k"], size["q"], size["p"]), dtype=dtype, device=device)
        return cls(left, right, m, n).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        l, _, r, k, q, p = self.sizes
        columns = live_columns(k, p, self.ncols)
        uniform_(self.right, block_std(columns, 1.0, self.right), generator)
        # Hidden units of unit variance, but for those of right blocks that lie wholly in the crop: they are zero.
        live = [sum(columns[(t * l + j) // q] > 0 for t in range(r)) for j in range(l)]
        uniform_(self.left, block_std(live, std, self.left), generator)
        return self
