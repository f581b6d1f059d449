"""Linear layers with butterfly weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from structmat._checks import check_int
from structmat.matrices import Butterfly, OrthogonalButterfly
from structmat.nn.linear import StructuredLinear


class ButterflyLinear(StructuredLinear):
    """A linear layer with a butterfly weight; see :class:`structmat.Butterfly`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        nblocks: how many butterflies to multiply, with strides that grow and shrink in turns.
        radices: block sizes of the factors of the first butterfly, from left to right; by default the sizes' prime
            factors, which need no padding.
        pad: take the next powers of two for both sizes instead.
        increasing_stride: whether strides grow in order of application.
        device: where the parameters are made.
        dtype: their dtype; may be complex.

    Raises:
        ValueError: if the structure does not exist for the sizes.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.ButterflyLinear(1000, 1000)
        >>> layer(torch.ones(2, 1000)).shape, layer.weight().num_params
        (torch.Size([2, 1000]), 21000)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        nblocks: int = 1,
        radices: Iterable[int | tuple[int, int]] | None = None,
        pad: bool = False,
        increasing_stride: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = check_int("out_features", out_features), check_int("in_features", in_features)
        value = Butterfly.random(shape, radices, pad, nblocks, increasing_stride, device=device, dtype=dtype)
        super().__init__(value, bias)


class OrthogonalButterflyLinear(StructuredLinear):
    """A linear layer whose weight is an orthogonal butterfly matrix and stays one, whatever the optimiser does.

    Of a complex dtype it is unitary; of different sizes its rows or columns are orthonormal. See
    :class:`structmat.OrthogonalButterfly`. Inputs from N(0, 1) give outputs of the same standard deviation (where there
    are more outputs than inputs, less), not of that of ``nn.Linear``.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        radices: block sizes of the factors of the square matrix of the larger size.
        device: where the parameters are made.
        dtype: their dtype.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.OrthogonalButterflyLinear(30, 30, bias=False)
        >>> x = torch.ones(30)
        >>> torch.allclose(layer(x).norm(), x.norm())
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        radices: Iterable[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = check_int("out_features", out_features), check_int("in_features", in_features)
        super().__init__(OrthogonalButterfly.random(shape, radices, device=device, dtype=dtype), bias)

    def reset_parameters(self) -> None:
        """Draw a new orthogonal matrix, and a new bias as ``nn.Linear`` does."""
        value: Any = self.weight()
        value.redraw_()
        self._reset_bias()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: no weight decay on the factors of structured weights, nor on vectors.

    Decay of factors is not decay of their product; butterflies are trained without (Dao et al. 2019).

    Args:
        model: its trainable parameters are sorted.
        weight_decay: of the other ones.

    Example:
        >>> import torch, structmat
        >>> model = torch.nn.Sequential(structmat.nn.ButterflyLinear(8, 8), torch.nn.Linear(8, 2))
        >>> groups = structmat.nn.parameter_groups(model, 0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.1), (5, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    structured = {id(p) for m in model.modules() if isinstance(m, StructuredLinear) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trainable if p.ndim > 1 and id(p) not in structured]
    kept = {id(p) for p in decays}
    others = [p for p in trainable if id(p) not in kept]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
