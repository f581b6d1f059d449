"""Permutation matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from structmat._checks import check_matrix_shape, check_tensor
from structmat.base import StructuredMatrix, matrix, static
from structmat.matrices.dense import Dense


def _check_permutation(perm: Tensor) -> None:
    # Tracing and the meta device have no values to look at.
    if torch.compiler.is_compiling() or perm.device.type == "meta":
        return
    if not torch.equal(perm.sort(-1).values, torch.arange(perm.shape[-1], device=perm.device).expand_as(perm)):
        raise ValueError(f"perm must hold every index from 0 to {perm.shape[-1] - 1} once in its last dimension")


def _gather(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take entries along dimension -1 or -2 by an index of size 1 in the other one; batches broadcast."""
    batch = torch.broadcast_shapes(values.shape[:-2], index.shape[:-2])
    sizes = (index.shape[-2], values.shape[-1]) if dim == -2 else (values.shape[-2], index.shape[-1])
    return values.expand(*batch, *values.shape[-2:]).gather(dim, index.expand(*batch, *sizes))


@matrix
class Permutation(StructuredMatrix):
    """The permutation matrix P with ``(P x)[i] = x[perm[i]]``; no parameters, no arithmetic.

    The inverse is the transpose. A permutation has no values of its own, so ``dtype`` says what it multiplies;
    convert it with ``.to(dtype)``.

    Args:
        perm: integer tensor of shape (*batch, n) that holds 0, ..., n - 1 once each; checked.
        dtype: the floating-point or complex dtype, by default torch's default.

    Raises:
        TypeError: if perm is not an int64 tensor or dtype is an integer type.
        ValueError: if perm is not a permutation.

    Example:
        >>> import torch, structmat
        >>> P = structmat.Permutation(torch.tensor([2, 0, 1]))
        >>> P @ torch.tensor([10.0, 20.0, 30.0])
        tensor([30., 10., 20.])
    """

    perm: Tensor
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_tensor("perm", self.perm, 1)
        if self.perm.dtype != torch.int64:
            raise TypeError(f"perm must have dtype torch.int64, got {self.perm.dtype}")
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.get_default_dtype())
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise TypeError(f"dtype must be floating point or complex, got {self.dtype}")
        _check_permutation(self.perm)

    def _like(self, perm: Tensor) -> Permutation:
        # Valid by construction: rebuilding skips the check, which would wait for the device.
        return self._rebuild((perm,), (self.dtype,))

    def _to(self, device: Any, dtype: torch.dtype | None) -> Self:
        moved = super()._to(device, dtype)
        return self._rebuild((moved.perm,), (self.dtype if dtype is None else dtype,))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.perm.shape, self.perm.shape[-1]))

    def _linear(self, x: Tensor) -> Tensor:
        if self.perm.ndim == 1:
            return x.index_select(-1, self.perm)
        return _gather(x, self.perm.unsqueeze(-2), -1)

    @property
    def mT(self) -> Permutation:
        return self._like(self.perm.argsort(-1))

    @property
    def flops(self) -> int:
        return 0

    @property
    def _solve_flops(self) -> int:
        return 0

    def inverse(self) -> Permutation:
        return self.mT

    def _solve(self, b: Tensor) -> Tensor:
        return self.mT._linear(b.mT).mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        # The sign is the parity of n minus the number of cycles; every cycle elects its smallest index by doubling.
        n = self.shape[-1]
        index = torch.arange(n, device=self.device)
        label, jump = index.expand_as(self.perm), self.perm
        for _ in range(max(1, math.ceil(math.log2(max(n, 2))))):
            label = torch.minimum(label, label.gather(-1, jump))
            jump = jump.gather(-1, jump)
        odd = (n - (label == index).sum(-1)) % 2
        return (1 - 2 * odd).to(self.dtype), torch.zeros(odd.shape, dtype=self.dtype.to_real(), device=self.device)

    def conj(self) -> Self:
        return self

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Permutation):
            return self._like(_gather(other.perm.unsqueeze(-1), self.perm.unsqueeze(-1), -2).squeeze(-1))
        if isinstance(other, Dense):
            return Dense(_gather(other.weight, self.perm.unsqueeze(-1), -2))
        return None

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return Dense(self.mT._linear(other.weight)) if isinstance(other, Dense) else None

    def to_dense(self) -> Tensor:
        columns = torch.arange(self.shape[-1], device=self.device)
        return (self.perm.unsqueeze(-1) == columns).to(self.dtype)

    def diagonal(self) -> Tensor:
        return (self.perm == torch.arange(self.shape[-1], device=self.device)).to(self.dtype)

    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """The permutation nearest to W in Frobenius norm, by the linear assignment problem (O(n^3), on the CPU).

        Args:
            W: shape (*batch, n, n), floating point or complex.

        Raises:
            ValueError: if W is not square.
        """
        from scipy.optimize import linear_sum_assignment

        check_tensor("W", W, 2)
        if W.shape[-1] != W.shape[-2]:
            raise ValueError(f"W must be square for a permutation, got shape {tuple(W.shape)}")
        gains = W.detach().resolve_conj().real if W.is_complex() else W.detach()
        gains = gains.to("cpu", torch.float64).numpy().reshape(-1, *W.shape[-2:])
        perms = np.stack([linear_sum_assignment(g, maximize=True)[1] for g in gains]) if len(gains) else gains[..., 0]
        perm = torch.as_tensor(perms.astype(np.int64), device=W.device).reshape(W.shape[:-1])
        return cls(perm, W.dtype)

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A uniformly random permutation; its outputs have the variance of its inputs.

        Args:
            shape: (*batch, n, n).
            generator: source of randomness.
            dtype: what the permutation multiplies, the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if the shape is not square.
        """
        batch, m, n = check_matrix_shape(shape)
        if m != n:
            raise ValueError(f"shape must be square for a permutation, got {tuple(shape)}")
        keys = torch.rand((*batch, n), generator=generator, device=device, dtype=torch.float64)
        return cls(keys.argsort(-1), dtype or torch.get_default_dtype())
