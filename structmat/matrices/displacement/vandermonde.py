"""Vandermonde matrices: evaluation of polynomials and, solved, interpolation."""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_int, check_matrix_shape
from structmat.base import matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement._bjorck_pereyra import interpolate, moments
from structmat.matrices.displacement._convolution import LinAlgError, values_visible, working
from structmat.matrices.displacement._nodes import HALF, NodeMatrix, check_nodes

#: Columns that are made at a time: the memory of a product is that many numbers a row, and a step runs as a matrix
#: product of this inner size.
CHUNK = 256


class ConditioningWarning(UserWarning):
    """A matrix is so ill conditioned that its dtype cannot resolve it; the message says the number."""


@matrix
class Vandermonde(NodeMatrix):
    """``V[i, j] = nodes[i] ** j``: row i evaluates a polynomial, given by its coefficients, at node i; m parameters.

    A product makes the powers in chunks of 256 columns and sums these by Horner's rule: 2 m n operations, O(m) memory
    for a vector beside the chunk (with gradients one result of each chunk is kept). Square matrices are solved by
    Bjorck and Pereyra's algorithm with the nodes in Leja order, n^2 operations for a right-hand side.

    The condition number grows exponentially with n unless the nodes are spread evenly on the unit circle, such as roots
    of unity; for real nodes it always does. On the CPU, the constructor warns by ``ConditioningWarning`` where
    :meth:`log10_condition` shows that the dtype cannot resolve the matrix.

    Nodes stay in float32 where a matrix is converted to float16 or bfloat16, also by an autocast region: rounded nodes
    would make other matrices.
    Source: Bjorck and Pereyra 1970, "Solution of Vandermonde systems of equations"; Higham 1990, "Stability analysis of
    algorithms for solving confluent Vandermonde-like systems", for the order.

    Args:
        nodes: shape (*batch, m), floating point or complex.
        ncols: n, at least 1.
        dtype: what the matrix multiplies, that of the nodes by default.

    Raises:
        TypeError: if nodes is not a floating-point or complex tensor, or ncols not an integer.
        ValueError: if nodes is empty or has no dimension, or ncols < 1.

    Example:
        >>> import torch, structmat
        >>> V = structmat.Vandermonde(torch.tensor([1.0, 2.0, 3.0]), 3)
        >>> V.to_dense()
        tensor([[1., 1., 1.],
                [1., 2., 4.],
                [1., 3., 9.]])
        >>> V.solve(torch.tensor([1.0, 4.0, 9.0]))  # the polynomial with these values
        tensor([0., 0., 1.])
    """

    nodes: Tensor
    ncols: int = static()
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_nodes("nodes", self.nodes)
        check_int("ncols", self.ncols)
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.nodes.dtype)
        if self.dtype != self.nodes.dtype and not (self.dtype in HALF and self.nodes.dtype == torch.float32):
            raise TypeError(f"dtype must be that of the nodes, {self.nodes.dtype}, or a half one, got {self.dtype}")
        if values_visible(self.nodes) and self.nodes.numel():
            worst, digits = self.log10_condition().max().item(), -math.log10(torch.finfo(self._nodes().dtype).eps)
            if not worst < digits:
                sizes = self.nodes.detach().abs()
                warnings.warn(
                    f"a {self.shape[-2]} x {self.shape[-1]} Vandermonde matrix with "
                    f"{'complex' if self.nodes.is_complex() else 'real'} nodes of modulus {sizes.min().item():.4g} to "
                    f"{sizes.max().item():.4g} has a condition number of at least 1e{worst:.0f}, and its numbers have "
                    f"{digits:.0f} digits; spread nodes on the unit circle",
                    ConditioningWarning,
                    stacklevel=3,
                )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.nodes.shape, self.ncols))

    def _nodes(self) -> Tensor:
        return working(self.nodes)

    def _powers(self) -> tuple[Tensor, Tensor]:
        """Powers 0, 1, ... of a chunk, shape (*batch, m, count), and the next one, shape (*batch, m)."""
        step = self._nodes().unsqueeze(-1)
        powers, limit = step**0, min(CHUNK, self.ncols)  # ones, with a gradient of zero where there are no others
        while powers.shape[-1] < limit:  # doubling: the errors of log2(j) multiplications, not of j
            powers, step = torch.cat([powers, powers * step], -1), step * step
        return powers, step.squeeze(-1)

    def _linear(self, x: Tensor) -> Tensor:
        powers, step = self._powers()
        count, out = powers.shape[-1], None
        for start in reversed(range(0, self.ncols, count)):
            piece = x[..., start : start + count].to(powers.dtype)
            part = piece @ powers[..., : piece.shape[-1]].mT
            out = part if out is None else out * step.unsqueeze(-2) + part
        assert out is not None
        return out.to(x.dtype)

    def _linear_mT(self, x: Tensor) -> Tensor:
        powers, step = self._powers()
        count, rows, parts = powers.shape[-1], x.to(powers.dtype), []
        for start in range(0, self.ncols, count):
            parts.append(rows @ powers[..., : min(count, self.ncols - start)])
            rows = rows * step.unsqueeze(-2)
        return torch.cat(parts, -1).to(x.dtype)

    @property
    def flops(self) -> int:
        return 3 * self.nodes.numel() * self.ncols

    def diagonal(self) -> Tensor:
        count = min(self.shape[-2:])
        base, exponent = self._nodes()[..., :count], torch.arange(count, device=self.device)
        found, bit = torch.ones_like(base), 1
        while bit < count:
            found, base, bit = torch.where((exponent & bit) > 0, found * base, found), base * base, 2 * bit
        return found.to(self.dtype)

    # ---------------------------------------------------------------- conditioning and solving
    def log10_condition(self) -> Tensor:
        """A lower bound of the decimal logarithm of the 2-norm condition number, float64 of shape (*batch,); O(m).

        The largest of: where there are no fewer rows than columns, the ratio of the norms of last and first column, and
        of real nodes the norm of the coefficients of Chebyshev's polynomial of degree n - 1 on [-r, r], r the largest
        modulus, whose values at the nodes are at most 1 (for r = 1 this grows as (1 + sqrt 2)^n); where there are no
        more rows than columns, the ratio of the norms of the longest and the shortest row.
        """
        (m, n), real = self.shape[-2:], not self.nodes.is_complex()
        logs = self.nodes.detach().abs().double().log().clamp(min=-1e300)  # finite, so that 0 times it is 0
        bounds = [torch.zeros_like(logs[..., 0])]
        if m >= n:
            last = (torch.logsumexp(2 * (n - 1) * logs, -1) - math.log(m)) / 2  # over the first one's norm
            bounds.append(last.abs())
            if real and n > 1:
                # The coefficients of z^power: (d / 2) (d - k - 1)! / (k! (d - 2 k)!) (2 / r)^(d - 2 k), k from 0 on.
                d, k = n - 1, torch.arange((n + 1) // 2, dtype=torch.float64, device=self.device)
                power = d - 2 * k
                sizes = math.log(d / 2) + torch.lgamma(d - k) - torch.lgamma(k + 1) - torch.lgamma(power + 1)
                sizes = sizes + power * (math.log(2) - logs.amax(-1, keepdim=True))
                bounds.append(torch.logsumexp(2 * sizes, -1) / 2 + last.clamp(min=0))
        if m <= n:
            # The geometric series of |v|^2j, j < n.
            size = (2 * logs).abs().clamp(min=1e-12)
            rows = (2 * (n - 1) * logs).clamp(min=0) + (torch.expm1(-n * size) / torch.expm1(-size)).log()
            bounds.append((rows.amax(-1) - rows.amin(-1)) / 2)
        return torch.stack(bounds).amax(0) / math.log(10)

    def _distinct_nodes(self, what: str) -> Tensor:
        self._check_factorisable(what)
        nodes = self._nodes()
        if values_visible(nodes):
            same = (nodes.unsqueeze(-1) == nodes.unsqueeze(-2)).sum().item()
            if same > nodes.numel():
                raise LinAlgError(f"{what}: a Vandermonde matrix with two equal nodes is singular")
        return nodes

    @property
    def _solve_flops(self) -> int:
        return 7 * self.nodes.numel() * self.ncols

    def _solve(self, b: Tensor) -> Tensor:
        return interpolate(self._distinct_nodes("solve"), b.mT).mT

    def _solve_mT(self, b: Tensor) -> Tensor:
        return moments(self._distinct_nodes("solve"), b.mT).mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        nodes, (i, j) = self._nodes(), torch.triu_indices(self.ncols, self.ncols, 1, device=self.device)
        differences = nodes[..., j] - nodes[..., i]
        return differences.sgn().prod(-1), differences.abs().log().sum(-1)

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """Not defined: entries are not linear in the nodes, and no method is known that finds the nearest ones.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "no projection on Vandermonde matrices is known; make one of nodes, as Vandermonde(W[..., 1], ncols), "
            "or project on structmat.VandermondeLike, whose generators are fitted"
        )

    @classmethod
    def random(
        cls,
        shape: Any,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """Random nodes, uniform on the unit circle, or in [-1, 1] for a real dtype; without the constructor's warning.

        The first column is all ones: no choice of nodes gives outputs ``nn.Linear``'s variance, and ``randomize_`` is
        not defined. Multiply by a scalar.

        Args:
            shape: (*batch, m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        dtype = dtype or torch.get_default_dtype()
        real = torch.float32 if dtype in HALF else dtype.to_real()
        nodes = uniform_(torch.empty((*batch, m), dtype=real, device=device), 3**-0.5, generator)
        if dtype.is_complex:
            nodes = torch.polar(torch.ones_like(nodes), math.pi * nodes)
        return cls._rebuild((nodes,), (n, dtype))
