"""What two-dimensional convolutions by structured matrices share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor
from structmat.base import StructuredMatrix
from structmat.matrices._blocks import uniform_
from structmat.nn.parameters import MatrixParameters


class PatchConv2d(nn.Module):
    """A convolution as the product of a structured matrix with the image's patches; options as ``nn.Conv2d``.

    The weight is the row of matrices ``[B_00, B_01, ...]``, one of shape (out_channels, in_channels) for every entry of
    the kernel: ``y[:, p, q] = bias + sum_u,v B_uv x[:, stride p + dilation u - padding, ...]``.

    Args:
        make: the weight, of the number of the kernel's entries; called once the options are checked.
        in_channels: as for all that follow, see the classes.
        out_channels: channels of the output.
        kernel_size: one integer or two.
        stride: one integer or two.
        padding: integers, "valid" or "same".
        dilation: one integer or two.
        groups: must be 1.
        bias: whether there is a bias.
        padding_mode: as ``nn.Conv2d``.
    """

    #: What mixes the channels, in words.
    _mixer: ClassVar[str] = "a structured matrix"

    def __init__(
        self,
        make: Callable[[int], StructuredMatrix],
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self._check_groups(groups)
        modes = ("zeros", "reflect", "replicate", "circular")
        if padding_mode not in modes:
            raise ValueError(f"padding_mode must be one of {', '.join(modes)}, got {padding_mode!r}")
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.kernel_size = _two("kernel_size", kernel_size, 1)
        self.stride = _two("stride", stride, 1)
        self.dilation = _two("dilation", dilation, 1)
        self.padding_mode = padding_mode
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
        self.weight = MatrixParameters(make(math.prod(self.kernel_size)))
        if bias:
            value = self.weight()
            self.bias = nn.Parameter(torch.empty(self.out_channels, dtype=value.dtype, device=value.device))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    @classmethod
    def _check_groups(cls, groups: int) -> None:
        if groups != 1:
            raise ValueError(
                f"groups must be 1, got {groups}: {cls._mixer} mixes all channels; for channels in separate groups use "
                f"nn.Conv2d, or one {cls.__name__} a group"
            )

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
    def _kernel_row(cls, conv: nn.Conv2d) -> Tensor:
        """The weight of an ``nn.Conv2d`` as a row of matrices, (out_channels, kh kw in_channels); raise for groups."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        cls._check_groups(conv.groups)
        return conv.weight.detach().permute(0, 2, 3, 1).flatten(1)

    @classmethod
    def _around(cls, value: StructuredMatrix, conv: nn.Conv2d) -> Self:
        """A layer with this weight in place of another layer: its options, bias, mode and frozenness."""
        layer = cls.__new__(cls)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        options: Any = {name: getattr(conv, name) for name in names}
        PatchConv2d.__init__(layer, lambda offsets: value, **options, bias=False)
        layer.weight.requires_grad_(conv.weight.requires_grad)
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
