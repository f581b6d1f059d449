"""Causal maps made of polynomial products in learned bases: the causal Monarch convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structmat._autocast import autocast_dtype
from structmat._checks import check_broadcast, check_int, check_same, check_tensor
from structmat.base import matrix
from structmat.lazy import Inverse, Product
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.causal.basis import SCHEMES, CausalBasis, no_autocast
from structmat.matrices.displacement._convolution import convolve
from structmat.matrices.displacement._kernels import convolved, kernels_take
from structmat.matrices.displacement.causal_toeplitz import CausalToeplitz
from structmat.matrices.monarch_p import check_radix
from structmat.value import FactorValue

_CAST = {torch.float16, torch.bfloat16, torch.float32}


class Conditioning(NamedTuple):
    """Spectral condition numbers of L_0, L_1, L_2 (output, kernel, input), and bounds from their blocks alone."""

    cond: tuple[Tensor, Tensor, Tensor]
    bound: tuple[Tensor, Tensor, Tensor]


def covering_radix(size: int, order: int) -> tuple[int, ...]:
    """``order`` radices of about equal size whose product is at least ``size``, the smallest such at every step."""
    found, rest = [], size
    for left in range(check_int("order", order), 0, -1):
        r = max(int(rest ** (1 / left)) - 1, 1)
        while r**left < rest:
            r += 1
        found.append(r)
        rest = -(-rest // r)
    return tuple(found)


def resolve_radix(n: int, radix: Sequence[int] | None, order: int, scheme: str) -> tuple[int, ...]:
    """The radices that are given, or balanced ones; raise unless their product is large enough for size n."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    least = n if scheme == "fourier" else 2 * n - 1
    if radix is None:
        return covering_radix(least, order)
    radix = check_radix(radix)
    if math.prod(radix) < least:
        need = "n" if scheme == "fourier" else "2 n - 1"
        raise ValueError(
            f'the product of radix must be at least {need} = {least} of scheme "{scheme}", got {radix} with '
            f"{math.prod(radix)}"
        )
    return radix


def bases(stages: Sequence[Sequence[Any]], n: int, scheme: str) -> tuple[CausalBasis, CausalBasis, CausalBasis]:
    """L_0, L_1 and L_2 for one set of stages or for three, with the part of the basis that each of them needs."""
    first, second, third = stages if len(stages) == 3 else (stages[0],) * 3
    # Products have the degrees n - 1, ..., 2 n - 2 of the outputs.
    offset = n - 1 if scheme == "chebyshev" else 0
    return (
        CausalBasis(tuple(first), scheme, n, offset),
        CausalBasis(tuple(second), scheme, n),
        CausalBasis(tuple(third), scheme, n),
    )


