"""Fastfood matrices: diagonals between Hadamard matrices."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_inexact, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix
from structmat.matrices._blocks import uniform_
from structmat_kernels.hadamard import hadamard


@matrix
class Fastfood(StructuredMatrix):
    """Blocks ``S H G P H B`` one below the other: S, G, B diagonal, P a permutation, H Hadamard's, made orthogonal.

    q blocks of k x k, k a power of two, of which S has the first m rows and B the first n columns: m + q (k + n)
    parameters and q k integers. A product takes 2 q Hadamard transforms, O(q k log k).
    :func:`structmat.kaleidoscopes.fastfood` makes a square one from factors of another form.

    Args:
        s: S, shape (*batch, m), (q - 1) k < m <= q k; floating point or complex.
        g: the diagonals G, shape (*batch, q, k), same dtype and device.
        b: the diagonals B, shape (*batch, q, n), n <= k, likewise; inputs are padded with zeros to k.
        perm: the permutations, int64 of shape (*batch, q, k), ``(P x)[i] = x[perm[i]]``; that they are is not checked.

    Raises:
        TypeError: if one is not a tensor, or dtypes do not fit.
        ValueError: if shapes or devices do not fit, or k is no power of two.

    Source: Le, Sarlos, Smola 2013, "Fastfood: approximating kernel expansions in loglinear time"; trained: Yang et al.
    2015, "Deep fried convnets".

    Example:
        >>> import torch, structmat
        >>> V = structmat.Fastfood.random((20, 8))
        >>> V.shape, V.num_params, V.matvec(torch.ones(8)).shape
        (torch.Size([20, 8]), 68, torch.Size([20]))
    """

    s: Tensor
    g: Tensor
    b: Tensor
    perm: Tensor

    def __post_init__(self) -> None:
        for name, ndim in (("s", 1), ("g", 2), ("b", 2), ("perm", 2)):
            check_tensor(name, getattr(self, name), ndim)
        check_inexact("s", self.s)
        check_same("g", self.g, "s", self.s)
        check_same("b", self.b, "s", self.s)
        if self.perm.dtype != torch.int64:
            raise TypeError(f"perm must have dtype torch.int64, got {self.perm.dtype}")
        if self.perm.device != self.s.device:
            raise ValueError(f"perm is on {self.perm.device} but s is on {self.s.device}")
        *batch, q, k = self.g.shape
        if k < 1 or k & (k - 1):
            raise ValueError(f"g must have a power of two for its last dimension, got shape {tuple(self.g.shape)}")
        if self.perm.shape != self.g.shape:
            raise ValueError(f"perm must have the shape of g, {tuple(self.g.shape)}, got {tuple(self.perm.shape)}")
        if list(self.s.shape[:-1]) != batch or not (q - 1) * k < self.s.shape[-1] <= q * k:
            raise ValueError(
                f"s must have shape {(*batch, 'm')} with m from {(q - 1) * k + 1} to {q * k}, got {tuple(self.s.shape)}"
            )
        if self.b.shape[:-1] != self.g.shape[:-1] or not 1 <= self.b.shape[-1] <= k:
            raise ValueError(f"b must have shape {(*batch, q, 'n')} with n from 1 to {k}, got {tuple(self.b.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.s.shape, self.b.shape[-1]))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The factors with a dimension for tokens, and the scale of H."""
        g, b, perm = (t.unsqueeze(-3) for t in (self.g, self.b, self.perm))
        return self.s.unsqueeze(-2), g, b, perm, 1 / math.sqrt(g.shape[-1])

    def _linear(self, x: Tensor) -> Tensor:
        s, g, b, perm, scale = self._factors()
        y = hadamard(F.pad(x.unsqueeze(-2) * b, (0, g.shape[-1] - b.shape[-1])), scale=scale)
        y = hadamard(y.gather(-1, perm.expand(y.shape)) * g, scale=scale)
        return y.flatten(-2)[..., : s.shape[-1]] * s

    def _linear_mT(self, x: Tensor) -> Tensor:
        s, g, b, perm, scale = self._factors()
        y = F.pad(x * s, (0, g.shape[-2] * g.shape[-1] - s.shape[-1])).unflatten(-1, g.shape[-2:])
        y = hadamard(y, scale=scale) * g
        y = hadamard(y.gather(-1, perm.argsort(-1).expand(y.shape)), scale=scale)
        return (y[..., : b.shape[-1]] * b).sum(-2)

    @property
    def flops(self) -> int:
        return self.g.numel() * (2 * self.g.shape[-1].bit_length() + 5)

    def _scale(self, scalar: Tensor) -> Self:
        return self._rebuild((scalar * self.s, self.g, self.b, self.perm), ())

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random matrix whose outputs have ``nn.Linear``'s variance, of the fewest blocks of the next power of two.

        Args:
            shape: (*batch, m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        k = 1 << (n - 1).bit_length()
        q = -(-m // k)
        s, g, b = (torch.empty((*batch, *size), dtype=dtype, device=device) for size in ((m,), (q, k), (q, n)))
        return cls(s, g, b, torch.empty_like(g, dtype=torch.int64)).randomize_(generator=generator)

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        if self.s.device.type == "meta":
            return self
        uniform_(self.b, 1.0, generator)
        self.b.copy_(self.b.sgn())  # of a complex dtype, numbers of modulus 1
        normal = torch.empty(self.g.shape, dtype=torch.promote_types(self.g.dtype, torch.float32), device=self.device)
        self.g.copy_(normal.normal_(generator=generator))
        keys = torch.empty(self.g.shape, dtype=torch.float64, device=self.device).uniform_(generator=generator)
        self.perm.copy_(keys.argsort(-1))
        # Rows of H G P H have length |g| / sqrt(k); B and the random g spread it evenly over the columns.
        (m, n), k = self.shape[-2:], self.g.shape[-1]
        length = torch.linalg.vector_norm(self.g.to(normal.dtype), dim=-1, keepdim=True)
        self.s.copy_((std * k / math.sqrt(n) / length).expand(self.g.shape).flatten(-2)[..., :m])
        return self
