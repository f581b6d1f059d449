"""Two-dimensional convolutions whose channels are mixed by butterflies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import nn

from structmat.matrices import Butterfly
from structmat.nn.conv import PatchConv2d


class ButterflyConv2d(PatchConv2d):
    """A convolution that mixes channels by one butterfly matrix at every entry of its kernel; as ``nn.Conv2d``.

    ``y[:, p, q] = bias + sum_u,v B_uv x[:, stride p + dilation u - padding, stride q + dilation v - padding]``, with an
    independent butterfly B_uv of shape (out_channels, in_channels) for every offset. The row of matrices
    ``[B_00, B_01, ...]`` is itself a butterfly, of shape (out_channels, kh kw in_channels): the blocks of its left
    factor are kh kw times as wide, and its other factors stand kh kw times along the diagonal. So the layer is one
    product of few stages with the image's patches, and a 1 x 1 convolution is a :class:`ButterflyLinear` over channels.

    Of c channels in and out: O(kh kw c log c) numbers; as many operations a pixel, or some more where merged stages are
    faster. Patches take kh kw times the memory of the input, as in ``F.unfold``.

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
        nblocks: how many butterflies to multiply; all but the first to be applied are square, with strides that grow
            and shrink in turns, and shared by the offsets.
        radices: of an out_channels x in_channels butterfly; see :meth:`structmat.Butterfly.structure`.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, groups are asked for, an option is unknown or the structure does not
            exist for the channels.

    Shape:
        (N, in_channels, rows, columns) to (N, out_channels, rows', columns'), both also without N. Inside an autocast
        region the output has the region's dtype. The output lies in memory with its channels last.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.ButterflyConv2d(64, 128, 3, padding=1)
        >>> layer(torch.ones(2, 64, 10, 12)).shape
        torch.Size([2, 128, 10, 12])
        >>> layer.weight().num_params, 64 * 128 * 9
        (8064, 73728)
    """

    _mixer = "a butterfly"
    nblocks = 1  # of layers that are not made by the constructor

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
        nblocks: int = 1,
        radices: Iterable[int | tuple[int, int]] | None = None,
    ) -> None:
        def make(offsets: int) -> Butterfly:
            pairs = _radices(out_channels, in_channels, offsets, radices)
            shape = out_channels, offsets * in_channels
            return Butterfly.random(shape, pairs, nblocks=nblocks, device=device, dtype=dtype)

        options = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(make, in_channels, out_channels, kernel_size, *options)
        self.nblocks = nblocks

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, radices: Iterable[int | tuple[int, int]] | None = None) -> Self:
        """Project the kernel of an ``nn.Conv2d``; the bias is copied, dtype, device, mode and frozenness are kept.

        Args:
            conv: the layer to approximate.
            radices: as in the constructor.

        Raises:
            TypeError: if conv is not an ``nn.Conv2d``.
            ValueError: if it has groups, or the structure does not exist for its channels.
        """
        row = cls._kernel_row(conv)
        pairs = _radices(conv.out_channels, conv.in_channels, row.shape[1] // conv.in_channels, radices)
        chain = Butterfly.structure(row.shape[0], row.shape[1], pairs)
        return cls._around(Butterfly.from_dense(row, chain), conv)


def _radices(
    out_channels: int, in_channels: int, offsets: int, radices: Iterable[int | tuple[int, int]] | None
) -> list[tuple[int, int]]:
    """Those of [B_00, B_01, ...]: the left factor's blocks are as many times wider as there are offsets."""
    first, *rest = ((p.b, p.c) for p in Butterfly.structure(out_channels, in_channels, radices))
    return [(first[0], first[1] * offsets), *rest]
