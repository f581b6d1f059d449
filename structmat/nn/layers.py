"""One linear layer per family, called as ``nn.Linear`` is."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from structmat._checks import check_int
from structmat.matrices import BlockDiagonal, LowRank, Monarch
from structmat.nn.linear import StructuredLinear, check_linear


def _shape(in_features: Any, out_features: Any) -> tuple[int, int]:
    return check_int("out_features", out_features), check_int("in_features", in_features)


class MonarchLinear(StructuredLinear):
    """A linear layer with a Monarch weight; see :class:`structmat.Monarch`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        nblocks: number of blocks, or (k, l): right blocks, left blocks.
        rank: rank of the slices; None gives the largest hidden width.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: if the structure does not exist for the sizes.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.MonarchLinear(96, 64, nblocks=4)
        >>> layer(torch.ones(2, 96)).shape, layer.weight().num_params, 96 * 64
        (torch.Size([2, 64]), 2560, 6144)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        nblocks: int | tuple[int, int] = 4,
        rank: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = _shape(in_features, out_features)
        super().__init__(Monarch.random(shape, nblocks, rank, device=device, dtype=dtype), bias)

    @classmethod
    def from_linear(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, linear: nn.Linear, nblocks: int | tuple[int, int] = 4, rank: int | None = None
    ) -> Self:
        """The nearest layer in Frobenius norm of the weight; bias, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            nblocks: as in the constructor.
            rank: as in the constructor.

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            ValueError: if the structure does not exist for its size.
        """
        check_linear(linear)
        return cls._from_parts(Monarch.from_dense(linear.weight.detach(), nblocks, rank), linear.bias, linear)


class LowRankLinear(StructuredLinear):
    """A linear layer with a low-rank weight; see :class:`structmat.LowRank`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        rank: the rank.
        device: where the parameters are made.
        dtype: their dtype.

    Example:
        >>> import torch, structmat
        >>> structmat.nn.LowRankLinear(96, 64, rank=8)(torch.ones(2, 96)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = _shape(in_features, out_features)
        super().__init__(LowRank.random(shape, rank, device=device, dtype=dtype), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The nearest layer in Frobenius norm of the weight; bias, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            rank: from 1 to min(in_features, out_features).

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            ValueError: if the rank is out of range.
        """
        check_linear(linear)
        return cls._from_parts(LowRank.from_dense(linear.weight.detach(), rank), linear.bias, linear)


class BlockDiagonalLinear(StructuredLinear):
    """A linear layer with a block-diagonal weight; see :class:`structmat.BlockDiagonal`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        nblocks: number of blocks.
        device: where the parameters are made.
        dtype: their dtype.

    Example:
        >>> import torch, structmat
        >>> structmat.nn.BlockDiagonalLinear(96, 64, nblocks=4)(torch.ones(2, 96)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        nblocks: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = _shape(in_features, out_features)
        super().__init__(BlockDiagonal.random(shape, nblocks, device=device, dtype=dtype), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, nblocks: int = 4) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The nearest layer in Frobenius norm of the weight; bias, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            nblocks: as in the constructor.

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            ValueError: if the structure does not exist for its size.
        """
        check_linear(linear)
        return cls._from_parts(BlockDiagonal.from_dense(linear.weight.detach(), nblocks), linear.bias, linear)
