"""Block-sparse matrices: dense blocks at the places of a layout."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.layouts import Layout, random, top_k
from structmat.layouts.layout import blocks_of
from structmat.matrices._blocks import uniform_
from structmat.projection.truncated import work_dtype
from structmat_kernels.block_sparse import BlockLayout, block_sparse, block_sparse_transposed, to_dense
from structmat_kernels.block_sparse.layout import Tables


@matrix
class BlockSparse(StructuredMatrix):
    """Dense blocks at the places of a layout, zeros elsewhere; any pattern, rectangular grids, batches.

    nnz bo bi parameters, twice as many operations a product. Closed under transposes and multiples. Blocks cut by the
    matrix's edge are stored whole: their entries outside are ignored, and counted as parameters.

    Args:
        values: shape (*batch, nnz, bo, bi), floating point or complex: the blocks by block rows, then columns.
        places: the :class:`structmat.layouts.Layout`. The value keeps its index tables, one int32 tensor, which moves
            to other devices and is saved with the values; :attr:`layout` makes the layout of them again.
        nrows: of tables, what they do not hold themselves; None for a layout.
        ncols: see nrows, as for all others.
        coarse_rows: block rows of a super-block of the kernels.
        coarse_cols: block columns of a super-block.
        longest_row: most (super-)blocks in a row.
        longest_col: most (super-)blocks in a column.

    Raises:
        TypeError: if values is not a floating-point or complex tensor, or places neither a layout nor tables.
        ValueError: if values does not have the layout's number and size of blocks.

    Example:
        >>> import torch, structmat
        >>> from structmat import layouts
        >>> A = structmat.BlockSparse(torch.ones(2, 1, 2), layouts.block_diagonal((2, 4), (1, 2)))
        >>> A.to_dense()
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    values: Tensor
    places: Layout | Tensor
    nrows: int = static(default=None)
    ncols: int = static(default=None)
    coarse_rows: int = static(default=None)
    coarse_cols: int = static(default=None)
    longest_row: int = static(default=None)
    longest_col: int = static(default=None)

    def __post_init__(self) -> None:
        check_tensor("values", self.values, 3)
        check_inexact("values", self.values)
        nnz, bo, bi = self.values.shape[-3:]
        if isinstance(self.places, Layout):
            self._take(self.places)
            return
        if not isinstance(self.places, Tensor):
            raise TypeError(f"places must be a structmat.layouts.Layout, got {type(self.places).__name__}")
        for name in self._static:
            check_int(name, getattr(self, name), 0 if name.startswith("longest") else 1)
        mb, nb = -(-self.nrows // bo), -(-self.ncols // bi)
        smallest = mb + nb + 2 + 4 * nnz
        if self.places.dtype != torch.int32 or self.places.ndim != 1 or self.places.shape[0] < smallest:
            raise ValueError(
                f"places must be int32 tables of at least {smallest} numbers for {nnz} blocks on a grid of {(mb, nb)}, "
                f"got {self.places.dtype} of shape {tuple(self.places.shape)}; give a structmat.layouts.Layout"
            )

    def _take(self, layout: Layout) -> None:
        expected = (layout.nnz, *layout.block)
        if tuple(self.values.shape[-3:]) != expected:
            raise ValueError(
                f"values must be (*batch, {', '.join(map(str, expected))}) for {layout!r}, "
                f"got {tuple(self.values.shape)}"
            )
        tables = layout.tables()
        if layout.coarsening is None:
            inner = tables.tables if tables.super_tables is None else tables.super_tables
            longest = [int(t.diff().max()) for t in (inner.row_offsets, inner.column_offsets)]
        else:
            # Of a pattern found in a matrix: tables of another one, loaded from a state dict, must fit.
            longest = [min(layout.nnz, size) for size in reversed(layout.grid)]
        static = (*layout.shape, *tables.coarsening, *longest)
        object.__setattr__(self, "places", tables.table.to(self.values.device))
        for name, value in zip(self._static, static, strict=True):
            object.__setattr__(self, name, value)

    # ---------------------------------------------------------------- structure
    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-3], self.nrows, self.ncols))

    @property
    def tables(self) -> BlockLayout:
        """What the kernels read: the index tables with their sizes, on the matrix's device."""
        nnz, bo, bi = self.values.shape[-3:]
        places: Any = self.places
        coarsening = (self.coarse_rows, self.coarse_cols)
        return BlockLayout(places, (self.nrows, self.ncols), (bo, bi), nnz, coarsening, self.longest_row)

    @property
    def layout(self) -> Layout:
        """Which blocks are stored; reads the tables, from a GPU too, and so waits for it."""
        tables = self.tables
        mask = torch.zeros(tables.grid, dtype=torch.bool, device="cpu")
        mask[tables.tables.rows.long().cpu(), tables.tables.columns.long().cpu()] = True
        return Layout(mask, tables.block, tables.shape)

    @property
    def flops(self) -> int:
        return 2 * self.values.numel()

    # ---------------------------------------------------------------- products
    def _linear(self, x: Tensor) -> Tensor:
        return block_sparse(x, self.values, self.tables)

    def _linear_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        return block_sparse(x, self.values, self.tables, bias=bias)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return block_sparse_transposed(x, self.values, self.tables)

    @property
    def mT(self) -> BlockSparse:
        """The transpose: a copy of the blocks, in the order of the transposed layout."""
        tables = self.tables
        fine, coarse = tables.tables, tables.super_tables
        order = fine.csc_positions.long()
        parts = _transposed(fine)
        if coarse is not None:
            members = coarse.members.view(-1, self.coarse_rows, self.coarse_cols)[coarse.csc_positions.long()].mT
            number = order.argsort().to(members.dtype)
            parts += [*_transposed(coarse), torch.where(members < 0, -1, number[members.clamp_min(0).long()]).flatten()]
        return BlockSparse._rebuild(
            (self.values[..., order, :, :].mT, torch.cat(parts)),
            (self.ncols, self.nrows, self.coarse_cols, self.coarse_rows, self.longest_col, self.longest_row),
        )

    def _scale(self, scalar: Tensor) -> BlockSparse:
        return self._rebuild((scalar * self.values, self.places), tuple(getattr(self, n) for n in self._static))

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        # The same tables, not equal ones: a look at their contents would wait for a GPU.
        if not isinstance(other, BlockSparse) or other.places is not self.places:
            return None
        return self._rebuild((self.values + other.values, self.places), tuple(getattr(self, n) for n in self._static))

    def to_dense(self) -> Tensor:
        return to_dense(self.values, self.tables)

    # ---------------------------------------------------------------- construction
    @classmethod
    def _project(cls, W: Tensor, layout: Layout | float, block: Any = 32) -> tuple[Self, Tensor]:
        check_tensor("W", W, 2)
        check_inexact("W", W)
        W = W.detach()
        found = layout if isinstance(layout, Layout) else top_k(W, block, layout)
        if tuple(W.shape[-2:]) != found.shape:
            raise ValueError(f"layout must have W's shape {tuple(W.shape[-2:])}, got {found.shape}")
        blocks = blocks_of(W, found.block)
        stored = found.mask.to(W.device)
        rest = torch.where(found.entries().to(W.device), 0, W).to(work_dtype(W))
        return cls(blocks[..., stored, :, :], found), torch.linalg.vector_norm(rest, dim=(-2, -1))

    @classmethod
    def from_dense(cls, W: Tensor, layout: Layout | float, block: Any = 32) -> Self:
        """The nearest block-sparse matrix in Frobenius norm: W's own blocks. Carries no gradient.

        Args:
            W: shape (*batch, m, n), floating point or complex.
            layout: the layout; or a density in (0, 1], for the blocks of largest norm, which are the best ones.
            block: with a density, height and width of a block, or one number.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the layout is of another shape, or the density out of range.
        """
        return cls._project(W, layout, block)[0]

    @classmethod
    def random(
        cls,
        shape: Any,
        layout: Layout | float,
        block: Any = 32,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random block-sparse matrix whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            layout: the layout; or a density in (0, 1], for random blocks, the same ones for the same sizes.
            block: with a density, height and width of a block, or one number.
            generator: source of randomness of the values.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        found = layout if isinstance(layout, Layout) else random((m, n), block, layout)
        if found.shape != (m, n):
            raise ValueError(f"layout must have the shape {(m, n)}, got {found.shape}")
        values = torch.empty((*batch, found.nnz, *found.block), dtype=dtype, device=device)
        return cls(values, found).randomize_(generator=generator)

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        """Fill the blocks in place: every row that has any gets outputs of one variance.

        ``std`` is the root mean square over all outputs: empty rows give zeros, and the others the more.
        """
        tables, (bo, bi) = self.tables, self.values.shape[-2:]
        rows, columns = tables.tables.rows.long(), tables.tables.columns.long()
        mb = tables.grid[0]
        live = (self.ncols - columns * bi).clamp_max(bi).float()
        fan_in = torch.zeros(mb, device=live.device).index_add(0, rows, live)
        heights = (self.nrows - torch.arange(mb, device=live.device) * bo).clamp_max(bo).float()
        filled = torch.where(fan_in > 0, heights, 0).sum()
        stds = std * (self.nrows / (filled * fan_in[rows])).sqrt()
        uniform_(self.values, stds.view(-1, 1, 1), generator)
        return self


def _transposed(tables: Tables) -> list[Tensor]:
    """The tables but for the members of the transposed layout, whose two orders are these two, exchanged."""
    order = tables.csc_positions.long()
    return [
        tables.column_offsets,
        tables.csc_rows,
        tables.columns[order],
        tables.row_offsets,
        tables.columns,
        order.argsort().to(tables.columns.dtype),
    ]
