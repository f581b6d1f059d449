"""Matrices of low displacement rank whose operators are learned."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._autocast import autocast_dtype
from structmat._checks import check_inexact, check_int, check_matrix_shape, check_same, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.displacement import _krylov_subdiagonal, _krylov_tridiagonal
from structmat.matrices.displacement._convolution import working


@matrix
class _KrylovLDR(StructuredMatrix):
    """``M = sum_k A^k G H^T B^k``, k < min(m, n): what the classes of different operators share."""

    a: Tensor
    b: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def _entries(cls, size: int, corner: bool) -> int:
        """How many numbers an operator of this size has."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name, ndim in (("left", 2), ("right", 2), ("a", 1), ("b", 1)):
            check_tensor(name, getattr(self, name), ndim)
            check_inexact(name, getattr(self, name))
            check_same(name, getattr(self, name), "left", self.left)
        if self.left.shape[-1] != self.right.shape[-1] or self.left.shape[-1] == 0:
            raise ValueError(
                f"left (*batch, m, r) and right (*batch, n, r) must share r, at least 1, got {tuple(self.left.shape)} "
                f"and {tuple(self.right.shape)}"
            )
        for name, size in (("a", self.left.shape[-2]), ("b", self.right.shape[-2])):
            known = [self._entries(size, corner) for corner in (False, True)]
            if size == 0 or getattr(self, name).shape[-1] not in known:
                raise ValueError(
                    f"{name} must have {known[0]} entries in its last dimension, or {known[1]} with corners, for an "
                    f"operator of size {size}, got shape {tuple(getattr(self, name).shape)}"
                )
        _ = self.shape

    @property
    def shape(self) -> torch.Size:
        m, n = self.left.shape[-2], self.right.shape[-2]
        batches = [t.shape[:-1] for t in (self.a, self.b)] + [t.shape[:-2] for t in (self.left, self.right)]
        return torch.Size((*torch.broadcast_shapes(*batches), m, n))

    @property
    def displacement_rank(self) -> int:
        """A bound of the rank of ``M - A M B``."""
        raise NotImplementedError

    def _prepare(self, *args: Any, **kwargs: Any) -> tuple[Self, Tensor]:
        # Inside autocast products are computed in float32 all the same: errors of entries grow with the power.
        return self, super()._prepare(*args, **kwargs)[1]

    def _linear(self, x: Tensor) -> Tensor:
        factors = [working(t) for t in (self.a, self.b, self.left.mT, self.right.mT)]
        if min(self.shape[-2:]) == 1:  # no power but the identity: gradients of a and b are zero, and exist
            nothing = self.a[..., :0].sum(-1) + self.b[..., :0].sum(-1)
            factors[2] = factors[2] + nothing.to(factors[2].dtype)[..., None, None]
        if autocast_dtype(x.device) is None:
            return self._product(working(x), *factors).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(working(x), *factors).to(x.dtype)

    def _product(self, x: Tensor, a: Tensor, b: Tensor, G: Tensor, H: Tensor) -> Tensor:
        """The product with factors G (*batch, r, m), H (*batch, r, n) in the precision that it is computed in."""
        raise NotImplementedError

    def _scale(self, scalar: Tensor) -> Self:
        return self._map_generators(scalar * self.left, self.right)

    def _map_generators(self, left: Tensor, right: Tensor) -> Self:
        return self._rebuild((self.a, self.b, left, right), tuple(getattr(self, name) for name in self._static))

    # ---------------------------------------------------------------- random members
    @classmethod
    def random(
        cls,
        shape: Any,
        rank: int,
        corner: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random member whose outputs have ``nn.Linear``'s variance, with operators near to shifts.

        The corner of A starts near 1 and that of B near -1, as in :class:`structmat.ToeplitzLike`; powers of both have
        entries of about 1.

        Args:
            shape: (*batch, m, n).
            rank: r, at least 1.
            corner: whether the operators have corners.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        check_int("rank", rank)
        sizes = ((cls._entries(m, corner),), (cls._entries(n, corner),), (m, rank), (n, rank))
        return cls(*(torch.empty((*batch, *size), dtype=dtype, device=device) for size in sizes)).randomize_(
            generator=generator
        )

    def _start_operators(self, generator: torch.Generator | None) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        self._start_operators(generator)
        for t in (self.left, self.right):
            uniform_(t, 1.0, generator)
        if self.device.type == "meta":
            return self
        # The scale depends on the operators: measured, by vectors of signs if the matrix is large.
        m, n = self.shape[-2:]
        if n <= 64:
            probes = torch.eye(n, dtype=torch.float32, device=self.device)
        else:
            probes = torch.empty(64, n, device=self.device).uniform_(generator=generator).round() * 2 - 1
        y = working(self._linear(probes.to(self.dtype)))
        size = (y.abs().square().sum((-2, -1), keepdim=True) / (m * (1 if n <= 64 else 64))).sqrt()
        while size.ndim > self.left.ndim:  # left is broadcast against the others' batch: one scale for all
            size = size.mean(0)
        self.left.mul_((std / size).to(self.dtype))
        return self


def _near_shift(t: Tensor, corner: float, size: int, generator: torch.Generator | None) -> None:
    """Fill ``size - 1`` entries with numbers around 1, and one after them with numbers around ``corner``."""
    uniform_(t, 0.5 / math.sqrt(size), generator)
    t[..., : size - 1] += 1
    t[..., size - 1 :] += corner


@matrix
class LDRSubdiagonal(_KrylovLDR):
    """``M = sum_k A^k G H^T B^k``, k < min(m, n), with subdiagonal operators A and B whose entries are learned.

    With K(A, g) = [g, A g, A^2 g, ...] that is ``sum_j K(A, g_j) K(B^T, h_j)^T``. A has a[i] in row i + 1 and column i,
    and of m entries the last one in its top right corner; B likewise. If all entries are 1 and the corners of opposite
    sign, M is a :class:`structmat.HankelLike` matrix of rank r: powers of A move down and those of B to the left.

    ``M - A M B`` has at most r columns that are independent, of random members exactly r (if min(m, n) >= r): without
    corners the powers end by themselves, and with them ``A^m`` or ``B^n`` is a multiple of the identity.

    m + n + r (m + n) parameters. Products of entries are taken by doubling and sums by FFT, in
    O(r (m + n) log^2(m + n)), in both directions; the Krylov matrices are not formed. Nothing overflows unless an entry
    of a power of A or B does. Errors are relative to the norms of matrix and vector. float16 and bfloat16, and products
    inside autocast, are computed in float32. Closed under transposes and multiples; of matrices that have the very
    same operators, under sums (the sum of ranks).

    Args:
        a: entries of A, shape (*batch, m - 1), or (*batch, m) with a corner; floating point or complex. Of size 1 A is
            the corner, or zero; if m or n is 1, no entry of A or B matters.
        b: entries of B, shape (*batch, n - 1) or (*batch, n), same dtype and device as all.
        left: G, shape (*batch, m, r).
        right: H, shape (*batch, n, r); batches broadcast.
        up: A and B are transposed: their entries stand above the diagonal and in the bottom left corner.

    Raises:
        TypeError: if one is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.

    Source: Thomas, Gu, Dao, Rudra, Re 2018, "Learning compressed transforms with low displacement rank".

    Example:
        >>> import torch, structmat
        >>> ones = torch.ones(3, 1)
        >>> structmat.LDRSubdiagonal(torch.tensor([2.0, 3.0]), torch.zeros(2), ones, ones).to_dense()
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])
        >>> M = structmat.LDRSubdiagonal.random((6, 4), rank=2)
        >>> M.shape, M.mT.displacement_rank, M.num_params
        (torch.Size([6, 4]), 2, 30)
    """

    up: bool = static(default=False)

    @classmethod
    def _entries(cls, size: int, corner: bool) -> int:
        return size if corner else size - 1

    @property
    def displacement_rank(self) -> int:
        """The number of columns of G and H: the rank of ``M - A M B``, or a bound if it is degenerate."""
        return self.left.shape[-1]

    @property
    def mT(self) -> LDRSubdiagonal:
        return self._rebuild((self.b, self.a, self.right, self.left), (not self.up,))

    def _product(self, x: Tensor, a: Tensor, b: Tensor, G: Tensor, H: Tensor) -> Tensor:
        m, n = G.shape[-1], H.shape[-1]
        if self.up:  # in reverse order they are subdiagonal
            x, G, H = x.flip(-1), G.flip(-1), H.flip(-1)
            a, b = (torch.cat([t[..., : k - 1].flip(-1), t[..., k - 1 :]], -1) for t, k in ((a, m), (b, n)))
        c = _krylov_subdiagonal.krylov_coefficients(b, H, x, min(m, n))
        y = _krylov_subdiagonal.krylov_sum(a, G, c)
        return y.flip(-1) if self.up else y

    @property
    def flops(self) -> int:
        (m, n), r = self.shape[-2:], self.left.shape[-1]
        each = (
            _krylov_subdiagonal.krylov_flops(k, r, min(m, n), t.shape[-1] == k, self.dtype.is_complex)
            for k, t in ((m, self.a), (n, self.b))
        )
        return math.prod(self.batch_shape) * sum(each)

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, LDRSubdiagonal) and self.up == other.up:
            return _join(self, other)
        return None

    def _start_operators(self, generator: torch.Generator | None) -> None:
        m, n = self.shape[-2:]
        _near_shift(self.a, -1.0 if self.up else 1.0, m, generator)
        _near_shift(self.b, 1.0 if self.up else -1.0, n, generator)


