"""Cauchy matrices."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_matrix_shape, check_same
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement._convolution import LinAlgError, values_visible, working
from structmat.matrices.displacement._nodes import (
    HALF,
    NodeMatrix,
    check_nodes,
    full_precision,
    products_of_differences,
)

#: Entries that are made at a time.
CHUNK = 2**20


@matrix
class Cauchy(NodeMatrix):
    """``C[i, j] = 1 / (s[i] - t[j])``; m + n parameters.

    A product makes the entries, up to 2^20 at a time: 4 m n operations, O(m + n) memory beside the chunk (with
    gradients all chunks are kept). Square matrices have the inverse ``diag(a) C^T diag(b)``, a and b being products of
    differences (computed as logarithms in double precision), hence ``solve`` and ``inverse`` at the cost of a product
    and O(n^2) memory, and a determinant likewise. The entries of the inverse are accurate however ill conditioned the
    matrix is.

    Nodes stay in float32 where a matrix is converted to float16 or bfloat16, also by an autocast region: differences of
    rounded nodes would make another matrix.
    Source: Schechter 1959, "On the inversion of certain matrices".

    Args:
        s: shape (*batch, m), floating point or complex.
        t: shape (*batch, n), same dtype and device; batches broadcast. No t[j] may be an s[i], which is checked on the
            CPU outside of compilation and vmap; elsewhere nothing waits for the values and that entry is infinite.
        dtype: what the matrix multiplies, that of s by default.

    Raises:
        TypeError: if s or t is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty or has no dimension, batches or devices do not match, or an s[i] equals a t[j].

    Example:
        >>> import torch, structmat
        >>> C = structmat.Cauchy(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0]))
        >>> C.to_dense()
        tensor([[1.0000, 0.5000],
                [0.5000, 0.3333]])
        >>> C.inverse().to_dense().round()
        tensor([[ 4., -6.],
                [-6., 12.]])
    """

    s: Tensor
    t: Tensor
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_nodes("s", self.s)
        check_nodes("t", self.t)
        check_same("t", self.t, "s", self.s)
        check_broadcast("t", self.t.shape[:-1], "s", self.s.shape[:-1])
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.s.dtype)
        if self.dtype != self.s.dtype and not (self.dtype in HALF and self.s.dtype == torch.float32):
            raise TypeError(f"dtype must be that of the nodes, {self.s.dtype}, or a half one, got {self.dtype}")
        if values_visible(self.s) and values_visible(self.t):
            for s in self.s.split(self._rows(), -1):
                equal = s.unsqueeze(-1) == self.t.unsqueeze(-2)
                if bool(equal.any()):
                    node = s.unsqueeze(-1).expand(equal.shape)[equal][0].item()
                    raise ValueError(f"no s[i] may equal a t[j]: 1 / (s[i] - t[j]) is infinite, {node} is in both")

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.s.shape[:-1], self.t.shape[:-1])
        return torch.Size((*batch, self.s.shape[-1], self.t.shape[-1]))

    def _rows(self) -> int:
        """How many rows' entries are made at a time."""
        return max(1, CHUNK // self.t.shape[-1])

    def _linear(self, x: Tensor) -> Tensor:
        t = working(self.t).unsqueeze(-2)
        rows = x.to(t.dtype)
        parts = [rows @ (s.unsqueeze(-1) - t).reciprocal().mT for s in working(self.s).split(self._rows(), -1)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)

    @property
    def mT(self) -> Cauchy:
        return self._rebuild((-self.t, -self.s), (self.dtype,))

    @property
    def flops(self) -> int:
        return 4 * self.shape.numel()

    # ---------------------------------------------------------------- solving
    def _weights(self, what: str) -> tuple[Tensor, Tensor]:
        """The diagonals a and b of the inverse ``diag(a) C^T diag(b)``."""
        self._check_factorisable(what)
        for name, nodes in (("s", self.s), ("t", self.t)):
            if values_visible(nodes) and int((nodes.unsqueeze(-1) == nodes.unsqueeze(-2)).sum()) > nodes.numel():
                raise LinAlgError(f"{what}: a Cauchy matrix with two equal entries of {name} is singular")
        s, t = self.s, self.t
        parts = []
        for x, y in ((t, s), (s, t)):
            (sign, log), (own_sign, own_log) = products_of_differences(x, y), products_of_differences(x, x)
            parts.append((sign / own_sign, log - own_log))
        (a_sign, a), (b_sign, b) = parts
        # prod_k (s_k - t_i) / prod (t_k - t_i) has n differences turned above and n - 1 below.
        middle = a.detach().mean(-1, keepdim=True) / 2 - b.detach().mean(-1, keepdim=True) / 2
        return (-a_sign * (a - middle).exp()).to(self.dtype), (b_sign * (b + middle).exp()).to(self.dtype)

    @property
    def _solve_flops(self) -> int:
        return 4 * self.flops

    def _solve(self, b: Tensor) -> Tensor:
        left, right = self._weights("solve")
        return left.unsqueeze(-1) * full_precision(self.to_dense().mT, right.unsqueeze(-1) * b)

    def inverse(self) -> StructuredMatrix:
        """The inverse, a product of a diagonal, a Cauchy and a diagonal matrix.

        Raises:
            LinAlgError: (of torch.linalg) if two of s or two of t are equal, seen on the CPU outside of compilation and
                vmap; elsewhere nothing waits for the values and the result is not finite. ``solve`` does the same.
        """
        from structmat.lazy import Product

        left, right = self._weights("inverse")
        return Product((Diagonal(left), self.mT, Diagonal(right)))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        n = self.shape[-1]
        i, j = torch.triu_indices(n, n, 1, device=self.device)
        sign, logabs = products_of_differences(self.s, self.t)
        sign, logabs = sign.prod(-1).conj(), -logabs.sum(-1)
        for d in (self.s[..., j] - self.s[..., i], self.t[..., i] - self.t[..., j]):
            d = d.to(torch.complex128 if d.is_complex() else torch.float64)
            sign, logabs = sign * d.sgn().prod(-1), logabs + d.abs().log().sum(-1)
        return sign.to(self.dtype), logabs.to(self.s.real.dtype)

    # ---------------------------------------------------------------- entries
    def to_dense(self) -> Tensor:
        return (working(self.s).unsqueeze(-1) - working(self.t).unsqueeze(-2)).reciprocal().to(self.dtype)

    def diagonal(self) -> Tensor:
        count = min(self.shape[-2:])
        return (working(self.s)[..., :count] - working(self.t)[..., :count]).reciprocal().to(self.dtype)

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_dense(cls, W: Tensor) -> Self:
        """Not defined: entries are not linear in the nodes, and no method is known that finds the nearest ones.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "no projection on Cauchy matrices is known; make one of nodes, as Cauchy(s, t), or project on "
            "structmat.CauchyLike, whose generators are fitted"
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
        """A random matrix whose outputs have ``nn.Linear``'s variance; well conditioned, as s and t alternate.

        Args:
            shape: (*batch, m, n).
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        dtype = dtype or torch.get_default_dtype()
        kept = torch.float32 if dtype in HALF else dtype
        s, t = (torch.empty((*batch, k), dtype=kept, device=device) for k in (m, n))
        return cls._rebuild((s, t), (dtype,)).randomize_(generator=generator)

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        m, n = self.s.shape[-1], self.t.shape[-1]
        # m + n places a distance of 1 apart, spread evenly among s and t, each moved by less than a quarter.
        places = torch.arange(m + n, device=self.device)
        taken = (places + 1) * n // (m + n) > places * n // (m + n)
        order = taken.long().argsort(stable=True)  # no boolean index, which would wait for a GPU
        for nodes, where in ((self.s, order[:m]), (self.t, order[m:])):
            uniform_(nodes, 3**-0.5 / 4, generator).add_(where)
        D = self.to_dense().to(working(self.s).dtype)
        # Entries scale with the inverse of the nodes.
        factor = D.abs().square().sum((-2, -1)).div(m).mean().sqrt() / std
        self.s.mul_(factor)
        self.t.mul_(factor)
        return self
