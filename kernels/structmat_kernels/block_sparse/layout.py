"""Where the blocks of a block-sparse matrix are: index tables made once from a boolean mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: The model behind `_coarsest`, of an H100: tokens of a program, bytes a second from L2, reachable flops a second.
_TILE, _L2, _FLOPS = 256, 5.5e12, 600e12
#: The kernels' largest block.
MAX_BLOCK = 128


class Tables(NamedTuple):
    """The pattern of a grid (mb, nb) with nnz blocks, int32. Blocks are numbered in CSR order: by row, then column."""

    row_offsets: Tensor  # (mb + 1,): the blocks of block row i are row_offsets[i] : row_offsets[i + 1]
    columns: Tensor  # (nnz,): block column of each block, in CSR order
    rows: Tensor  # (nnz,): block row of each block, in CSR order
    column_offsets: Tensor  # (nb + 1,): the same by columns (CSC)
    csc_rows: Tensor  # (nnz,): block row of each block, in CSC order
    csc_positions: Tensor  # (nnz,): number of each block, in CSC order
    members: Tensor  # (nnz, qo, qi): numbers of the blocks that a super-block holds, -1 where it has none; else empty


def split_table(table: Tensor, grid: tuple[int, int], nnz: int, coarsening: tuple[int, int]) -> tuple[Tables, Tables]:
    """The tables of blocks and of super-blocks (empty ones where the layout has none), as views of one tensor."""
    (mb, nb), (qo, qi) = grid, coarsening
    fine = [mb + 1, nnz, nnz, nb + 1, nnz, nnz, 0]
    rest = table.shape[0] - sum(fine)
    cm, cn = -(-mb // qo), -(-nb // qi)
    many = (rest - cm - cn - 2) // (4 + qo * qi)
    coarse = [cm + 1, many, many, cn + 1, many, many, many * qo * qi] if rest else [0] * 7
    parts = table.split([*fine, *coarse])
    return Tables(*parts[:7]), Tables(*parts[7:])


def _tables(mask: Tensor) -> list[Tensor]:
    mb, nb = mask.shape
    rows, columns = mask.nonzero(as_tuple=True)
    csc_columns, csc_rows = mask.T.nonzero(as_tuple=True)
    positions = torch.zeros(mb, nb, dtype=torch.long)
    positions[rows, columns] = torch.arange(rows.shape[0])

    def offsets(index: Tensor, size: int) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(index, minlength=size).cumsum(0)])

    return [
        offsets(rows, mb),
        columns,
        rows,
        offsets(csc_columns, nb),
        csc_rows,
        positions[csc_rows, csc_columns],
    ]


def _coarse(mask: Tensor, qo: int, qi: int) -> tuple[Tensor, Tensor]:
    """The mask of super-blocks of qo x qi blocks, and the numbers of their blocks (nnz, qo, qi)."""
    mb, nb = mask.shape
    cm, cn = -(-mb // qo), -(-nb // qi)
    numbers = torch.full((cm * qo, cn * qi), -1)
    numbers[:mb, :nb][mask] = torch.arange(int(mask.sum()))
    groups = numbers.reshape(cm, qo, cn, qi).transpose(1, 2)
    coarse = (groups >= 0).flatten(2).any(2)
    return coarse, groups[coarse]


def _seconds(nnz: int, bo: int, bi: int) -> float:
    """Predicted time of a product with one tile of tokens: its L2 reads, or its arithmetic on zeros too."""
    rate = _FLOPS * min(1.0, (min(bo, bi) + 32) / 128)  # narrow tiles leave matrix units waiting for shared memory
    reads = 2 * nnz * (_TILE * (bi + bo) / 2 + bo * bi)  # x for the product, g for the transposed one: their mean
    return max(reads / _L2, 2 * _TILE * nnz * bo * bi / rate)


def _coarsest(mask: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """The super-block, in blocks, with the least predicted time: (1, 1) unless a larger one saves 15 %."""
    best, choice = 0.85 * _seconds(int(mask.sum()), *block), (1, 1)
    for q in (2, 4, 8):
        qo, qi = (min(q, 1 << max(0, (MAX_BLOCK // b).bit_length() - 1)) for b in block)
        if max(qo, qi) < q:
            break
        seconds = _seconds(int(_coarse(mask, qo, qi)[0].sum()), qo * block[0], qi * block[1])
        if seconds < best:
            best, choice = seconds, (qo, qi)
    return choice


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The places of the stored blocks of an m x n matrix: make it with :meth:`from_mask`, once.

    It is compared and hashed by identity, and holds one int32 tensor: the tables of :class:`Tables`, for the blocks and
    (where it pays) for super-blocks of neighbouring blocks that the kernels treat as one dense block. ``longest`` is
    the largest number of (super-)blocks in a row.
    """

    table: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    nnz: int
    coarsening: tuple[int, int]
    longest: int

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block: int | tuple[int, int],
        *,
        shape: tuple[int, int] | None = None,
        coarsening: int | tuple[int, int] | None = None,
    ) -> BlockLayout:
        """The layout of the blocks where ``mask`` is true.

        Args:
            mask: (mb, nb), bool; rows and columns may be empty.
            block: the block's height bo and width bi, or one number for both. The kernels take 1 to 128 and are fast
                for 32, 64 and 128; other sizes are padded to the next power of two (at least 16) on the chip, and
                blocks above 128 run in plain PyTorch.
            shape: (m, n); (mb bo, nb bi) by default. Smaller ones crop the last block row and column, whose stored
                blocks keep their full size: the entries outside are ignored and get zero gradients.
            coarsening: how many blocks form a super-block, in height and width. By default the one whose predicted
                time is least, and none unless it saves 15 %: at 32 x 32, 2 x 2 where about 65 % or more of the
                super-blocks' blocks are stored, 4 x 4 where about 40 % or more are.

        Raises:
            TypeError: if mask is not a bool tensor.
            ValueError: if mask is not two-dimensional or lies on a GPU, if a block has no size, if shape does not
                end in the last block row and column, or if super-blocks are larger than 128.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        if mask.ndim != 2 or 0 in mask.shape or mask.device.type != "cpu":
            raise ValueError(f"mask must be (mb, nb) on the CPU, got {tuple(mask.shape)} on {mask.device}")
        bo, bi = (block, block) if isinstance(block, int) else block
        if min(bo, bi) < 1:
            raise ValueError(f"block must be positive, got {block}")
        mb, nb = mask.shape
        m, n = (mb * bo, nb * bi) if shape is None else shape
        if not ((mb - 1) * bo < m <= mb * bo and (nb - 1) * bi < n <= nb * bi):
            raise ValueError(
                f"shape must be within ({(mb - 1) * bo + 1}..{mb * bo}, {(nb - 1) * bi + 1}..{nb * bi}) "
                f"for a mask of {mb} x {nb} blocks of {bo} x {bi}, got {(m, n)}"
            )
        chosen = coarsening if coarsening is not None else (_coarsest(mask, (bo, bi)) if mask.any() else 1)
        qo, qi = (chosen, chosen) if isinstance(chosen, int) else chosen
        if min(qo, qi) < 1 or ((qo, qi) != (1, 1) and max(qo * bo, qi * bi) > MAX_BLOCK):
            raise ValueError(
                f"coarsening must give super-blocks of at most {MAX_BLOCK}, got {(qo, qi)} of blocks {bo} x {bi}"
            )
        parts = _tables(mask)
        longest = int(mask.sum(1).max())
        if (qo, qi) != (1, 1):
            coarse, members = _coarse(mask, qo, qi)
            longest = int(coarse.sum(1).max())
            parts += [*_tables(coarse), members.flatten()]
        return cls(torch.cat(parts).to(torch.int32), (m, n), (bo, bi), int(mask.sum()), (qo, qi), longest)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of block rows and of block columns."""
        (m, n), (bo, bi) = self.shape, self.block
        return -(-m // bo), -(-n // bi)

    @property
    def density(self) -> float:
        """Stored blocks among all blocks."""
        return self.nnz / (self.grid[0] * self.grid[1])

    @property
    def tables(self) -> Tables:
        """The blocks' tables."""
        return split_table(self.table, self.grid, self.nnz, self.coarsening)[0]

    @property
    def super_tables(self) -> Tables | None:
        """The super-blocks' tables, or None."""
        if self.coarsening == (1, 1):
            return None
        return split_table(self.table, self.grid, self.nnz, self.coarsening)[1]

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.table.device

    def to(self, device: torch.device | str) -> BlockLayout:
        """The layout with its tables on ``device``."""
        return BlockLayout(self.table.to(device), self.shape, self.block, self.nnz, self.coarsening, self.longest)
