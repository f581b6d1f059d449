"""A linear layer with a kaleidoscope weight."""

from __future__ import annotations

from typing import Any

import torch

from structmat._checks import check_int
from structmat.matrices import Kaleidoscope
from structmat.nn.linear import StructuredLinear


class KaleidoscopeLinear(StructuredLinear):
    """A linear layer with a kaleidoscope weight; see :class:`structmat.Kaleidoscope`.

    Its factors are orthogonal at the start (of a complex dtype: unitary), so that every draw has the output variance of
    ``nn.Linear``, whatever the width. An exact member as the start: ``StructuredLinear(kaleidoscopes.permutation(p))``.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        width: number of products B B'^*.
        expansion: how many times as large as the larger number of features the factors are; they are padded to the next
            size without prime factors above 7.
        device: where the parameters are made.
        dtype: their dtype; may be complex.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if it is not positive.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.KaleidoscopeLinear(1000, 1000)
        >>> layer(torch.ones(2, 1000)).shape, layer.weight().num_params
        (torch.Size([2, 1000]), 42000)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        width: int = 1,
        expansion: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = check_int("out_features", out_features), check_int("in_features", in_features)
        super().__init__(Kaleidoscope.random(shape, width, expansion, device=device, dtype=dtype), bias)
