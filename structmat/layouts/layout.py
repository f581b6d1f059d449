"""The layout of a block-sparse matrix as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int, check_matrix_shape, check_tensor
from structmat_kernels.block_sparse import BlockLayout

_DRAWN = 64  # most characters in a row of a drawing


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """The stored blocks of an m x n matrix; equal and hashed by value.

    ``a | b`` is the union, ``layout.mT`` the layout of the transpose, ``str(layout)`` a drawing.

    Args:
        mask: (mb, nb), bool, on the CPU: which blocks are stored. Rows and columns may be empty, all of them too.
        block: height bo and width bi of a block, or one number for both; at most the matrix's sizes.
        shape: (m, n) with mb = ceil(m / bo) and nb = ceil(n / bi); by default (mb bo, nb bi). Blocks at the edge are
            stored whole: their entries outside the matrix count as parameters, and are ignored.
        coarsening: how many blocks the kernels join to one, see ``structmat_kernels``; None lets them choose. It
            changes speed only and is not compared.

    Raises:
        TypeError: if mask is not a bool tensor.
        ValueError: if mask is not two-dimensional on the CPU, or mask, block and shape do not fit together.

    Example:
        >>> from structmat import layouts
        >>> layout = layouts.flat_butterfly((256, 256), 32, max_stride=4)
        >>> layout
        Layout(shape=(256, 256), block=(32, 32), nnz=24, density=0.375)
        >>> print(layout)
        ███·····
        ██·█····
        █·██····
        ·███····
        ····███·
        ····██·█
        ····█·██
        ·····███
    """

    mask: Tensor
    block: tuple[int, int]
    shape: tuple[int, int] = None  # pyright: ignore[reportAssignmentType]
    coarsening: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_tensor("mask", self.mask)
        if self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {self.mask.dtype}")
        if self.mask.ndim != 2 or 0 in self.mask.shape or self.mask.device.type != "cpu":
            raise ValueError(f"mask must be (mb, nb) on the CPU, got {tuple(self.mask.shape)} on {self.mask.device}")
        bo, bi = pair_of(self.block)
        mb, nb = self.mask.shape
        shape = (mb * bo, nb * bi) if self.shape is None else check_matrix_shape(self.shape)[1:]
        if grid_of(shape, (bo, bi)) != (mb, nb):
            raise ValueError(
                f"mask must have {grid_of(shape, (bo, bi))} blocks of {bo} x {bi} for the shape {shape}, got {(mb, nb)}"
            )
        for name, value in (("mask", self.mask.clone()), ("block", (bo, bi)), ("shape", shape)):
            object.__setattr__(self, name, value)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of block rows and of block columns."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """Stored blocks among all blocks."""
        return self.nnz / self.mask.numel()

    @property
    def num_params(self) -> int:
        """Stored entries: nnz bo bi, with those of cut blocks that lie outside the matrix."""
        return self.nnz * self.block[0] * self.block[1]

    @property
    def rows(self) -> Tensor:
        """Block row of every stored block, (nnz,): by rows, then columns, which is the order of values."""
        return self.mask.nonzero()[:, 0]

    @property
    def columns(self) -> Tensor:
        """Block column of every stored block, (nnz,), in the same order."""
        return self.mask.nonzero()[:, 1]

    @property
    def mT(self) -> Layout:
        """The layout of the transpose."""
        (m, n), (bo, bi), q = self.shape, self.block, self.coarsening
        return Layout(self.mask.T, (bi, bo), (n, m), None if q is None else (q[1], q[0]))

    def entries(self) -> Tensor:
        """The support entry by entry: (m, n), bool."""
        (m, n), (bo, bi) = self.shape, self.block
        return self.mask.repeat_interleave(bo, 0)[:m].repeat_interleave(bi, 1)[:, :n]

    def tables(self) -> BlockLayout:
        """The index tables that the kernels read, in both orders."""
        with torch.device("cpu"):  # not on torch's default device, where the mask is not
            return BlockLayout.from_mask(self.mask, self.block, shape=self.shape, coarsening=self.coarsening)

    def __or__(self, other: Layout) -> Layout:
        if not isinstance(other, Layout):
            return NotImplemented
        if (self.shape, self.block) != (other.shape, other.block):
            raise ValueError(
                f"a union needs layouts of one shape and block, got {self.shape} in {self.block} and {other.shape} in "
                f"{other.block}"
            )
        return Layout(self.mask | other.mask, self.block, self.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.shape, self.block, self.mask.numpy().tobytes()

    def __repr__(self) -> str:
        return f"Layout(shape={self.shape}, block={self.block}, nnz={self.nnz}, density={self.density:.4g})"

    def __str__(self) -> str:
        """A character for every block, or for a square of blocks: █ all stored, ▒ some, · none."""
        step = -(-max(self.grid) // _DRAWN)
        pieces = [row.split(step, 1) for row in self.mask.split(step, 0)]
        return "\n".join("".join("█" if p.all() else "▒" if p.any() else "·" for p in row) for row in pieces)

    def plot(self, ax: Any = None) -> Any:
        """Draw the stored blocks with matplotlib.

        Args:
            ax: the axes to draw into; new ones if None.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        # The extent counts entries, so that cut blocks are drawn as large as they are.
        (m, n), (bo, bi), (mb, nb) = self.shape, self.block, self.grid
        ax.imshow(
            self.mask.numpy(), cmap="Greys", vmin=0, vmax=1.4, extent=(0, nb * bi, mb * bo, 0), interpolation="nearest"
        )
        ax.set(xlim=(0, n), ylim=(m, 0), title=f"{m} x {n}, density {self.density:.3g}")
        return ax


def pair_of(block: Any) -> tuple[int, int]:
    """Height and width of a block from a pair or one number, checked."""
    bo, bi = block if isinstance(block, (tuple, list)) and len(block) == 2 else (block, block)
    return check_int("block", bo), check_int("block", bi)


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns of a matrix; raise where a block is larger than it."""
    (m, n), (bo, bi) = shape, block
    if bo > m or bi > n:
        raise ValueError(f"block must be at most the matrix's sizes {m} x {n}, got {bo} x {bi}")
    return -(-m // bo), -(-n // bi)


def sizes_of(shape: Any, block: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Shape, block and grid, checked."""
    _, m, n = check_matrix_shape(shape)
    pair = pair_of(block)
    return (m, n), pair, grid_of((m, n), pair)


def blocks_of(W: Tensor, block: tuple[int, int]) -> Tensor:
    """All blocks of W (*batch, m, n) as (*batch, mb, nb, bo, bi), those at the edge filled up with zeros."""
    (m, n), (bo, bi) = W.shape[-2:], block
    padded = torch.nn.functional.pad(W, (0, -n % bi, 0, -m % bo))
    return padded.unflatten(-1, (-1, bi)).unflatten(-3, (-1, bo)).transpose(-3, -2)
