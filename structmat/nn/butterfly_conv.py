"""Two-dimensional convolutions whose channels are mixed by butterflies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor
from structmat.matrices import Butterfly
from structmat.matrices._blocks import uniform_
from structmat.nn.parameters import MatrixParameters


class ButterflyConv2d(nn.Module):
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
        super().__init__()
        if groups != 1:
            raise ValueError(
                f"groups must be 1, got {groups}: a butterfly mixes all channels; for channels in separate groups use "
                "nn.Conv2d, or one ButterflyConv2d a group"
            )
        modes = ("zeros", "reflect", "replicate", "circular")
        if padding_mode not in modes:
            raise ValueError(f"padding_mode must be one of {', '.join(modes)}, got {padding_mode!r}")
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.kernel_size = _two("kernel_size", kernel_size, 1)
        self.stride = _two("stride", stride, 1)
        self.dilation = _two("dilation", dilation, 1)
        self.padding_mode, self.nblocks = padding_mode, nblocks
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(padding, str):
            if padding not in ("valid", "same"):
                raise ValueError(f'padding must be integers, "valid" or "same", got {padding!r}')
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f'padding="same" needs stride 1, got {self.stride}')
            self.padding = padding
            before = [r // 2 if padding == "same" else 0 for r in reach]
            after = [r - b if padding == "same" else 0 for r, b in zip(reach, before, strict=True)]
        else:
            self.padding = _two("padding", padding, 0)
            before = after = list(self.padding)
        self._reach = (reach[0] + 1, reach[1] + 1)
        self._pads = (before[1], after[1], before[0], after[0])  # as F.pad counts them, the last dimension first
        pairs = self._radices(radices)
        shape = self.out_channels, math.prod(self.kernel_size) * self.in_channels
        self.weight = MatrixParameters(Butterfly.random(shape, pairs, nblocks=nblocks, device=device, dtype=dtype))
        if bias:
            value = self.weight()
            self.bias = nn.Parameter(torch.empty(self.out_channels, dtype=value.dtype, device=value.device))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    def _radices(self, radices: Iterable[int | tuple[int, int]] | None) -> list[tuple[int, int]]:
        """Those of [B_00, B_01, ...]: the left factor's blocks are as many times wider as there are offsets."""
        chain = Butterfly.structure(self.out_channels, self.in_channels, radices)
        first, *rest = ((p.b, p.c) for p in chain)
        return [(first[0], first[1] * math.prod(self.kernel_size)), *rest]

    def _reset_bias(self) -> None:
        if self.bias is not None:
            # The standard deviation of uniform numbers between -1 and 1 over the root of the fan-in.
            std = 1 / math.sqrt(3 * self.weight.shape[-1])
            uniform_(self.bias, std * math.sqrt(2) if self.bias.is_complex() else std)

    def reset_parameters(self) -> None:
        """Draw new factors and a new bias with ``nn.Conv2d``'s output variance."""
        value: Any = self.weight()
        value.randomize_()
        self._reset_bias()

    def kernel(self) -> Tensor:
        """The dense kernel, of the shape of ``nn.Conv2d.weight``: (out_channels, in_channels, kh, kw)."""
        row = self.weight().to_dense()
        return row.unflatten(-1, (*self.kernel_size, self.in_channels)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (N, in_channels, rows, columns) or (in_channels, rows, columns)."""
        check_tensor("x", x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x must have shape (N, {self.in_channels}, rows, columns) or ({self.in_channels}, rows, columns), got "
                f"{tuple(x.shape)}"
            )
        images = x if x.ndim == 4 else x.unsqueeze(0)
        if any(self._pads):
            images = F.pad(images, self._pads, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        y = self.weight().linear(self._patches(images), self.bias).permute(0, 3, 1, 2)
        return y if x.ndim == 4 else y.squeeze(0)

    def _patches(self, images: Tensor) -> Tensor:
        """Patches with channels last: (N, C, rows, columns) to (N, rows', columns', kh kw C)."""
        sizes = []
        for size, reach, step in zip(images.shape[-2:], self._reach, self.stride, strict=True):
            if size < reach:
                raise ValueError(
                    f"x must be at least as large as the kernel, which reaches over {self._reach}, got padded images "
                    f"of {tuple(images.shape[-2:])}"
                )
            sizes.append((size - reach) // step + 1)
        images = images.permute(0, 2, 3, 1)
        pieces = []
        for u in range(self.kernel_size[0]):
            rows = slice(
                u * self.dilation[0], u * self.dilation[0] + (sizes[0] - 1) * self.stride[0] + 1, self.stride[0]
            )
            for v in range(self.kernel_size[1]):
                start = v * self.dilation[1]
                columns = slice(start, start + (sizes[1] - 1) * self.stride[1] + 1, self.stride[1])
                pieces.append(images[:, rows, columns])
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

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
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        options: Any = {
            name: getattr(conv, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        }
        kernel = conv.weight.detach()
        layer = cls(
            conv.in_channels, conv.out_channels, **options, bias=conv.bias is not None, radices=radices,
            device="meta", dtype=kernel.dtype,
        )  # fmt: skip
        found: Any = Butterfly.from_dense(kernel.permute(0, 2, 3, 1).flatten(1), layer.weight().chain)
        layer.weight = MatrixParameters(found).requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            layer.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding!r}, dilation={self.dilation}, bias={self.bias is not None}"


def _two(name: str, value: Any, low: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one integer or two, got {value!r}")
    return check_int(name, pair[0], low), check_int(name, pair[1], low)
