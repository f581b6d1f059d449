"""Linear layers with Fastfood weights."""

from __future__ import annotations

from typing import Any

import torch

from structmat._checks import check_int
from structmat.matrices.fastfood import Fastfood
from structmat.nn.linear import StructuredLinear


class FastfoodLinear(StructuredLinear):
    """A linear layer with a weight ``S H G P H B`` whose diagonals are learned; see :class:`structmat.Fastfood`.

    Args:
        in_features: size of the last dimension of the input, a power of two unless ``pad``.
        out_features: size of the last dimension of the output, any: so many blocks as it takes, the last one cropped.
        bias: whether there is a bias.
        pad: whether inputs may be padded with zeros to the next power of two.
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, or in_features is no power of two and ``pad`` is False.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.FastfoodLinear(64, 100)
        >>> layer(torch.ones(2, 64)).shape, layer.weight().num_params, 64 * 100
        (torch.Size([2, 100]), 356, 6400)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        matrix_batch: int | None = None,
    ) -> None:
        batch = () if matrix_batch is None else (check_int("matrix_batch", matrix_batch),)
        m, n = check_int("out_features", out_features), check_int("in_features", in_features)
        if n & (n - 1) and not pad:
            raise ValueError(
                f"in_features must be a power of two, got {n}; pad=True pads inputs with zeros to {1 << n.bit_length()}"
            )
        super().__init__(Fastfood.random((*batch, m, n), device=device, dtype=dtype), bias)