@matrix
class LDRTridiagonal(_KrylovLDR):
    """``M = sum_k A^k G H^T B^k``, k < min(m, n), with tridiagonal operators A and B whose entries are learned.

    A holds its entries below the diagonal from the top, with corners its top right one after them; then its diagonal;
    then those above it, with corners its bottom left one after them. Entries that fall on the same place (m <= 2) add.
    ``M - A M B = G H^T - A^K G H^T B^K``, K = min(m, n): of rank at most 2 r.

    3 (m + n) + r (m + n) parameters. A product with a vector takes about (2 r + 6) min(m, n) (m + n) operations, more
    than that with a dense matrix, and 2.4e5 (m + n) once for all vectors where min(m, n) > 32. Memory is O(r (m + n))
    for the matrix and O(m + n) for each vector, (m + n) min(m, n) / 32 to differentiate: powers are taken in chunks of
    32, by matrix products in blocks; the Krylov matrices are not formed. Faster algorithms reduce modulo characteristic
    polynomials, whose coefficients grow exponentially with the size, and are not used. float16 and bfloat16, and
    products inside autocast, are computed in float32. Closed under transposes and multiples; of matrices that have the
    very same operators, under sums (the sum of ranks).

    Args:
        a: entries of A, shape (*batch, 3 m - 2), or (*batch, 3 m) with corners; floating point or complex.
        b: entries of B, shape (*batch, 3 n - 2) or (*batch, 3 n), same dtype and device as all.
        left: G, shape (*batch, m, r).
        right: H, shape (*batch, n, r); batches broadcast.

    Raises:
        TypeError: if one is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.

    Source: Thomas, Gu, Dao, Rudra, Re 2018, "Learning compressed transforms with low displacement rank".

    Example:
        >>> import structmat
        >>> M = structmat.LDRTridiagonal.random((6, 4), rank=1, corner=False)
        >>> M.shape, M.displacement_rank, M.num_params
        (torch.Size([6, 4]), 2, 36)
    """

    @classmethod
    def _entries(cls, size: int, corner: bool) -> int:
        return 3 * size if corner else 3 * size - 2

    @property
    def displacement_rank(self) -> int:
        """A bound of the rank of ``M - A M B``: twice the number of columns of G and H, at most min(m, n)."""
        return min(2 * self.left.shape[-1], *self.shape[-2:])

    @property
    def mT(self) -> LDRTridiagonal:
        m, n = self.shape[-2:]
        return self._rebuild((_swapped(self.b, n), _swapped(self.a, m), self.right, self.left), ())

    def _product(self, x: Tensor, a: Tensor, b: Tensor, G: Tensor, H: Tensor) -> Tensor:
        m, n = G.shape[-1], H.shape[-1]
        c = _krylov_tridiagonal.krylov_coefficients(_bands(b, n), H, x, min(m, n))
        return _krylov_tridiagonal.krylov_sum(_bands(a, m), G, c)

    @property
    def flops(self) -> int:
        (m, n), r = self.shape[-2:], self.left.shape[-1]
        each = (_krylov_tridiagonal.krylov_flops(k, r, min(m, n)) for k in (m, n))
        return math.prod(self.batch_shape) * sum(each)

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        return _join(self, other) if isinstance(other, LDRTridiagonal) else None

    def _start_operators(self, generator: torch.Generator | None) -> None:
        for t, size, corner in ((self.a, self.shape[-2], 1.0), (self.b, self.shape[-1], -1.0)):
            below = size if t.shape[-1] == 3 * size else size - 1
            _near_shift(t[..., :below], corner, size, generator)
            uniform_(t[..., below:], 0.5 / size, generator)


def _bands(t: Tensor, size: int) -> Tensor:
    """Below, on and above the diagonal, each with its corner, zero where there are none: (*batch, 3, size)."""
    if t.shape[-1] == 3 * size:
        return t.unflatten(-1, (3, size))
    parts = t.split([size - 1, size, size - 1], -1)
    return torch.stack([torch.nn.functional.pad(p, (0, size - p.shape[-1])) for p in parts], -2)


def _swapped(t: Tensor, size: int) -> Tensor:
    """The entries of the transpose."""
    side = size if t.shape[-1] == 3 * size else size - 1
    below, main, above = t.split([side, size, side], -1)
    return torch.cat([above, main, below], -1)


def _join(M: Any, N: Any) -> Any:
    """The sum of two matrices with the same operators, or None."""
    if M.a is not N.a or M.b is not N.b:
        return None
    pairs = ((M.left, N.left), (M.right, N.right))
    batch = torch.broadcast_shapes(*(t.shape[:-2] for pair in pairs for t in pair))
    joined = (torch.cat([t.expand(*batch, *t.shape[-2:]) for t in pair], -1) for pair in pairs)
    return M._map_generators(*joined)
