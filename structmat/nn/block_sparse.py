"""Linear layers with block-sparse and Pixelfly weights."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from structmat._checks import check_int
from structmat.config_pixelfly import PixelflyConfig
from structmat.layouts import Layout
from structmat.matrices import BlockSparse
from structmat.nn.linear import StructuredLinear, check_linear
from structmat.projecting import project


def _shape(in_features: Any, out_features: Any) -> tuple[int, int]:
    return check_int("out_features", out_features), check_int("in_features", in_features)


class BlockSparseLinear(StructuredLinear):
    """A linear layer with a block-sparse weight; see :class:`structmat.BlockSparse`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        layout: a layout of shape (out_features, in_features); or a density in (0, 1], for random blocks.
        block: with a density, height and width of a block, or one number.
        device: where the parameters are made.
        dtype: their dtype; may be complex.

    Raises:
        ValueError: if the layout is of another shape, or the density out of range.

    Example:
        >>> import torch, structmat
        >>> layout = structmat.layouts.flat_butterfly((64, 128), 16, max_stride=2)
        >>> layer = structmat.nn.BlockSparseLinear(128, 64, layout=layout)
        >>> layer(torch.ones(2, 128)).shape, layer.weight().num_params
        (torch.Size([2, 64]), 4096)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: Layout | float,
        block: int | tuple[int, int] = 32,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = _shape(in_features, out_features)
        super().__init__(BlockSparse.random(shape, layout, block, device=device, dtype=dtype), bias)

    @classmethod
    def from_linear(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, linear: nn.Linear, layout: Layout | float, block: int | tuple[int, int] = 32
    ) -> Self:
        """The nearest layer in Frobenius norm of the weight; bias, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            layout: as in the constructor; of a density, the blocks of largest norm.
            block: as in the constructor.

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            ValueError: if the layout is of another shape, or the density out of range.
        """
        check_linear(linear)
        return cls._from_parts(BlockSparse.from_dense(linear.weight.detach(), layout, block), linear.bias, linear)


class PixelflyLinear(StructuredLinear):
    """A linear layer whose weight is a flat block butterfly plus low rank; see :class:`structmat.Pixelfly`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        block: height and width of a block, or one number.
        max_stride: of the butterfly, a power of two; see :class:`structmat.PixelflyConfig` for what None means.
        rank: of the low-rank part; see max_stride.
        ratio: a budget as a share of dense, which the two that are not given divide.
        device: where the parameters are made.
        dtype: their dtype; may be complex.

    Raises:
        BudgetError: if the budget cannot be met.
        ValueError: if the structure does not exist for the sizes.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.PixelflyLinear(256, 256, ratio=0.5)
        >>> layer(torch.ones(2, 256)).shape, layer.weight().num_params, 256 * 256
        (torch.Size([2, 256]), 32257, 65536)
        >>> sorted(layer.state_dict())  # doctest: +NORMALIZE_WHITESPACE
        ['bias', 'weight.block_sparse.places', 'weight.block_sparse.values', 'weight.gamma', 'weight.low_rank.left',
         'weight.low_rank.right']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: int | tuple[int, int] = 32,
        max_stride: int | None = None,
        rank: int | None = None,
        ratio: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = PixelflyConfig(block=block, max_stride=max_stride, rank=rank, ratio=ratio)
        super().__init__(config.random(_shape(in_features, out_features), device=device, dtype=dtype), bias)

    @classmethod
    def from_linear(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        linear: nn.Linear,
        block: int | tuple[int, int] = 32,
        max_stride: int | None = None,
        rank: int | None = None,
        ratio: float | None = None,
    ) -> Self:
        """A layer near to another one, by alternating minimisation; bias, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            block: as in the constructor.
            max_stride: as in the constructor.
            rank: as in the constructor.
            ratio: as in the constructor.

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            BudgetError: if the budget cannot be met.
            ValueError: if the structure does not exist for the sizes.
        """
        check_linear(linear)
        config = PixelflyConfig(block=block, max_stride=max_stride, rank=rank, ratio=ratio)
        return cls._from_parts(project(linear.weight, config).matrix, linear.bias, linear)
