"""Butterfly matrices: products of Kronecker-sparse factors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_matrix_shape, check_tensor
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.chain import Chain, Pattern, prime_radices
from structmat.lazy import compose
from structmat.matrices._merge import merged_stages, pass_cost, product_flops, stage_product
from structmat.matrices._twiddle import twiddle_values
from structmat.matrices.block_diagonal import crop_size
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.matrices.permutation import Permutation
from structmat.projection.butterfly import project_butterfly
from structmat.projection.refine import refine, search_permutation


@matrix
class Butterfly(StructuredMatrix):
    """A product of Kronecker-sparse factors, as every fast transform is (Dao et al. 2019, Le et al. 2022).

    n = 2^L has L factors of 2 n numbers each; other sizes have mixed radices: 1000 = 2 2 2 5 5 5 is a butterfly without
    padding. Closed under transposes, conjugates and, of square blocks, inverses. ``nrows`` and ``ncols`` crop rows and
    columns at the end, for sizes that are padded.

    A product is not computed factor by factor: neighbouring factors merge exactly into few stages of larger blocks, two
    of them (a Monarch matrix) up to n = 8192 or so. The merge is part of every product, in float32 at least, and
    gradients flow through it; ``flops`` counts the merge, too, once for every product however many vectors it has.

    Args:
        factors: from left to right, :class:`KroneckerSparse` matrices or tensors of their values
            (*batch, a, b, c, d), all of the same batch, whose sizes meet; ``.chain`` says whether they are a chain.
        nrows: rows to keep, all by default.
        ncols: columns to keep, all by default.

    Raises:
        TypeError: if a factor is something else, or dtypes differ.
        ValueError: if sizes do not meet, batches or devices differ, or a crop is out of range.

    Example:
        >>> import torch, structmat
        >>> B = structmat.Butterfly.random((1000, 1000), generator=torch.Generator().manual_seed(0))
        >>> [tuple(f.pattern) for f in B.factors][:3], B.num_params
        ([(1, 5, 5, 200), (5, 5, 5, 40), (25, 5, 5, 8)], 21000)
        >>> B.linear(torch.ones(3, 1000)).shape
        torch.Size([3, 1000])
    """

    factors: tuple[KroneckerSparse, ...]
    nrows: int = static(default=None)
    ncols: int = static(default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.factors, (tuple, list)) or not self.factors:
            raise TypeError(f"factors must be a non-empty tuple of KroneckerSparse matrices, got {self.factors!r}")
        factors = tuple(f if isinstance(f, KroneckerSparse) else KroneckerSparse(f) for f in self.factors)
        first = factors[0]
        for i, (left, right) in enumerate(itertools.pairwise(factors)):
            if left.pattern.shape[1] != right.pattern.shape[0]:
                raise ValueError(
                    f"factors {i} and {i + 1} must meet, got patterns {tuple(left.pattern)} with "
                    f"{left.pattern.shape[1]} columns and {tuple(right.pattern)} with {right.pattern.shape[0]} rows"
                )
        for i, f in enumerate(factors):
            if f.dtype != first.dtype:
                raise TypeError(f"factor {i} has dtype {f.dtype} but factor 0 has {first.dtype}")
            if f.device != first.device:
                raise ValueError(f"factor {i} is on {f.device} but factor 0 is on {first.device}")
            if f.batch_shape != first.batch_shape:
                raise ValueError(
                    f"factor {i} has batch {tuple(f.batch_shape)} but factor 0 has {tuple(first.batch_shape)}"
                )
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "nrows", crop_size("nrows", self.nrows, first.shape[-2]))
        object.__setattr__(self, "ncols", crop_size("ncols", self.ncols, factors[-1].shape[-1]))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.factors[0].batch_shape, self.nrows, self.ncols))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The factors' patterns, from left to right."""
        return tuple(f.pattern for f in self.factors)

    @property
    def chain(self) -> Chain:
        """The factors' patterns as a chain.

        Raises:
            ValueError: if two neighbours cannot be chained.
        """
        return Chain(self.patterns)

    def _values(self) -> tuple[Tensor, ...]:
        return tuple(f.values for f in self.factors)

    def _linear(self, x: Tensor) -> Tensor:
        return stage_product(x, merged_stages(self._values()), self.nrows)

    def merged(self) -> Butterfly:
        """The same matrix with the factors that its products merge: fewer and larger ones, more numbers, no merging.

        For inference: of few vectors the merge of all levels takes longer than the product.

        Example:
            >>> import structmat
            >>> B = structmat.Butterfly.random((1024, 1024))
            >>> [tuple(p) for p in B.merged().patterns], B.num_params, B.merged().num_params
            ([(1, 32, 32, 32), (32, 32, 32, 1)], 20480, 65536)
        """
        values = self._values()
        while len(fewer := merged_stages(values)) < len(values):  # what was merged may merge again
            values = tuple(fewer)
        return Butterfly(tuple(map(KroneckerSparse, values)), self.nrows, self.ncols)

    @property
    def mT(self) -> Butterfly:
        return Butterfly(tuple(f.mT for f in reversed(self.factors)), self.ncols, self.nrows)

    @property
    def flops(self) -> int:
        return math.prod(self.batch_shape) * product_flops(self.patterns, pass_cost(self.factors[0].values))

    # ---------------------------------------------------------------- solving
    def _check_invertible(self, what: str) -> None:
        self._check_factorisable(what)
        full = self.factors[0].shape[-2]
        if (self.nrows, self.ncols) != (full, self.factors[-1].shape[-1]):
            raise ValueError(f"{what} needs an uncropped matrix, got {self.nrows} x {self.ncols} of {full} rows")
        for f in self.factors:
            if f.pattern.b != f.pattern.c:
                raise ValueError(f"{what} needs square blocks in every factor, got pattern {tuple(f.pattern)}")

    @property
    def _solve_flops(self) -> int:
        return sum(f._solve_flops for f in self.factors)

    def _solve(self, b: Tensor) -> Tensor:
        self._check_invertible("solve")
        for f in self.factors:
            b = f._solve(b)
        return b

    def inverse(self) -> Butterfly:
        """The inverse, factor by factor: a butterfly of the transposed patterns.

        Raises:
            ValueError: if a factor's blocks are not square or the matrix is cropped.
        """
        self._check_invertible("inverse")
        return Butterfly(tuple(f.inverse() for f in reversed(self.factors)))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_invertible("slogdet")
        signs, logs = zip(*(f.slogdet() for f in self.factors), strict=True)
        return functools.reduce(torch.mul, signs), functools.reduce(torch.add, logs)

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> Butterfly:
        first, *rest = self.factors
        return Butterfly((first._scale(scalar), *rest), self.nrows, self.ncols)

    # ---------------------------------------------------------------- construction
    @classmethod
    def structure(
        cls, m: int, n: int, radices: Iterable[int | tuple[int, int]] | None = None, pad: bool = False, rank: int = 1
    ) -> Chain:
        """The chain of an m x n butterfly.

        Args:
            m: rows.
            n: columns.
            radices: (b, c) or a number for both, of every factor from left to right; by default the prime factors of m
                and n, the largest first, in as many pairs as the shorter of both lists has.
            pad: take the next powers of two for m and n instead; the chain is then larger than m x n.
            rank: of the blocks of every split; more than 1 for m = n a power of two (see :meth:`Chain.dyadic`).

        Raises:
            ValueError: if radices do not multiply to m and n, or come with pad or a rank.
        """
        check_int("m", m)
        check_int("n", n)
        if pad:
            if radices is not None:
                raise ValueError("give radices or pad, not both")
            m, n = (1 << (v - 1).bit_length() for v in (m, n))
        if check_int("rank", rank) > 1:
            if radices is not None or m != n:
                raise ValueError(f"rank {rank} needs a square matrix without radices, got {m} x {n}, {radices!r}")
            return Chain.dyadic(n, rank)
        chain = Chain.mixed_radix(prime_radices(m, n) if radices is None else radices)
        if chain.shape != (m, n):
            raise ValueError(f"radices must multiply to the {m} x {n} matrix's sizes, got {chain.shape}")
        return chain

    @classmethod
    def _project(
        cls, W: Tensor, chain: Chain, permutation: Tensor | str | None = None, order: str = "balanced", sweeps: int = 0
    ) -> tuple[StructuredMatrix, Tensor, Tensor]:
        check_tensor("W", W, 2)
        check_inexact("W", W)
        W = W.detach()
        if isinstance(permutation, str):
            if permutation != "search":
                raise ValueError(f'permutation must be None, a tensor of indices or "search", got {permutation!r}')
            permutation, _ = search_permutation(W, chain)
        if permutation is not None:
            outer = Permutation(permutation.to(W.device), W.dtype)
            W = W[..., outer.perm]
        values, lower, upper = project_butterfly(W, chain, order)
        if check_int("sweeps", sweeps, 0):
            values, upper = refine(W, values, chain, sweeps)
        B = cls(tuple(map(KroneckerSparse, values)))
        return (B if permutation is None else compose(B, outer)), lower, upper

    @classmethod
    def from_dense(
        cls,
        W: Tensor,
        chain: Chain | None = None,
        permutation: Tensor | str | None = None,
        order: str = "balanced",
        sweeps: int = 0,
    ) -> StructuredMatrix:
        """A butterfly near to a dense matrix: exact where there is one, else within sqrt(log n) of the nearest.

        ``structmat.project(W, ButterflyConfig(...))`` returns the proof beside it: a bound that no matrix of the chain
        can beat, and one that this one cannot exceed. See :func:`structmat.projection.project_butterfly`.

        Args:
            W: shape (*batch, m, n), floating point or complex. Carries no gradient.
            chain: of the shape (m, n); by default that of the prime factors (:meth:`structure`).
            permutation: of W's columns, before the projection: indices of shape (n,); "search" to try the known ones
                (bit reversal and its kin, at the cost of some ten projections); None for none.
            order: "balanced" or "left-to-right": which factors are split off first.
            sweeps: of alternating least squares afterwards; they never make it worse.

        Returns:
            A butterfly; with a permutation, the product ``Butterfly @ Permutation``.

        Raises:
            TypeError: if W is not a floating-point or complex tensor.
            ValueError: if the chain has another shape, the permutation is none, or W has NaN or infinite entries.

        Example:
            >>> import torch, structmat
            >>> dft = torch.fft.fft(torch.eye(16, dtype=torch.complex128))
            >>> A = structmat.Butterfly.from_dense(dft, permutation="search")
            >>> type(A).__name__, A.num_params, torch.allclose(A.to_dense(), dft, atol=1e-13)
            ('Product', 128, True)
        """
        if chain is None:
            check_tensor("W", W, 2)
            chain = cls.structure(W.shape[-2], W.shape[-1])
        return cls._project(W, chain, permutation, order, sweeps)[0]

    @classmethod
    def from_chain(
        cls,
        chain: Chain,
        batch: tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random butterfly of any chain, with the output variance of ``nn.Linear``."""
        values = tuple(torch.empty((*batch, *p), dtype=dtype, device=device) for p in chain)
        return cls(tuple(map(KroneckerSparse, values))).randomize_(generator=generator)

    @classmethod
    def random(
        cls,
        shape: Any,
        radices: Iterable[int | tuple[int, int]] | None = None,
        pad: bool = False,
        nblocks: int = 1,
        increasing_stride: bool = True,
        rank: int = 1,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random butterfly whose outputs have ``nn.Linear``'s variance.

        Args:
            shape: (*batch, m, n).
            radices: see :meth:`structure`.
            pad: see :meth:`structure`.
            nblocks: how many butterflies to multiply; all but the first to be applied are square. Their strides grow
                and shrink in turns, so that two are a matrix B B'^T, the kaleidoscope's building block.
            increasing_stride: whether the strides of the first to be applied grow in order of application.
            rank: see :meth:`structure`; for one block of growing strides.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        batch, m, n = check_matrix_shape(shape)
        patterns = cls._patterns(m, n, radices, pad, nblocks, increasing_stride, rank)
        values = tuple(torch.empty((*batch, *p), dtype=dtype, device=device) for p in patterns)
        return cls(tuple(map(KroneckerSparse, values)), m, n).randomize_(generator=generator)

    @classmethod
    def _patterns(
        cls,
        m: int,
        n: int,
        radices: Iterable[int | tuple[int, int]] | None,
        pad: bool,
        nblocks: int,
        increasing_stride: bool,
        rank: int,
    ) -> list[Pattern]:
        check_int("nblocks", nblocks)
        chain = list(cls.structure(m, n, radices, pad, rank))
        if rank > 1 and (nblocks > 1 or not increasing_stride):
            raise ValueError("a rank above 1 is for one block of growing strides: nblocks=1, increasing_stride=True")
        square = list(Chain.mixed_radix([p.b for p in chain]))
        if not increasing_stride:  # radices in the same order, strides the other way round
            chain = [p.mT for p in reversed(list(Chain.mixed_radix([(p.c, p.b) for p in reversed(chain)])))]
        patterns = chain
        for block in range(1, nblocks):
            grows = increasing_stride == (block % 2 == 0)
            patterns = (square if grows else [p.mT for p in reversed(square)]) + patterns
        return patterns

    @classmethod
    def identity(
        cls,
        n: int,
        radices: Iterable[int | tuple[int, int]] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """The identity of size n, every factor of which is one."""
        chain = cls.structure(n, n, radices)
        for p in chain:
            if p.b != p.c:
                raise ValueError(f"radices must be square for an identity, got {(p.b, p.c)}")
        eyes = (torch.eye(p.b, dtype=dtype, device=device)[..., None].repeat(p.a, 1, 1, p.d) for p in chain)
        return cls(tuple(map(KroneckerSparse, eyes)))

    @classmethod
    def from_twiddle(cls, twiddle: Tensor, increasing_stride: bool = True) -> Butterfly:
        """The matrix of torch_butterfly's parameters for one stack.

        Args:
            twiddle: shape (nblocks, log2 n, n / 2, 2, 2), applied from the first block and level on; or with a leading
                dimension of size 1, the stack.
            increasing_stride: whether the strides of the first block are 1, 2, ..., n / 2 in order of application;
                they alternate from block to block.

        Raises:
            ValueError: if the shape is not that of a twiddle.
        """
        return cls(tuple(map(KroneckerSparse, twiddle_values(twiddle, increasing_stride))))

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        # Of a chain of rank 1 one path joins every input to every output: its factors' variances multiply.
        full = self.factors[-1].shape[-1]
        gain = std * math.sqrt(full / max(self.ncols, 1))
        for i, f in enumerate(self.factors):
            f.randomize_(gain if i == 0 else 1.0, generator)
        return self
