"""Companion matrices, the operators of polynomials modulo a polynomial."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._convolution import LinAlgError, values_visible


@matrix
class Companion(StructuredMatrix):
    """The companion matrix of the polynomial ``z^n + c_{n-1} z^{n-1} + ... + c_0``, or its transpose; n parameters.

    ``(C x)[0] = -c_0 x[n - 1]`` and ``(C x)[i] = x[i - 1] - c_i x[n - 1]``: ones below the diagonal and -c in the last
    column, the product with z of polynomials modulo that one. Its eigenvalues are the polynomial's roots. With c = (-f,
    0, ..., 0) it is the :class:`~structmat.Shift` Z_f. O(n) operations a product or a solve.

    Args:
        coefficients: c, shape (*batch, n), floating point or complex.
        transposed: the transpose instead, as ``numpy.roots`` has it with both orders reversed.

    Raises:
        TypeError: if coefficients is not a floating-point or complex tensor.
        ValueError: if it has no entries.
        torch.linalg.LinAlgError: on a solve, if c_0 is 0 (seen on the CPU; elsewhere the result is not finite).

    Example:
        >>> import torch, structmat
        >>> C = structmat.Companion(torch.tensor([-6.0, 11.0, -6.0]))  # (z - 1) (z - 2) (z - 3)
        >>> torch.linalg.eigvals(C.to_dense()).real.sort().values.round(decimals=3)
        tensor([1., 2., 3.])
    """

    coefficients: Tensor
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        check_tensor("coefficients", self.coefficients, 1)
        check_inexact("coefficients", self.coefficients)
        if self.coefficients.shape[-1] == 0:
            raise ValueError(f"coefficients must have at least one entry, got shape {tuple(self.coefficients.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.coefficients.shape, self.coefficients.shape[-1]))

    @property
    def mT(self) -> Companion:
        return self._rebuild((self.coefficients,), (not self.transposed,))

    def _linear(self, x: Tensor) -> Tensor:
        c = self.coefficients.unsqueeze(-2)
        if self.transposed:
            products = c * x
            last = -products.sum(-1, keepdim=True).to(products.dtype)  # CUDA's autocast sums into float32
            batch = torch.broadcast_shapes(last.shape[:-1], x.shape[:-1])
            return torch.cat([x[..., 1:].expand(*batch, -1), last], -1)
        return torch.nn.functional.pad(x[..., :-1], (1, 0)) - c * x[..., -1:]

    @property
    def flops(self) -> int:
        return 2 * self.coefficients.numel()

    @property
    def _solve_flops(self) -> int:
        return 3 * self.coefficients.numel()

    def _solve(self, b: Tensor) -> Tensor:
        if values_visible(self.coefficients) and bool((self.coefficients[..., 0] == 0).any()):
            raise LinAlgError("a companion matrix with c_0 = 0 is singular: the polynomial has the root 0")
        y, c = b.mT, self.coefficients.unsqueeze(-2)
        if self.transposed:  # x[1:] = y[:-1] and c . x = -y[-1]
            first = -(y[..., -1:] + (c[..., 1:] * y[..., :-1]).sum(-1, keepdim=True)) / c[..., :1]
            return torch.cat([first, y[..., :-1].expand(*first.shape[:-1], -1)], -1).mT
        last = -y[..., :1] / c[..., :1]
        return torch.cat([y[..., 1:] + c[..., 1:] * last, last], -1).mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        first, n = self.coefficients[..., 0], self.shape[-1]
        return first.sgn() * (-1) ** n, first.abs().log()

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random companion matrix: coefficients of the standard deviation 1/sqrt(3).

        Args:
            shape: (*batch, n, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if the shape is not square.
        """
        batch, m, n = check_matrix_shape(shape)
        if m != n:
            raise ValueError(f"shape must be square for a companion matrix, got {tuple(shape)}")
        coefficients = torch.empty((*batch, n), dtype=dtype, device=device)
        uniform_(coefficients, LINEAR_STD, generator)
        return cls(coefficients)
