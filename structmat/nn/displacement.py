"""Linear layers whose weights have low displacement rank."""

from __future__ import annotations

from typing import Any

import torch

from structmat._checks import check_int
from structmat.base import LINEAR_STD, StructuredMatrix
from structmat.lazy import Product
from structmat.matrices import (
    CauchyLike,
    Circulant,
    HankelLike,
    LDRSubdiagonal,
    LDRTridiagonal,
    Toeplitz,
    ToeplitzLike,
    VandermondeLike,
)
from structmat.nn.linear import StructuredLinear
from structmat.transforms.selection import Selection

_KINDS: dict[str, Any] = {
    "subdiagonal": LDRSubdiagonal,
    "tridiagonal": LDRTridiagonal,
    "toeplitz": ToeplitzLike,
    "hankel": HankelLike,
    "vandermonde": VandermondeLike,
    "cauchy": CauchyLike,
}


def _shape(in_features: Any, out_features: Any, matrix_batch: Any = None) -> tuple[int, ...]:
    batch = () if matrix_batch is None else (check_int("matrix_batch", matrix_batch),)
    return (*batch, check_int("out_features", out_features), check_int("in_features", in_features))


def random_ldr(
    shape: tuple[int, ...], kind: str, rank: int, corner: bool | None, device: Any, dtype: torch.dtype | None
) -> StructuredMatrix:
    """A random matrix of one of the kinds of :class:`LDRLinear`."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    options: dict[str, Any] = {}
    if kind in ("subdiagonal", "tridiagonal"):
        options["corner"] = True if corner is None else corner
    elif corner is not None:
        raise ValueError(f'corner is for the kinds "subdiagonal" and "tridiagonal" only, got {corner} for {kind!r}')
    return _KINDS[kind].random(shape, rank, **options, device=device, dtype=dtype)


def copy_nodes_(value: Any, kind: str, rank: int) -> None:
    """Put the nodes of a Vandermonde- or Cauchy-like matrix where they start: its own reset leaves them."""
    if kind not in ("vandermonde", "cauchy"):
        return
    start: Any = _KINDS[kind].random(value.shape, rank, device=value.device, dtype=value.dtype)
    with torch.no_grad():
        for name in ("A", "B"):
            for t, fresh in zip(getattr(value, name).tensors(), getattr(start, name).tensors(), strict=True):
                t.copy_(fresh)


class LDRLinear(StructuredLinear):
    """A linear layer whose weight has low displacement rank, under operators that are learned or fixed.

    ===============  ==================================  ======================================
    kind             weight                              learned, of m outputs and n inputs
    ===============  ==================================  ======================================
    "subdiagonal"    :class:`structmat.LDRSubdiagonal`   generators, 1 diagonal of each operator
    "tridiagonal"    :class:`structmat.LDRTridiagonal`   generators, 3 diagonals of each operator
    "toeplitz"       :class:`structmat.ToeplitzLike`     generators: r (m + n) numbers
    "hankel"         :class:`structmat.HankelLike`       generators
    "vandermonde"    :class:`structmat.VandermondeLike`  generators, m nodes
    "cauchy"         :class:`structmat.CauchyLike`       generators, m + n nodes
    ===============  ==================================  ======================================

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        kind: which operators.
        rank: r, the number of columns of the generators.
        corner: of the learned operators, whether they have corners; True if None.
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, kind is unknown, or corner given for operators without.

    Source: Thomas, Gu, Dao, Rudra, Re 2018, "Learning compressed transforms with low displacement rank".

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.LDRLinear(96, 64, kind="subdiagonal", rank=2)
        >>> layer(torch.ones(3, 96)).shape, layer.weight().num_params, 96 * 64
        (torch.Size([3, 64]), 480, 6144)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        kind: str = "subdiagonal",
        rank: int = 2,
        corner: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        matrix_batch: int | None = None,
    ) -> None:
        shape = _shape(in_features, out_features, matrix_batch)
        super().__init__(random_ldr(shape, kind, rank, corner, device, dtype), bias)
        self.kind, self.rank = kind, rank

    def reset_parameters(self) -> None:
        """Draw new factors and a new bias with ``nn.Linear``'s output variance, as in the constructor."""
        copy_nodes_(self.weight(), self.kind, self.rank)
        super().reset_parameters()


