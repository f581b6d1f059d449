"""Block-diagonal matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import solve_columns, uniform_
from structmat.matrices.diagonal import Diagonal
from structmat.projection.blockwise import project_block_diagonal
from structmat_kernels.block_diagonal import block_diagonal


def crop_size(name: str, value: int | None, full: int) -> int:
    """Resolve a cropped size: the full one if None; raise unless it lies in 1..full."""
    if value is None:
        return full
    check_int(name, value)
    if value > full:
        raise ValueError(f"{name} must be at most {full} (blocks times block size), got {value}")
    return value


@matrix
class BlockDiagonal(StructuredMatrix):
    """k dense blocks on the diagonal: ``y[i q + a] = sum_b blocks[i, a, b] x[i p + b]``.

    k q p parameters, 2 k q p operations a product. Closed under transposes, sums and products of one partition, and
    inverses where blocks are square. ``nrows`` and ``ncols`` crop rows and columns at the end, for sizes that k does
    not divide.

    Args:
        blocks: shape (*batch, k, q, p), floating point or complex.
        nrows: rows to keep, k q by default.
        ncols: columns to keep, k p by default.

    Raises:
        TypeError: if blocks is not a floating-point or complex tensor.
        ValueError: if it has fewer than three dimensions, or a crop is out of range.

    Example:
        >>> import torch, structmat
        >>> A = structmat.BlockDiagonal(torch.ones(2, 1, 2))
        >>> A.to_dense()
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    blocks: Tensor
    nrows: int = static(default=None)
    ncols: int = static(default=None)

    def __post_init__(self) -> None:
        check_tensor("blocks", self.blocks, 3)
        check_inexact("blocks", self.blocks)
        k, q, p = self.blocks.shape[-3:]
        object.__setattr__(self, "nrows", crop_size("nrows", self.nrows, k * q))
        object.__setattr__(self, "ncols", crop_size("ncols", self.ncols, k * p))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.blocks.shape[:-3], self.nrows, self.ncols))

    def _linear(self, x: Tensor) -> Tensor:
        return block_diagonal(x, self.blocks).flatten(-2)[..., : self.nrows]

    @property
    def mT(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT, self.ncols, self.nrows)

    @property
    def flops(self) -> int:
        return 2 * self.blocks.numel()

    def _square_blocks(self, what: str) -> Tensor:
        """The blocks with the cropped rows and columns replaced by the identity's: same inverse and determinant."""
        self._check_factorisable(what)
        k, q, p = self.blocks.shape[-3:]
        if q != p:
            raise ValueError(f"{what} needs square blocks, got {k} blocks of {q} x {p}")
        if self.nrows == k * q:
            return self.blocks
        inside = (torch.arange(k * q, device=self.device) < self.nrows).view(k, q)
        eye = torch.eye(q, dtype=self.dtype, device=self.device)
        return torch.where(inside[:, :, None] & inside[:, None, :], self.blocks, eye)

    @property
    def _solve_flops(self) -> int:
        blocks, q = math.prod(self.blocks.shape[:-2]), self.blocks.shape[-1]
        return blocks * (2 * q**3 // 3 + 2 * q * q)

    def _solve(self, b: Tensor) -> Tensor:
        blocks = self._square_blocks("solve")
        k, q, _ = blocks.shape[-3:]
        pieces = F.pad(b, (0, 0, 0, k * q - self.nrows)).unflatten(-2, (k, q))
        return solve_columns(blocks, pieces).flatten(-3, -2)[..., : self.nrows, :]

    def inverse(self) -> BlockDiagonal:
        return BlockDiagonal(torch.linalg.inv(self._square_blocks("inverse")), self.nrows, self.ncols)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabs = torch.linalg.slogdet(self._square_blocks("slogdet"))
        return sign.prod(-1), logabs.sum(-1)

    def _scale(self, scalar: Tensor) -> BlockDiagonal:
        return BlockDiagonal(scalar * self.blocks, self.nrows, self.ncols)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal) and self.ncols == self.blocks.shape[-3] * self.blocks.shape[-1]:
            d = other.diag.unflatten(-1, (self.blocks.shape[-3], 1, self.blocks.shape[-1]))
            return BlockDiagonal(self.blocks * d, self.nrows, self.ncols)
        if isinstance(other, BlockDiagonal):
            (k, _, p), (k2, q2, _) = self.blocks.shape[-3:], other.blocks.shape[-3:]
            # A crop between the factors removes hidden units: then the product of blocks is another matrix.
            if (k, p) == (k2, q2) and self.ncols == k * p:
                return BlockDiagonal(self.blocks @ other.blocks, self.nrows, other.ncols)
        return None

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal) and self.nrows == self.blocks.shape[-3] * self.blocks.shape[-2]:
            d = other.diag.unflatten(-1, (self.blocks.shape[-3], self.blocks.shape[-2], 1))
            return BlockDiagonal(d * self.blocks, self.nrows, self.ncols)
        return None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, BlockDiagonal) and self.blocks.shape[-3:] == other.blocks.shape[-3:]:
            return BlockDiagonal(self.blocks + other.blocks, self.nrows, self.ncols)
        return None

    def to_dense(self) -> Tensor:
        grid = torch.diag_embed(self.blocks.movedim(-3, -1), dim1=-4, dim2=-2)  # (*batch, k, q, k, p)
        return grid.flatten(-4, -3).flatten(-2, -1)[..., : self.nrows, : self.ncols]

    def diagonal(self) -> Tensor:
        _, q, p = self.blocks.shape[-3:]
        d = torch.arange(min(self.nrows, self.ncols), device=self.device)
        column = d - d // q * p
        inside = (column >= 0) & (column < p)
        return torch.where(inside, self.blocks[..., d // q, d % q, column.clamp(0, p - 1)], 0)

    @classmethod
    def structure(cls, m: int, n: int, nblocks: int) -> dict[str, int]:
        """Block sizes k, q, p for an m x n matrix in ``nblocks`` blocks: q = ceil(m / k), p = ceil(n / k).

        Raises:
            TypeError: if nblocks is not an integer.
            ValueError: if nblocks is not between 1 and min(m, n).
        """
        check_int("nblocks", nblocks)
        if nblocks > min(m, n):
            raise ValueError(f"nblocks must be at most min(rows, columns) = {min(m, n)}, got {nblocks}")
        return {"k": nblocks, "q": -(-m // nblocks), "p": -(-n // nblocks)}

    @classmethod
    def _project(cls, W: Tensor, nblocks: int) -> tuple[Self, Tensor]:
        check_tensor("W", W, 2)
        check_inexact("W", W)
        m, n = W.shape[-2:]
        blocks, outside = project_block_diagonal(W, **cls.structure(m, n, nblocks))
        return cls(blocks, m, n), outside

    @classmethod
    def from_dense(cls, W: Tensor, nblocks: int = 4) -> Self:
        """The nearest block-diagonal matrix in Frobenius norm: W's own blocks. Carries no gradient.

        Args:
            W: shape (*batch, m, n); blocks are ceil(m / nblocks) x ceil(n / nblocks), the last ones cropped.
            nblocks: from 1 to min(m, n).

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if nblocks is out of range.
        """
        return cls._project(W, nblocks)[0]

    @classmethod
    def random(
        cls,
        shape: Any,
        nblocks: int = 4,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random block-diagonal matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            nblocks: from 1 to min(m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        sizes = cls.structure(m, n, nblocks)
        blocks = torch.empty((*batch, *sizes.values()), dtype=dtype, device=device)
        return cls(blocks, m, n).randomize_(generator=generator)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        _, _, p = self.blocks.shape[-3:]
        live = live_columns(self.blocks.shape[-3], p, self.ncols)
        uniform_(self.blocks, block_std(live, std, self.blocks), generator)
        return self


def live_columns(k: int, p: int, ncols: int) -> list[int]:
    """How many of the p columns of each of k blocks lie inside the first ncols."""
    return [min(max(ncols - p * i, 0), p) for i in range(k)]


def block_std(fan_in: list[int], std: float, like: Tensor) -> float | Tensor:
    """``std / sqrt(fan_in)`` of every block, as one number where all blocks are alike (sharded tensors take that)."""
    stds = [std / math.sqrt(max(f, 1)) for f in fan_in]
    if len(set(stds)) == 1:
        return stds[0]
    real = like.dtype.to_real() if like.is_complex() else like.dtype
    return torch.tensor(stds, dtype=real, device=like.device).view(-1, 1, 1)
