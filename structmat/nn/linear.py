"""A linear layer whose weight is any structured matrix."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from structmat._autocast import match_bias
from structmat._checks import check_tensor
from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.nn.parameters import MatrixParameters
from structmat.projecting import project


class StructuredLinear(nn.Module):
    """``y = x W^T + b`` with a structured W; a drop-in for ``nn.Linear``.

    A batch of N matrices is N independent layers, each for its own slice of the input: ``y[..., i, :] =
    x[..., i, :] W_i^T + b_i``, computed in one product.

    Args:
        value: the weight, shape (out_features, in_features) or (N, out_features, in_features); its factors become the
            parameters ``weight.*``.
        bias: True for a new bias initialised by fan-in as in ``nn.Linear``, False or None for none, or a tensor of
            shape (out_features,), of a batch (N, out_features).

    Raises:
        TypeError: if value is not a structured matrix, or bias has another dtype.
        ValueError: if value has more than one batch dimension, or bias has another shape.

    Shape:
        (*, in_features) to (*, out_features); of a batch (*, N, in_features) to (*, N, out_features). Inside an
        autocast region the output has the region's dtype.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.StructuredLinear(structmat.Monarch.random((6, 10), nblocks=2))
        >>> layer(torch.ones(3, 10)).shape, sorted(layer.state_dict())
        (torch.Size([3, 6]), ['bias', 'weight.left', 'weight.right'])
        >>> heads = structmat.nn.StructuredLinear(structmat.Monarch.random((5, 6, 10), nblocks=2))
        >>> heads(torch.ones(3, 5, 10)).shape, heads.bias.shape
        (torch.Size([3, 5, 6]), torch.Size([5, 6]))
    """

    bias: nn.Parameter | None
    #: How many matrices the weight holds, None where it is a single one.
    matrix_batch: int | None = None

    def __init__(self, value: StructuredMatrix, bias: bool | Tensor | None = True) -> None:
        super().__init__()
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"value must be a StructuredMatrix, got {type(value).__name__}")
        if value.ndim > 3 or 0 in value.batch_shape:
            raise ValueError(
                f"value must have at most one batch dimension, of size 1 or more, got shape {tuple(value.shape)}"
            )
        self.out_features, self.in_features = value.shape[-2:]
        self.matrix_batch = value.shape[0] if value.ndim == 3 else None
        self.weight = MatrixParameters(value)
        if isinstance(bias, Tensor):
            if bias.shape != value.shape[:-1]:
                raise ValueError(f"bias must have shape {tuple(value.shape[:-1])}, got {tuple(bias.shape)}")
            if bias.dtype != value.dtype:
                raise TypeError(f"bias must have the weight's dtype {value.dtype}, got {bias.dtype}")
            self.bias = nn.Parameter(bias.detach())
        elif bias:
            self.bias = nn.Parameter(torch.empty(value.shape[:-1], dtype=value.dtype, device=value.device))
            self._reset_bias()
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (*, in_features), of a batch of N matrices (*, N, in_features)."""
        weight = self.weight()
        if self.matrix_batch is None:
            return weight.linear(x, self.bias)
        check_tensor("x", x, 2)
        sizes = (self.matrix_batch, self.in_features)
        if x.shape[-2:] != sizes:
            raise ValueError(f"x must have shape (*, {sizes[0]}, {sizes[1]}), got {tuple(x.shape)}")
        rows = x.reshape(-1, *sizes).transpose(0, 1)
        y = weight.linear(rows).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + match_bias(self.bias, y)

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
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.matrix_batch is None else f"{text}, matrix_batch={self.matrix_batch}"


def check_linear(linear: Any) -> None:
    """Raise unless ``linear`` is an ``nn.Linear`` with a plain weight."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    check_tensor("linear.weight", linear.weight, 2)