class ToeplitzLikeLinear(StructuredLinear):
    """A linear layer with a Toeplitz-like weight; see :class:`structmat.ToeplitzLike`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        rank: the displacement rank.
        e: corner of the left shift, as of :class:`structmat.ToeplitzLike`; not learned.
        f: corner of the right shift.
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Raises:
        TypeError: if a size is not an integer, or a corner complex and the dtype not.
        ValueError: if a size is out of range, or the shifts have a common eigenvalue.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.ToeplitzLikeLinear(96, 64, rank=4)
        >>> layer(torch.ones(3, 96)).shape, layer.weight().num_params, 96 * 64
        (torch.Size([3, 64]), 640, 6144)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 2,
        e: float | complex | None = None,
        f: float | complex | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        matrix_batch: int | None = None,
    ) -> None:
        shape = _shape(in_features, out_features, matrix_batch)
        super().__init__(ToeplitzLike.random(shape, rank, e, f, device=device, dtype=dtype), bias)


class ToeplitzLinear(StructuredLinear):
    """A linear layer with a Toeplitz weight; see :class:`structmat.Toeplitz`. m + n - 1 numbers.

    Args:
        in_features: n, size of the last dimension of the input.
        out_features: m, size of the last dimension of the output.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.ToeplitzLinear(96, 64)
        >>> layer(torch.ones(3, 96)).shape, layer.weight().num_params
        (torch.Size([3, 64]), 159)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        matrix_batch: int | None = None,
    ) -> None:
        shape = _shape(in_features, out_features, matrix_batch)
        super().__init__(Toeplitz.random(shape, device=device, dtype=dtype), bias)


class CirculantLinear(StructuredLinear):
    """A linear layer with a circulant weight; see :class:`structmat.Circulant`.

    Of different sizes the weight is the first rows or columns of a circulant matrix of the larger size, which the
    :class:`structmat.Product` with a :class:`structmat.transforms.Selection` says: max(in, out) numbers.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: their dtype; may be complex.
        matrix_batch: N for N independent matrices, from inputs (*, N, in_features) to outputs (*, N, out_features).

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.CirculantLinear(4, 3, bias=False)
        >>> layer(torch.eye(4)).shape, sorted(layer.state_dict())
        (torch.Size([4, 3]), ['weight.factors.0.index', 'weight.factors.1.column'])
        >>> W = layer.weight().to_dense()
        >>> bool(W[0, 0] == W[1, 1] and W[0, 3] == W[1, 0])
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        matrix_batch: int | None = None,
    ) -> None:
        *batch, m, n = _shape(in_features, out_features, matrix_batch)
        size = max(m, n)
        C = Circulant.random((*batch, size, size), device=device, dtype=dtype)
        value: StructuredMatrix = C
        if m < size:
            value = Product((Selection(torch.arange(m, device=C.device), size, C.dtype), C))
        elif n < size:
            value = Product((C, Selection(torch.arange(size, device=C.device).clamp(max=n), n, C.dtype)))
        super().__init__(value, bias)
        self._scale_column()

    def _scale_column(self) -> None:
        # Rows are shorter than the column where there are more outputs.
        std = LINEAR_STD * (max(self.in_features, self.out_features) / self.in_features) ** 0.5
        value: Any = self.weight()
        for factor in value.factors if isinstance(value, Product) else (value,):
            if isinstance(factor, Circulant):
                with torch.no_grad():
                    factor.randomize_(std)
            elif isinstance(factor, Selection):
                factor.index.copy_(torch.arange(len(factor.index), device=factor.device).clamp(max=factor.shape[-1]))

    def reset_parameters(self) -> None:
        """Draw a new column and a new bias with ``nn.Linear``'s output variance."""
        self._scale_column()
        self._reset_bias()
