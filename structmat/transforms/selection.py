"""Partial permutations: what pads with zeros, reorders and crops in one pass."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_int, check_tensor
from structmat.base import StructuredMatrix, matrix, static


def _check_partial(index: Tensor, ncols: int) -> None:
    # Tracing and the meta device have no values to look at.
    if torch.compiler.is_compiling() or index.device.type == "meta":
        return
    taken = index[index < ncols]
    if bool((index < 0).any()) or bool((index > ncols).any()) or len(taken.unique()) != len(taken):
        raise ValueError(f"index must hold numbers from 0 to ncols = {ncols}, those below ncols at most once each")


@matrix
class Selection(StructuredMatrix):
    """The partial permutation matrix S with ``(S x)[i] = x[index[i]]``, or 0 where ``index[i] = ncols``.

    At most one 1 a row and a column: it pads with zeros, reorders and crops. No parameters, no arithmetic; closed under
    transposition. It has no values of its own, so ``dtype`` says what it multiplies; convert it with ``.to(dtype)``.

    Args:
        index: int64 tensor of shape (m,); every number below ncols at most once, ncols for a row of zeros.
        ncols: number of columns.
        dtype: the floating-point or complex dtype, by default torch's default.

    Raises:
        TypeError: if index is not an int64 tensor, ncols no integer, or dtype an integer type.
        ValueError: if index is not one-dimensional, or not a partial permutation.

    Example:
        >>> import torch
        >>> from structmat.transforms import Selection
        >>> S = Selection(torch.tensor([1, 2, 0]), 2)
        >>> S @ torch.tensor([10.0, 20.0]), S.mT @ torch.tensor([1.0, 2.0, 3.0])
        (tensor([20.,  0., 10.]), tensor([3., 1.]))
    """

    index: Tensor
    ncols: int = static()
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_tensor("index", self.index, 1)
        check_int("ncols", self.ncols)
        if self.index.dtype != torch.int64:
            raise TypeError(f"index must have dtype torch.int64, got {self.index.dtype}")
        if self.index.ndim != 1:
            raise ValueError(f"index must have shape (m,), got {tuple(self.index.shape)}")
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.get_default_dtype())
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise TypeError(f"dtype must be floating point or complex, got {self.dtype}")
        _check_partial(self.index, self.ncols)

    def _to(self, device: Any, dtype: torch.dtype | None) -> Self:
        moved = super()._to(device, dtype)
        return self._rebuild((moved.index,), (self.ncols, self.dtype if dtype is None else dtype))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.index.shape, self.ncols))

    def _linear(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1)).index_select(-1, self.index)

    @property
    def mT(self) -> Selection:
        m = self.index.shape[-1]
        empty = torch.full_like(self.index, m, memory_format=torch.contiguous_format)[..., :1]
        rows = torch.arange(m, device=self.device)
        inverse = empty.repeat(self.ncols + 1).scatter(0, self.index, rows)[: self.ncols]
        return self._rebuild((inverse,), (m, self.dtype))

    @property
    def flops(self) -> int:
        return 0

    def conj(self) -> Self:
        return self

    def to_dense(self) -> Tensor:
        columns = torch.arange(self.ncols, device=self.device)
        return (self.index.unsqueeze(-1) == columns).to(self.dtype)
