"""Linear layers with butterfly weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

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
        init: "random" for the output variance of ``nn.Linear``; "orthogonal" for a weight with orthonormal columns
            (of fewer outputs than inputs: rows), of random orthogonal blocks, which does not stay one in training;
            "identity" for a square weight that starts as the identity, whose biases start random all the same.
        matrix_batch: N for N independent butterflies, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Raises:
        ValueError: if the structure does not exist for the sizes, or the initial value not for the structure.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.ButterflyLinear(1000, 1000)
        >>> layer(torch.ones(2, 1000)).shape, layer.weight().num_params
        (torch.Size([2, 1000]), 21000)
        >>> heads = structmat.nn.ButterflyLinear(64, 16, matrix_batch=8)
        >>> heads(torch.ones(2, 8, 64)).shape
        torch.Size([2, 8, 16])
    """

    init = "random"  # of layers that are not made by the constructor

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
        init: str = "random",
        matrix_batch: int | None = None,
    ) -> None:
        shape = check_int("out_features", out_features), check_int("in_features", in_features)
        batch = () if matrix_batch is None else (check_int("matrix_batch", matrix_batch),)
        value = Butterfly.random((*batch, *shape), radices, pad, nblocks, increasing_stride, device=device, dtype=dtype)
        _initialise(value, init)
        super().__init__(value, bias)
        self.init = init

    def reset_parameters(self) -> None:
        """Draw new factors and a new bias, as the constructor's ``init`` says."""
        value: Any = self.weight()
        _initialise(value.randomize_(), self.init)
        self._reset_bias()


@torch.no_grad()
def _initialise(value: Butterfly, init: str) -> None:
    """Fill the factors of a random butterfly with what ``init`` names."""
    if init == "random":
        return
    if init not in ("orthogonal", "identity"):
        raise ValueError(f'init must be "random", "orthogonal" or "identity", got {init!r}')
    full = Butterfly(value.factors).shape[-2:]
    cropped = (value.nrows, value.ncols) != tuple(full)
    if init == "identity":
        if any(p.b != p.c for p in value.patterns) or value.nrows != value.ncols:
            raise ValueError(
                f'init="identity" needs a square matrix of square blocks, got {value.nrows} x {value.ncols} by blocks '
                f"{[(p.b, p.c) for p in value.patterns]}"
            )
    # Products of matrices with orthonormal columns have them; so it is for rows, but not for a mixture of both.
    elif cropped or not (all(p.b >= p.c for p in value.patterns) or all(p.b <= p.c for p in value.patterns)):
        raise ValueError(
            'init="orthogonal" needs blocks that are all square or all higher than wide or all wider than high, and '
            f"no padding, got {value.nrows} x {value.ncols} of {full[0]} x {full[1]} by blocks "
            f"{[(p.b, p.c) for p in value.patterns]}; OrthogonalButterflyLinear takes any size"
        )
    for factor in value.factors:
        blocks = factor.values.movedim(-1, -3)
        blocks.copy_(_orthogonal(blocks) if init == "orthogonal" else torch.eye(blocks.shape[-1]).to(blocks))


def _orthogonal(blocks: Tensor) -> Tensor:
    """Random blocks of the shape of ``blocks`` with orthonormal columns or rows, of the uniform distribution."""
    high = blocks if blocks.shape[-2] >= blocks.shape[-1] else blocks.mT
    half = blocks.dtype in (torch.float16, torch.bfloat16)
    normal = torch.randn(high.shape, dtype=torch.float32 if half else blocks.dtype, device=blocks.device)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return (q if high is blocks else q.mT).to(blocks.dtype)


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
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

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
        matrix_batch: int | None = None,
    ) -> None:
        shape = check_int("out_features", out_features), check_int("in_features", in_features)
        batch = () if matrix_batch is None else (check_int("matrix_batch", matrix_batch),)
        super().__init__(OrthogonalButterfly.random((*batch, *shape), radices, device=device, dtype=dtype), bias)

    def reset_parameters(self) -> None:
        """Draw a new orthogonal matrix, and a new bias as ``nn.Linear`` does."""
        value: Any = self.weight()
        value.redraw_()
        self._reset_bias()
