"""Two-dimensional convolutions whose channels are mixed by block-sparse and Pixelfly matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from structmat.config_pixelfly import PixelflyConfig, beside
from structmat.layouts import Layout, random, top_k
from structmat.matrices import BlockSparse, Pixelfly
from structmat.nn.conv import PatchConv2d


class BlockSparseConv2d(PatchConv2d):
    """A convolution with a block-sparse matrix of one layout at every entry of its kernel; as ``nn.Conv2d``.

    ``y[:, p, q] = bias + sum_u,v B_uv x[:, stride p + dilation u - padding, stride q + dilation v - padding]``, with
    B_uv of shape (out_channels, in_channels) and independent values for every offset. A block says whether a group of
    input channels is seen by a group of output channels at all. One product with the image's patches computes it; a
    1 x 1 convolution is a :class:`BlockSparseLinear` over channels.

    kh kw nnz bo bi parameters, twice as many operations a pixel. Patches take kh kw times the memory of the input, as
    in ``F.unfold``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernel, one integer or two.
        stride: one integer or two.
        padding: on every side, one integer or (rows, columns), or "valid" for none, or "same" for an output of the
            input's size (stride 1; of an odd total the larger half is at the end).
        dilation: distance between the kernel's entries, one integer or two.
        groups: must be 1.
        bias: whether there is a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        layout: a layout of shape (out_channels, in_channels); or a density in (0, 1], for random blocks. Where the
            kernel is larger than 1 x 1 the width of a block must divide in_channels.
        block: with a density, height and width of a block, or one number.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, groups are asked for, an option is unknown, or the layout is of another
            shape or of blocks that do not divide in_channels.

    Shape:
        (N, in_channels, rows, columns) to (N, out_channels, rows', columns'), both also without N. Inside an autocast
        region the output has the region's dtype. The output lies in memory with its channels last.

    Example:
        >>> import torch, structmat
        >>> layout = structmat.layouts.flat_butterfly((128, 64), 16, max_stride=2)
        >>> layer = structmat.nn.BlockSparseConv2d(64, 128, 3, padding=1, layout=layout)
        >>> layer(torch.ones(2, 64, 10, 12)).shape
        torch.Size([2, 128, 10, 12])
        >>> layer.weight().num_params, 64 * 128 * 9
        (36864, 73728)
    """

    _mixer = "a block-sparse matrix"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        layout: Layout | float,
        block: int | tuple[int, int] = 32,
    ) -> None:
        def make(offsets: int) -> BlockSparse:
            shape = out_channels, in_channels
            found = layout if isinstance(layout, Layout) else random(shape, block, layout)
            return BlockSparse.random(
                (out_channels, offsets * in_channels), _beside(found, shape, offsets), device=device, dtype=dtype
            )

        options = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(make, in_channels, out_channels, kernel_size, *options)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, layout: Layout | float, block: int | tuple[int, int] = 32) -> Self:
        """The nearest layer in Frobenius norm of the kernel; bias, dtype, device, mode and frozenness are kept.

        Args:
            conv: the layer to approximate.
            layout: as in the constructor; of a density, the blocks of channels of largest norm over all offsets.
            block: as in the constructor.

        Raises:
            TypeError: if conv is not an ``nn.Conv2d``.
            ValueError: if it has groups, or the layout does not fit, or the density is out of range.
        """
        row = cls._kernel_row(conv)
        offsets = row.shape[1] // conv.in_channels
        matrices = row.unflatten(1, (offsets, -1)).movedim(1, 0)
        found = layout if isinstance(layout, Layout) else top_k(matrices, block, layout)
        shape = conv.out_channels, conv.in_channels
        return cls._around(BlockSparse.from_dense(row, _beside(found, shape, offsets)), conv)


class PixelflyConv2d(PatchConv2d):
    """A convolution with a flat block butterfly on its channels, at every entry of the kernel, plus low rank.

    The row of matrices ``[B_00, B_01, ...]``, one for each offset, is ``gamma S + (1 - gamma) U V``: S has the same
    flat butterfly of (out_channels, in_channels) at every offset; V is a kh x kw convolution to ``rank`` channels and
    U a 1 x 1 convolution from these. See :class:`BlockSparseConv2d` for the arguments that are not here, for shapes and
    for cost.

    kh kw (nnz bo bi + r in_channels) + r out_channels + 1 parameters.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernel, one integer or two.
        stride: one integer or two.
        padding: integers, "valid" or "same".
        dilation: one integer or two.
        groups: must be 1.
        bias: whether there is a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        block: height and width of a block, or one number; where the kernel is larger than 1 x 1 the width must divide
            in_channels.
        max_stride: of the butterfly, a power of two; see :class:`structmat.PixelflyConfig` for what None means.
        rank: of the low-rank part; see max_stride.
        ratio: a budget as a share of dense, which the two that are not given divide.

    Raises:
        BudgetError: if the budget cannot be met.
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, groups are asked for, an option is unknown, or the structure does not
            exist for the channels.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.PixelflyConv2d(64, 128, 3, stride=2, padding=1, block=16, ratio=0.5)
        >>> layer(torch.ones(2, 64, 10, 12)).shape
        torch.Size([2, 128, 5, 6])
        >>> layer.weight().num_params, 64 * 128 * 9 // 2
        (36737, 36864)
    """

    _mixer = "a Pixelfly matrix"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        block: int | tuple[int, int] = 32,
        max_stride: int | None = None,
        rank: int | None = None,
        ratio: float | None = None,
    ) -> None:
        config = PixelflyConfig(block=block, max_stride=max_stride, rank=rank, ratio=ratio)

        def make(offsets: int) -> Pixelfly:
            sizes = config._resolve(out_channels, in_channels, offsets)
            return Pixelfly.random((out_channels, offsets * in_channels), **sizes, device=device, dtype=dtype)

        options = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(make, in_channels, out_channels, kernel_size, *options)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        block: int | tuple[int, int] = 32,
        max_stride: int | None = None,
        rank: int | None = None,
        ratio: float | None = None,
    ) -> Self:
        """A layer near to another one, by alternating minimisation; bias, dtype, device, mode and frozenness are kept.

        Args:
            conv: the layer to approximate.
            block: as in the constructor.
            max_stride: as in the constructor.
            rank: as in the constructor.
            ratio: as in the constructor; a search divides it, see :class:`structmat.PixelflyConfig`.

        Raises:
            BudgetError: if the budget cannot be met.
            TypeError: if conv is not an ``nn.Conv2d``.
            ValueError: if it has groups, or the structure does not exist for its channels.
        """
        config = PixelflyConfig(block=block, max_stride=max_stride, rank=rank, ratio=ratio)
        row = cls._kernel_row(conv)
        return cls._around(config._project(row, row.shape[1] // conv.in_channels)[0], conv)


def _beside(layout: Layout, shape: tuple[int, int], offsets: int) -> Layout:
    if layout.shape != shape:
        raise ValueError(f"layout must have the shape (out_channels, in_channels) = {shape}, got {layout.shape}")
    return beside(layout, offsets)
