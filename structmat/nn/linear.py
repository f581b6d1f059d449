"""A linear layer whose weight is any structured matrix."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from structmat._checks import check_tensor
from structmat.base import StructuredMatrix
from structmat.config import Config, project
from structmat.nn.parameters import MatrixParameters


class StructuredLinear(nn.Module):
    """``y = x W^T + b`` with a structured W; a drop-in for ``nn.Linear``.

    Args:
        value: the weight, shape (out_features, in_features); its factors become the parameters ``weight.*``.
        bias: True for a new bias initialised by fan-in as in ``nn.Linear``, False or None for none, or a tensor of
            shape (out_features,).

    Raises:
        TypeError: if value is not a structured matrix, or bias has another dtype.
        ValueError: if value has batch dimensions, or bias has another shape.

    Shape:
        (*, in_features) to (*, out_features). Inside an autocast region the output has the region's dtype.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.StructuredLinear(structmat.Monarch.random((6, 10), nblocks=2))
        >>> layer(torch.ones(3, 10)).shape, sorted(layer.state_dict())
        (torch.Size([3, 6]), ['bias', 'weight.left', 'weight.right'])
    """

    bias: nn.Parameter | None

    def __init__(self, value: StructuredMatrix, bias: bool | Tensor | None = True) -> None:
        super().__init__()
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"value must be a StructuredMatrix, got {type(value).__name__}")
        if value.ndim != 2:
            raise ValueError(f"value must have no batch dimensions, got shape {tuple(value.shape)}")
        self.out_features, self.in_features = value.shape
        self.weight = MatrixParameters(value)
        if isinstance(bias, Tensor):
            if bias.shape != (self.out_features,):
                raise ValueError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}")
            if bias.dtype != value.dtype:
                raise TypeError(f"bias must have the weight's dtype {value.dtype}, got {bias.dtype}")
            self.bias = nn.Parameter(bias.detach())
        elif bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=value.dtype, device=value.device))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (*, in_features)."""
        return self.weight().linear(x, self.bias)

    @torch.no_grad()
    def _reset_bias(self) -> None:
        if self.bias is None:
            return
        bound = 1 / math.sqrt(self.in_features)
        entries = torch.view_as_real(self.bias) if self.bias.is_complex() else self.bias
        entries.uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Draw new factors and a new bias with ``nn.Linear``'s output variance."""
        self.weight().randomize_()
        self._reset_bias()

    @classmethod
    def _from_parts(cls, value: StructuredMatrix, bias: Tensor | None, like: nn.Module) -> Self:
        """A layer of class ``cls`` around ``value``, with the mode and the trainability of the layer ``like``."""
        layer = cls.__new__(cls)
        StructuredLinear.__init__(layer, value, bias.clone() if bias is not None else None)
        weight = getattr(like, "weight", None)
        if isinstance(weight, Tensor):
            layer.weight.requires_grad_(weight.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(like.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Config | Any) -> StructuredLinear:
        """Project the weight of an ``nn.Linear``; the bias is copied, dtype, device, mode and frozenness are kept.

        Args:
            linear: the layer to approximate.
            config: which structure.

        Raises:
            TypeError: if linear is not an ``nn.Linear``.
            ValueError: if the structure does not exist for its size.
        """
        check_linear(linear)
        return cls._from_parts(project(linear.weight.detach(), config).matrix, linear.bias, linear)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def check_linear(linear: Any) -> None:
    """Raise unless ``linear`` is an ``nn.Linear`` with a plain weight."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    check_tensor("linear.weight", linear.weight, 2)
