"""Two-dimensional convolutions whose channels are mixed by matrices of low displacement rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from structmat.base import StructuredMatrix
from structmat.nn.conv import PatchConv2d
from structmat.nn.displacement import copy_nodes_, random_ldr


class LDRConv2d(PatchConv2d):
    """A convolution whose kernel has low displacement rank as a matrix; as ``nn.Conv2d``.

    The matrix of shape (out_channels, kh kw in_channels) stands over the patches, entries of the kernel outside and
    channels inside: of one entry, a 1 x 1 convolution, it is an :class:`LDRLinear` over channels. Of rank r it has
    r (out_channels + kh kw in_channels) numbers and those of the operators. Patches take kh kw times the memory of the
    input, as in ``F.unfold``.

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
        kind: as of :class:`LDRLinear`.
        rank: the number of columns of the generators.
        corner: as of :class:`LDRLinear`.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, groups are asked for, or an option is unknown.

    Shape:
        (N, in_channels, rows, columns) to (N, out_channels, rows', columns'), both also without N. Inside an autocast
        region the output has the region's dtype. The output lies in memory with its channels last.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.LDRConv2d(64, 128, 3, padding=1, kind="toeplitz", rank=4)
        >>> layer(torch.ones(2, 64, 10, 12)).shape
        torch.Size([2, 128, 10, 12])
        >>> layer.weight().num_params, 64 * 128 * 9
        (2816, 73728)
    """

    _mixer = "a matrix of low displacement rank"

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
        kind: str = "toeplitz",
        rank: int = 2,
        corner: bool | None = None,
    ) -> None:
        def make(offsets: int) -> StructuredMatrix:
            return random_ldr((out_channels, offsets * in_channels), kind, rank, corner, device, dtype)

        options = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(make, in_channels, out_channels, kernel_size, *options)
        self.kind, self.rank = kind, rank

    def reset_parameters(self) -> None:
        """Draw new factors and a new bias with ``nn.Conv2d``'s output variance."""
        copy_nodes_(self.weight(), self.kind, self.rank)
        super().reset_parameters()
