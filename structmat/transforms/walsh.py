"""The Walsh-Hadamard transform."""

from __future__ import annotations

from typing import Any

import torch

from structmat.base import StructuredMatrix
from structmat.lazy import compose
from structmat.matrices.permutation import Permutation
from structmat.transforms._build import butterfly, choice, norm_scale, real_dtype, reversed_digits
from structmat.transforms.permutations import power_of_two, sequency


def hadamard(
    n: int,
    norm: str | None = None,
    order: str = "natural",
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> StructuredMatrix:
    """The Walsh-Hadamard transform, Sylvester's matrix as ``scipy.linalg.hadamard``: entries +1 and -1.

    A dyadic :class:`Butterfly` of log2 n factors with 2 n numbers each, exact in every dtype.

    Args:
        n: a power of two.
        norm: None or "backward" for no scaling, "forward" for 1/n, "ortho" for 1/sqrt(n): orthogonal, its own inverse.
        order: of the rows: "natural" (Hadamard's), "dyadic" (Paley's: bit-reversed), or "sequency" (Walsh's: by the
            number of sign changes); all three are symmetric matrices.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`Butterfly` of shape (n, n), after a Permutation for the other orders.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is no power of two, or norm or order is unknown.

    Example:
        >>> from structmat.transforms import hadamard
        >>> hadamard(4, order="sequency").to_dense()
        tensor([[ 1.,  1.,  1.,  1.],
                [ 1.,  1., -1., -1.],
                [ 1., -1., -1.,  1.],
                [ 1., -1.,  1., -1.]])
    """
    levels = power_of_two("n", n)
    choice("order", order, ("natural", "dyadic", "sequency"))
    dtype = real_dtype(dtype)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[..., None]
    factors = [block.expand(1 << l, 2, 2, n >> (l + 1)) for l in range(levels)]
    factors = factors or [torch.ones(1, 1, 1, 1, dtype=torch.float64)]
    factors[0] = factors[0] * norm_scale(norm, n)
    H = butterfly(factors, dtype, device, real=False)
    if order == "natural" or n < 4:
        return H
    rows = sequency(n) if order == "sequency" else reversed_digits([2] * levels)
    return compose(Permutation(rows.to(H.device), dtype), H)
