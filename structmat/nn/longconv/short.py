"""Short depthwise causal convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from structmat._autocast import autocast_dtype
from structmat._checks import check_int, check_tensor
from structmat.nn.longconv.streaming import register_state, reordered
from structmat_kernels.short_conv import short_conv


@register_state
@dataclasses.dataclass
class ShortConvState:
    """The last inputs of a :class:`ShortConv`.

    Args:
        history: shape (*batch, channels, kernel_size - 1), the latest one last, zeros before the beginning.
        position: how many inputs there have been.
    """

    history: Tensor
    position: int

    def reorder(self, index: Tensor) -> ShortConvState:
        """The state whose rows of the first batch dimension are those at ``index``: for beam search."""
        return dataclasses.replace(self, history=reordered(self.history, index))


class ShortConv(nn.Module):
    """A causal convolution of every channel with a few taps: ``nn.Conv1d(groups=channels)`` with padding on the left.

    ``y[c, t] = bias[c] + sum_j weight[c, 0, j] x[c, t - (kernel_size - 1) + j]``, inputs before the beginning being 0;
    the output is as long as the input. Parameters, their initialisation and autocast are those of
    ``nn.Conv1d(channels, channels, kernel_size, groups=channels)``: its state dict loads.

    Args:
        channels: of input and output.
        kernel_size: number of taps.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1.

    Shape:
        (*batch, channels, length) to the same.

    Example:
        >>> import torch, structmat
        >>> conv = structmat.nn.ShortConv(64, 3)
        >>> x = torch.randn(2, 64, 10)
        >>> y, state = conv.prefill(x[..., :9])
        >>> last, state = conv.step(x[..., 9], state)
        >>> torch.allclose(torch.cat([y, last.unsqueeze(-1)], -1), conv(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.kernel_size = check_int("channels", channels), check_int("kernel_size", kernel_size)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from -1 / sqrt(kernel_size) to 1 / sqrt(kernel_size), as ``nn.Conv1d``."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -(self.kernel_size**-0.5), self.kernel_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x, shape (*batch, channels, length)."""
        self._check(x, 2)
        return self._conv(x)

    def prefill(self, x: Tensor, state: ShortConvState | None = None) -> tuple[Tensor, ShortConvState]:
        """The outputs of a first or further piece of the input, and the state behind it.

        The state is part of the graph of what it was made of: gradients flow through it to earlier pieces.

        Args:
            x: shape (*batch, channels, length).
            state: that behind the piece before, None at the beginning. It is not changed.

        Returns:
            Outputs of x's shape, and the state.
        """
        self._check(x, 2)
        before, reach = self._begun(x, state), self.kernel_size - 1
        y = self._conv(x) if state is None else self._conv(torch.cat([before.history, x], -1))[..., reach:]
        recent = torch.cat([before.history, x[..., -reach:] if reach else x[..., :0]], -1)
        # A copy: a view would keep all of it in memory.
        history = recent[..., recent.shape[-1] - reach :].clone()
        return y, ShortConvState(history, before.position + x.shape[-1])

    def step(self, x: Tensor, state: ShortConvState | None = None) -> tuple[Tensor, ShortConvState]:
        """:meth:`prefill` of one input of shape (*batch, channels); the output has this shape too."""
        self._check(x, 1)
        y, state = self.prefill(x.unsqueeze(-1), state)
        return y.squeeze(-1), state

    def _begun(self, x: Tensor, state: ShortConvState | None) -> ShortConvState:
        shape = (*x.shape[:-1], self.kernel_size - 1)
        if state is None:
            return ShortConvState(x.new_zeros(shape), 0)
        if not isinstance(state, ShortConvState):
            raise TypeError(f"state must be a ShortConvState or None, got {type(state).__name__}")
        if state.history.shape != shape or state.history.dtype != x.dtype:
            raise ValueError(
                f"state must have a history of shape {shape} and dtype {x.dtype} for this x, got "
                f"{tuple(state.history.shape)} of {state.history.dtype}"
            )
        return state

    def _check(self, x: Any, sizes: int) -> None:
        check_tensor("x", x, sizes)
        if x.shape[-sizes] != self.channels:
            raise ValueError(f"x must have {self.channels} channels in dimension {-sizes}, got shape {tuple(x.shape)}")

    def _conv(self, x: Tensor) -> Tensor:
        weight, bias, region = self.weight.squeeze(1), self.bias, autocast_dtype(x.device)
        if region is not None:
            x, weight = _cast(x, region), _cast(weight, region)
            bias = None if bias is None else _cast(bias, region)
        return short_conv(x, weight, bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What an autocast region of this dtype does to an operand of ``F.conv1d``."""
    return t.to(dtype) if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t
