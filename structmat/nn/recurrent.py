"""Recurrent cells with structured weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structmat._autocast import match_bias
from structmat._checks import check_int, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix
from structmat.config import Config
from structmat.matrices import Dense
from structmat.matrices._blocks import uniform_
from structmat.nn.parameters import MatrixParameters


class StructuredLSTMCell(nn.Module):
    """An LSTM cell with structured weights, called as ``nn.LSTMCell``.

    Each of the four gates (input, forget, cell, output, in this order) has a matrix of its own; the four are a batch.
    With dense matrices it computes what ``nn.LSTMCell`` does, whose ``weight_hh`` is ``hidden_to_hidden().to_dense()``
    with its first two dimensions flattened.

    Args:
        input_size: features of the input.
        hidden_size: features of the states.
        bias: whether there are the two biases, of 4 hidden_size numbers each.
        hidden_to_hidden: how the weights are made: a function such as
            ``functools.partial(LDRSubdiagonal.random, rank=2)``, called as ``make(shape, device=, dtype=)`` with shape
            (4, hidden_size, hidden_size); or a config; dense if None.
        input_to_hidden: likewise, of shape (4, hidden_size, input_size).
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        TypeError: if a size is not an integer, or what makes a weight returns no structured matrix.
        ValueError: if a size is out of range, or a weight has another shape.

    Shape:
        x (N, input_size) and a state (h, c) of (N, hidden_size) each, zeros if None, to the next (h, c); all also
        without N. Inside an autocast region the outputs have the region's dtype.

    Source: Thomas, Gu, Dao, Rudra, Re 2018, "Learning compressed transforms with low displacement rank", 5.2.

    Example:
        >>> import functools, torch, structmat
        >>> make = functools.partial(structmat.LDRSubdiagonal.random, rank=2)
        >>> cell = structmat.nn.StructuredLSTMCell(10, 64, hidden_to_hidden=make)
        >>> h, c = cell(torch.ones(3, 10))
        >>> h.shape, cell.hidden_to_hidden().num_params, 4 * 64 * 64
        (torch.Size([3, 64]), 1536, 16384)
    """

    input_to_hidden: MatrixParameters
    hidden_to_hidden: MatrixParameters
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        hidden_to_hidden: Config | Callable[..., StructuredMatrix] | None = None,
        input_to_hidden: Config | Callable[..., StructuredMatrix] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_int("input_size", input_size)
        self.hidden_size = check_int("hidden_size", hidden_size)
        for name, make, size in (
            ("input_to_hidden", input_to_hidden, self.input_size),
            ("hidden_to_hidden", hidden_to_hidden, self.hidden_size),
        ):
            shape = (4, self.hidden_size, size)
            build: Any = Dense.random if make is None else getattr(make, "random", make)
            if not callable(build):
                raise TypeError(f"{name} must be a function or a config, got {type(make).__name__}")
            value = build(shape, device=device, dtype=dtype)
            if not isinstance(value, StructuredMatrix):
                raise TypeError(f"{name} must make a StructuredMatrix, got {type(value).__name__}")
            if value.shape != shape:
                raise ValueError(f"{name} must make a matrix of shape {shape}, got {tuple(value.shape)}")
            setattr(self, name, MatrixParameters(value))
        for name in ("bias_ih", "bias_hh"):
            entries = torch.empty(4 * self.hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(entries) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new factors and biases with the variance of ``nn.LSTMCell``'s products."""
        # It draws all entries from -1 / sqrt(hidden_size) to 1 / sqrt(hidden_size).
        for weights, size in ((self.input_to_hidden, self.input_size), (self.hidden_to_hidden, self.hidden_size)):
            with torch.no_grad():
                weights().randomize_(LINEAR_STD * math.sqrt(size / self.hidden_size))
        for bias in (self.bias_ih, self.bias_hh):
            if bias is not None:
                uniform_(bias.detach(), LINEAR_STD / math.sqrt(self.hidden_size))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next hidden state and cell state."""
        check_tensor("x", x, 1)
        if x.ndim > 2 or x.shape[-1] != self.input_size:
            raise ValueError(f"x must have shape (N, {self.input_size}) or ({self.input_size},), got {tuple(x.shape)}")
        rows = x if x.ndim == 2 else x.unsqueeze(0)
        shape = (len(rows), self.hidden_size)
        if state is None:
            h = c = rows.new_zeros(shape)
        else:
            for name, s in zip(("h", "c"), state, strict=True):
                check_tensor(name, s, 1)
                if s.shape != shape[2 - x.ndim :]:
                    raise ValueError(f"{name} must have shape {shape[2 - x.ndim :]}, got {tuple(s.shape)}")
            h, c = (s if x.ndim == 2 else s.unsqueeze(0) for s in state)
        gates = self.input_to_hidden().linear(rows) + self.hidden_to_hidden().linear(h)
        for bias in (self.bias_ih, self.bias_hh):
            if bias is not None:
                gates = gates + match_bias(bias, gates).view(4, 1, -1)
        i, f, g, o = gates.unbind(0)
        c = f.sigmoid() * match_bias(c, gates) + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c) if x.ndim == 2 else (h.squeeze(0), c.squeeze(0))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias_ih is not None}"