@matrix
class CausalMonarch(FactorValue):
    """A causal bilinear map (k, u) -> y with n entries each, y[t] a function of k[0..t] and u[0..t] only.

    The causal polynomial Monarch convolution (Fu et al. 2023): k and u are the coefficients of two polynomials in the
    bases of M_1 and M_2, which are multiplied by their values at N nodes, and y holds the first coefficients of the
    product in the basis of M_0: ``y = M_0^-1 [(M_1 k) * (M_2 u)]``. Scheme "fourier" evaluates at roots of unity;
    "chebyshev", all real, at Chebyshev nodes with time reversed. Both are ``y = L_0^-1 T(L_1 k) L_2 u`` with T(c) the
    plain causal convolution with c and L_i lower triangular (:class:`CausalBasis`), which is how it is computed: one
    FFT convolution between block products, O(n log n + n sum n_a) operations. Identity blocks of scheme "fourier" are
    the plain causal convolution; of scheme "chebyshev" of order 1, too, and of a higher order that plus delayed terms.
    See the page on causal Monarch maps for proofs.

    n that radices do not multiply to: the map of size N' = prod n_a >= n, of whose inputs and outputs the first n are
    taken, is causal and a member of the family; nothing of the rest reaches them.

    Args:
        output: L_0.
        kernel: L_1.
        input: L_2; all of the same scheme, size, dtype and device. Batches broadcast.

    Raises:
        TypeError: if an argument is no CausalBasis, or dtypes differ.
        ValueError: if schemes, sizes, offsets or devices do not fit together.

    Example:
        >>> import torch, structmat
        >>> C = structmat.CausalMonarch.identity(5, radix=(2, 3))
        >>> C.conv(torch.tensor([1.0, -1, 0, 0, 0]), torch.arange(1.0, 6.0)).round(decimals=4)
        tensor([1., 1., 1., 1., 1.])
    """

    output: CausalBasis
    kernel: CausalBasis
    input: CausalBasis

    def __post_init__(self) -> None:
        parts = (self.output, self.kernel, self.input)
        for name, part in zip(("output", "kernel", "input"), parts, strict=True):
            if not isinstance(part, CausalBasis):
                raise TypeError(f"{name} must be a CausalBasis, got {type(part).__name__}")
            offset = part.n - 1 if name == "output" and part.scheme == "chebyshev" else 0
            if (part.n, part.scheme, part.offset) != (self.output.n, self.output.scheme, offset):
                raise ValueError(
                    f"{name} must have size {self.output.n}, scheme {self.output.scheme!r} and offset {offset}, "
                    f"got {part.n}, {part.scheme!r} and {part.offset}"
                )
            check_same(name, part.stages[0].blocks, "output", self.output.stages[0].blocks)
            check_broadcast(name, part.batch_shape, "output", self.output.batch_shape)

    @property
    def n(self) -> int:
        """The number of entries of k, u and y."""
        return self.output.n

    @property
    def scheme(self) -> str:
        """The scheme of its bases, "fourier" or "chebyshev"."""
        return self.output.scheme

    @property
    def shape(self) -> torch.Size:
        """``(*batch, n, n)``: that of the matrix of a kernel."""
        batch = [p.batch_shape for p in (self.output, self.kernel, self.input)]
        return torch.Size((*torch.broadcast_shapes(*batch), self.n, self.n))

    # ---------------------------------------------------------------- the map
    def _check(self, **vectors: Tensor) -> None:
        for name, v in vectors.items():
            check_tensor(name, v, 1)
            if v.shape[-1] != self.n:
                raise ValueError(f"{name} must have n = {self.n} entries in its last dimension, got {tuple(v.shape)}")
            # As F.linear does, an autocast region takes the real dtypes up to float32 for one another.
            if autocast_dtype(v.device) is None or not {v.dtype, self.dtype} <= _CAST:
                check_same(name, v, "the map", self.output.stages[0].blocks)
            elif v.device != self.device:
                raise ValueError(f"{name} is on {v.device} but the map is on {self.device}")
            check_broadcast(name, v.shape[:-1], "the map", self.batch_shape)

    def conv(self, k: Tensor, u: Tensor) -> Tensor:
        """Apply the map to a kernel and an input; leading dimensions broadcast with each other and with the map's.

        float16 and bfloat16 are computed in float32 and rounded once; so is everything in an autocast region, whose
        dtype the result then has. Gradients flow to k, u and the blocks.

        Args:
            k: shape (*, n), dtype and device of the map.
            u: shape (*, n), the same.

        Returns:
            Shape (*, n).

        Raises:
            TypeError: if k or u is not a tensor or has another dtype.
            ValueError: if one has not n entries, or batches do not broadcast.
            LinAlgError: (of torch.linalg) if a block of ``output`` has a zero on its diagonal, seen on the CPU outside
                of compilation and vmap.
        """
        self._check(k=k, u=u)
        check_broadcast("k", k.shape[:-1], "u", u.shape[:-1])
        cast = autocast_dtype(u.device)
        result = cast if cast is not None and self.dtype in _CAST else u.dtype
        whole = self._to(None, torch.promote_types(self.dtype, torch.float32))
        k, u = (v.to(whole.dtype).unsqueeze(-2) for v in (k, u))
        k, u = whole.kernel._apply(k), whole.input._apply(u)
        y = convolved(u, k.squeeze(-2), None, self.n) if kernels_take(u) else convolve(k, u, self.n)
        return whole.output._apply(y, inverse=True).squeeze(-2).to(result)

    def toeplitz(self, k: Tensor) -> Product:
        """The n x n lower triangular matrix u -> conv(k, u): ``L_0^-1 T(L_1 k) L_2`` with products, solves, inverse.

        Args:
            k: shape (*batch, n), float32, float64 or complex.

        Raises:
            TypeError: of half precision, which triangular solves do not have.
            ValueError: as :meth:`conv`.
        """
        self._check(k=k)
        self.output._check_factorisable("toeplitz")
        column = self.kernel._apply(k.to(self.dtype).unsqueeze(-2)).squeeze(-2)
        return Product((Inverse(self.output), CausalToeplitz(column), self.input))

    # ---------------------------------------------------------------- the definition
    def evaluations(self) -> tuple[Butterfly, Butterfly, Butterfly]:
        """M_0, M_1 and M_2 as Monarch matrices of order p, nodes in one order (:meth:`CausalBasis.evaluation`).

        Raises:
            ValueError: if the bases have different radices, hence other nodes or another order of them.
        """
        found = [p.radix for p in (self.output, self.kernel, self.input)]
        if found[1:] != found[:-1]:
            raise ValueError(f"evaluations need bases of the same radices, got {found}; conv does without")
        return self.output.evaluation(), self.kernel.evaluation(), self.input.evaluation()

    def conv_by_evaluation(self, k: Tensor, u: Tensor) -> Tensor:
        """:meth:`conv` by its definition, ``M_0^-1 [(M_1 k) * (M_2 u)]``: three Monarch products, complex of "fourier".

        The same up to rounding; slower, and as accurate as M_0 is well conditioned (for tests and to see the factors).
        """
        self._check(k=k, u=u)
        self.output._check_factorisable("conv_by_evaluation")
        backwards = self.scheme == "chebyshev"
        with no_autocast(u):
            M_0, M_1, M_2 = self.evaluations()
            size = M_0.shape[-1]
            values = [
                M.matvec(pad(v.flip(-1) if backwards else v, (0, size - self.n)).to(M.dtype))
                for M, v in ((M_1, k), (M_2, u))
            ]
            y = M_0._solve((values[0] * values[1]).unsqueeze(-1)).squeeze(-1)
        y = y[..., self.n - 1 : 2 * self.n - 1].flip(-1) if backwards else y[..., : self.n]
        return y.to(self.dtype) if self.dtype.is_complex or not y.is_complex() else y.real

    # ---------------------------------------------------------------- numbers
    def conditioning(self) -> Conditioning:
        """Condition numbers of the three triangular matrices, by dense singular values in O(n^3), and cheap bounds.

        They bound the loss of digits: of scheme "fourier" cond(M_i) = cond(L_i) on the first n coefficients, since the
        Fourier transform is unitary up to a factor.

        Raises:
            TypeError: of half precision.
        """
        self.output._check_factorisable("conditioning")
        parts = (self.output, self.kernel, self.input)
        first, second, third = (torch.linalg.cond(p.to_dense()) for p in parts)
        one, two, three = (p.condition_bound() for p in parts)
        return Conditioning((first, second, third), (one, two, three))

    @property
    def flops(self) -> int:
        """Operations of one :meth:`conv`, summed over the batch."""
        k = torch.empty(self.n, dtype=self.dtype, device="meta")
        transforms = CausalToeplitz(k).flops
        return math.prod(self.batch_shape) * transforms + sum(p.flops for p in (self.output, self.kernel, self.input))

    @classmethod
    def from_blocks(cls, blocks: Sequence[Sequence[Tensor]], n: int, scheme: str = "fourier") -> Self:
        """The map of one set of blocks for all three bases, or of three (M_0, M_1, M_2).

        Args:
            blocks: one or three sequences with the blocks of every digit, as of :class:`CausalBasis`.
            n: size.
            scheme: "fourier" (radices with a product of at least n) or "chebyshev" (at least 2 n - 1).

        Raises:
            ValueError: if there are neither one nor three, or the product of the radices is too small.
        """
        if not isinstance(blocks, (tuple, list)) or len(blocks) not in (1, 3):
            found = len(blocks) if isinstance(blocks, (tuple, list)) else type(blocks).__name__
            raise ValueError(f"blocks must be a sequence of one basis or of three, got {found}")
        for stages in blocks:
            resolve_radix(check_int("n", n), CausalBasis(stages, scheme).radix, 1, scheme)  # pyright: ignore
        return cls(*bases(blocks, n, scheme))

    @classmethod
    def identity(
        cls,
        n: int,
        radix: Sequence[int] | None = None,
        order: int = 2,
        scheme: str = "fourier",
        *,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """The map all of whose blocks are the identity: of scheme "fourier" the plain causal convolution.

        Of scheme "chebyshev" of order 1, too; of a higher order y[t] is that plus products k[r] u[s] with r + s < t.

        Args:
            n: size.
            radix: n_0, ..., n_{p-1}: a product of at least n, or 2 n - 1 of scheme "chebyshev". Of scheme "fourier" the
                evaluation has twice the last one. By default about equal ones.
            order: p, where radix is None.
            scheme: "fourier" or "chebyshev".
            batch: of the blocks, one map for every channel.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            TypeError: if n or a radix is not an integer.
            ValueError: if the product is too small or the scheme unknown.
        """
        radix = resolve_radix(check_int("n", n), radix, order, scheme)
        one = CausalBasis.identity(radix, scheme, batch=batch, dtype=dtype, device=device).stages
        return cls(*bases([one], n, scheme))
