"""Pixelfly matrices: block-sparse plus low rank."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.layouts import Layout, random
from structmat.matrices.block_sparse import BlockSparse
from structmat.matrices.low_rank import LowRank
from structmat.projection.pixelfly import project_free_blocks, project_pixelfly
from structmat.projection.truncated import work_dtype
from structmat_kernels.block_sparse import block_sparse, block_sparse_transposed


def _check_gamma(gamma: float) -> float:
    if not isinstance(gamma, (int, float)) or not math.isfinite(gamma) or gamma in (0, 1):
        raise ValueError(f"gamma must be a finite number other than 0 and 1, got {gamma!r}")
    return float(gamma)


@matrix
class Pixelfly(StructuredMatrix):
    """``gamma B + (1 - gamma) U V``: a block-sparse matrix plus one of low rank (Chen, Dao et al. 2021).

    In the paper B has the layout of a flat block butterfly, see :func:`structmat.layouts.flat_butterfly`; any is
    taken. One pass computes both terms. nnz bo bi + r (m + n) + 1 parameters. Closed under transposes and multiples.

    gamma is learnt and may be any number. Between 0 and 1 it weighs the terms; at 0 or 1 one of them vanishes, and its
    factors get no gradient until gamma has moved.

    Args:
        gamma: shape (*batch, 1).
        block_sparse: B, shape (*batch, m, n), of the same dtype and device.
        low_rank: U V, of the same shape; batches broadcast. Its inner size may be 0.

    Raises:
        TypeError: if a part has another class or dtype.
        ValueError: if gamma is a scalar, or shapes, batches or devices do not fit together.

    Example:
        >>> import torch, structmat
        >>> layout = structmat.layouts.flat_butterfly((256, 256), 32, max_stride=2)
        >>> A = structmat.Pixelfly.random((256, 256), layout, rank=16)
        >>> A.num_params, A.linear(torch.ones(5, 256)).shape
        (24577, torch.Size([5, 256]))
    """

    gamma: Tensor
    block_sparse: BlockSparse
    low_rank: LowRank

    def __post_init__(self) -> None:
        check_tensor("gamma", self.gamma)
        check_inexact("gamma", self.gamma)
        # Not a scalar: FSDP2 shards the first dimension of every parameter, and needs one.
        if self.gamma.shape[-1:] != (1,):
            raise ValueError(
                f"gamma must have shape (*batch, 1), got {tuple(self.gamma.shape)}; give it a last dimension with "
                "gamma.unsqueeze(-1)"
            )
        for name, cls in (("block_sparse", BlockSparse), ("low_rank", LowRank)):
            part = getattr(self, name)
            if not isinstance(part, cls):
                raise TypeError(f"{name} must be a {cls.__name__}, got {type(part).__name__}")
            check_same(name, next(part.tensors()), "gamma", self.gamma)
        if self.block_sparse.shape[-2:] != self.low_rank.shape[-2:]:
            raise ValueError(
                f"block_sparse and low_rank must have one shape, got {tuple(self.block_sparse.shape)} and "
                f"{tuple(self.low_rank.shape)}"
            )
        try:
            _ = self.shape
        except RuntimeError:
            raise ValueError(
                f"batches must broadcast, got {tuple(self.gamma.shape[:-1])} of gamma, "
                f"{tuple(self.block_sparse.batch_shape)} of block_sparse and {tuple(self.low_rank.batch_shape)} of "
                "low_rank"
            ) from None

    @property
    def shape(self) -> torch.Size:
        sizes = self.block_sparse.shape
        batches = self.gamma.shape[:-1], sizes[:-2], self.low_rank.batch_shape
        return torch.Size((*torch.broadcast_shapes(*batches), *sizes[-2:]))

    @property
    def rank(self) -> int:
        """The inner size of the low-rank part."""
        return self.low_rank.rank

    @property
    def layout(self) -> Layout:
        """Which blocks are stored; waits for a GPU."""
        return self.block_sparse.layout

    @property
    def flops(self) -> int:
        m, n = self.shape[-2:]
        stored = self.block_sparse.values.shape[-3:].numel()
        # The products; U by 1 - gamma, and B x by gamma and the sum.
        return math.prod(self.batch_shape) * (2 * stored + 2 * self.rank * (m + n) + self.rank * m + 2 * m)

    # ---------------------------------------------------------------- products
    def _operands(self) -> dict[str, Any]:
        u = (1 - self.gamma).unsqueeze(-1) * self.low_rank.left
        return {"u": u, "v": self.low_rank.right, "gamma": self.gamma.squeeze(-1)}

    def _linear(self, x: Tensor) -> Tensor:
        return block_sparse(x, self.block_sparse.values, self.block_sparse.tables, **self._operands())

    def _linear_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        return block_sparse(x, self.block_sparse.values, self.block_sparse.tables, **self._operands(), bias=bias)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return block_sparse_transposed(x, self.block_sparse.values, self.block_sparse.tables, **self._operands())

    @property
    def mT(self) -> Pixelfly:
        return Pixelfly._rebuild((self.gamma, self.block_sparse.mT, self.low_rank.mT), ())

    def _scale(self, scalar: Tensor) -> Pixelfly:
        parts = self.block_sparse._scale(scalar), self.low_rank._scale(scalar)
        return Pixelfly._rebuild((self.gamma, *parts), ())

    def to_dense(self) -> Tensor:
        gamma = self.gamma.unsqueeze(-1)
        return gamma * self.block_sparse.to_dense() + (1 - gamma) * self.low_rank.to_dense()

    # ---------------------------------------------------------------- construction
    @classmethod
    def _project(
        cls, W: Tensor, layout: Layout | float, rank: int, gamma: float = 0.5, sweeps: int = 200, block: Any = 32
    ) -> tuple[Self, None, Tensor]:
        check_tensor("W", W, 2)
        check_inexact("W", W)
        m, n = W.shape[-2:]
        weight, W = _check_gamma(gamma), W.detach()
        if isinstance(layout, Layout):
            _check_layout(layout, (m, n))
            left, right, lost = project_pixelfly(W, layout.mask, layout.block, rank, sweeps)
        else:
            # How many blocks a density means, and of what kind the layout is, random says for all alike.
            layout = random((m, n), block, layout)
            mask, left, right, lost = project_free_blocks(W, layout.nnz, layout.block, rank, sweeps)
            layout = Layout(mask, layout.block, (m, n), layout.coarsening)
        root = abs(1 - weight) ** -0.5
        low = LowRank((left * math.copysign(root, 1 - weight)).to(W.dtype), (right * root).to(W.dtype))
        # The blocks make up for the rounding of the low-rank part as well.
        double = low.to(work_dtype(W))
        blocks = BlockSparse.from_dense((W.to(double.dtype) - (1 - weight) * double.to_dense()) / weight, layout)
        return cls(W.new_full((*W.shape[:-2], 1), weight), blocks.to(W.dtype), low), None, lost

    @classmethod
    def from_dense(
        cls, W: Tensor, layout: Layout | float, rank: int, gamma: float = 0.5, sweeps: int = 200, block: Any = 32
    ) -> Self:
        """A Pixelfly matrix near to W, by alternating minimisation; see :func:`~structmat.projection.project_pixelfly`.

        The error is never above that of the blocks alone or of the rank alone, and zero to rounding for members whose
        low-rank part the entries outside of the blocks determine. The result does not carry W's gradient.

        Of a density in place of a layout the blocks are chosen too, in turns with the low rank: those where W minus
        the low rank is largest. This is a robust principal component analysis with outliers in blocks (Candès et al.
        2011), the decomposition of Scatterbrain (Chen et al. 2021) for a matrix. The error then never is above that of
        the largest blocks alone or of the rank alone; that a member's blocks are found is usual, and not proved.

        Args:
            W: shape (*batch, m, n), floating point or complex; the work is done in double precision.
            layout: of the blocks; or a density in (0, 1], for blocks chosen from W, the same ones for a whole batch.
            rank: of the rest, from 0 to min(m, n).
            gamma: the weight; the factors are divided by it and by 1 - gamma. The error does not depend on it.
            sweeps: most sweeps.
            block: with a density, height and width of a block, or one number.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the layout is of another shape, the density, rank or gamma is out of range, or W has NaN or
                infinite entries.

        Example:
            >>> import torch, structmat
            >>> g = torch.Generator().manual_seed(0)
            >>> L, blocks = structmat.LowRank.random((64, 64), 2, generator=g), torch.zeros(64, 64)
            >>> blocks[8:16, 40:48], blocks[32:40, :8] = 5.0, -3.0
            >>> A = structmat.Pixelfly.from_dense(L.to_dense() + blocks, 2 / 64, rank=2, block=8)
            >>> A.layout.rows.tolist(), A.layout.columns.tolist()
            ([1, 4], [5, 0])
        """
        return cls._project(W, layout, rank, gamma, sweeps, block)[0]

    @classmethod
    def random(
        cls,
        shape: Any,
        layout: Layout | float,
        rank: int,
        block: Any = 32,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random Pixelfly matrix whose outputs have ``nn.Linear``'s variance, half from each part; gamma is 1/2.

        Args:
            shape: (*batch, m, n).
            layout: of the blocks; or a density in (0, 1], for random blocks, the same ones for the same sizes.
            rank: inner size of the low-rank part, from 0.
            block: with a density, height and width of a block, or one number.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        layout = layout if isinstance(layout, Layout) else random((m, n), block, layout)
        _check_layout(layout, (m, n))
        check_int("rank", rank, 0)

        def empty(*sizes: int) -> Tensor:
            return torch.empty((*batch, *sizes), dtype=dtype, device=device)

        blocks = BlockSparse(empty(layout.nnz, *layout.block), layout)
        return cls(empty(1), blocks, LowRank(empty(m, rank), empty(rank, n))).randomize_(generator=generator)

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        """Fill the factors in place, gamma with 1/2; each part gives half of the outputs' variance."""
        self.gamma.fill_(0.5)
        both = self.rank and self.block_sparse.values.shape[-3]
        part = std * (2**0.5 if both else 2)
        self.block_sparse.randomize_(part, generator)
        self.low_rank.randomize_(part, generator)
        return self


def _check_layout(layout: Layout, shape: tuple[int, int]) -> None:
    if layout.shape != shape:
        raise ValueError(f"layout must have the shape {shape}, got {layout.shape}")
