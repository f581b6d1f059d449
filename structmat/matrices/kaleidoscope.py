"""Kaleidoscope matrices: products of butterflies and transposed butterflies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_int, check_matrix_shape
from structmat.base import LINEAR_STD, StructuredMatrix, matrix, static
from structmat.matrices._kaleidoscope_radices import admissible_size, pair_patterns, palindrome, radices_of
from structmat.matrices._kaleidoscope_stages import kaleidoscope_flops, kaleidoscope_stages
from structmat.matrices._merge import stage_product
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.kronecker_sparse import KroneckerSparse


@matrix
class Kaleidoscope(StructuredMatrix):
    """``S (B_1 B_1'^* ... B_w B_w'^*) S^T``, all B butterflies of size N, S the first rows of the identity.

    The B and B' are independent of each other. Of N = 2^L each has L factors of 2 N numbers; other sizes have mixed
    radices. The expansion is N over the larger of rows and columns. A linear circuit of s gates and depth d on n inputs
    is a matrix of width O(d) and expansion O(s / n); width 1 has all permutations, circulant and Fourier matrices,
    which :mod:`structmat.kaleidoscopes` writes down. Closed under products of one N (widths add), products with
    diagonal matrices, transposes, conjugates, and, uncropped, inverses; :meth:`sum` adds.

    A product takes 2 w + 1 stages up to N = 8192 or so: factors merge as those of a :class:`Butterfly` do, also those
    of neighbouring butterflies. Where a matrix is cropped some numbers meet cropped entries only, and change nothing.

    Source: Dao et al. 2020, "Kaleidoscope: an efficient, learnable representation for all structured linear maps".

    Args:
        factors: from left to right, :class:`KroneckerSparse` matrices or tensors of their values (*batch, r, c, c, d):
            for each of the w pairs those of patterns (1, p_1, p_1, N / p_1), ..., (N / p_k, p_k, p_k, 1), and then in
            reverse, for one sequence p of radices.
        nrows: rows to keep, all by default.
        ncols: columns to keep, all by default.

    Raises:
        TypeError: if a factor is something else, or dtypes differ.
        ValueError: if the patterns are others, batches or devices differ, or a crop is out of range.

    Example:
        >>> import torch, structmat
        >>> K = structmat.Kaleidoscope.random((1000, 1000), width=2, generator=torch.Generator().manual_seed(0))
        >>> K.radices, K.width, K.num_params
        ((2, 5, 2, 5, 5, 2), 2, 84000)
        >>> K.linear(torch.ones(3, 1000)).shape
        torch.Size([3, 1000])
    """

    factors: tuple[KroneckerSparse, ...]
    nrows: int = static(default=None)
    ncols: int = static(default=None)

    def __post_init__(self) -> None:
        whole = Butterfly(self.factors, self.nrows, self.ncols)  # checks sizes, dtypes, batches and crops
        found = list(whole.patterns)
        pair = pair_patterns(radices_of(found))
        if found != pair * max(1, len(found) // len(pair)):
            raise ValueError(
                f"factors must have the patterns {[tuple(p) for p in pair]}, as often as the width says, got "
                f"{[tuple(p) for p in found]}"
            )
        for name in ("factors", "nrows", "ncols"):
            object.__setattr__(self, name, getattr(whole, name))

    def _like(self, factors: Iterable[KroneckerSparse], nrows: int, ncols: int) -> Kaleidoscope:
        # Of the same radices, so valid by construction.
        return self._rebuild((tuple(factors),), (nrows, ncols))

    # ---------------------------------------------------------------- structure
    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.factors[0].batch_shape, self.nrows, self.ncols))

    @property
    def size(self) -> int:
        """N, rows and columns of every factor."""
        return self.factors[0].pattern.shape[0]

    @property
    def radices(self) -> tuple[int, ...]:
        """The block sizes of every B, from left to right; their product is N."""
        return radices_of([f.pattern for f in self.factors])

    @property
    def width(self) -> int:
        """The number w of pairs B B'^*."""
        return len(self.factors) // (2 * len(self.radices))

    @property
    def expansion(self) -> float:
        """N over the larger of rows and columns."""
        return self.size / max(self.nrows, self.ncols)

    def butterfly(self) -> Butterfly:
        """The same matrix as a butterfly of all factors."""
        return Butterfly._rebuild((self.factors,), (self.nrows, self.ncols))

    # ---------------------------------------------------------------- products
    def _linear(self, x: Tensor) -> Tensor:
        stages = kaleidoscope_stages(tuple(f.values for f in self.factors), self.radices)
        return stage_product(x, stages, self.nrows)

    @property
    def mT(self) -> Kaleidoscope:
        return self._like((f.mT for f in reversed(self.factors)), self.ncols, self.nrows)

    @property
    def flops(self) -> int:
        return math.prod(self.batch_shape) * kaleidoscope_flops(self.radices, self.width)

    # ---------------------------------------------------------------- solving
    @property
    def _solve_flops(self) -> int:
        return self.butterfly()._solve_flops

    def _solve(self, b: Tensor) -> Tensor:
        return self.butterfly()._solve(b)

    def inverse(self) -> Kaleidoscope:
        """The inverse, factor by factor: a kaleidoscope of the same width.

        Raises:
            ValueError: if the matrix is cropped (of expansion above 1, or not square).
        """
        return self._like(self.butterfly().inverse().factors, self.ncols, self.nrows)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        return self.butterfly().slogdet()

    # ---------------------------------------------------------------- algebra
    def _scale(self, scalar: Tensor) -> Kaleidoscope:
        return self._like((self.factors[0]._scale(scalar), *self.factors[1:]), self.nrows, self.ncols)

    def _times(self, diag: Tensor) -> Kaleidoscope:
        """``A @ Diagonal(diag)``, as a matrix that is zero in the columns of which A keeps none."""
        last = self.factors[-1]._compose(Diagonal(F.pad(diag, (0, self.size - self.ncols))))
        return self._like((*self.factors[:-1], last), self.nrows, self.ncols)  # pyright: ignore[reportArgumentType]

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal) and other.batch_shape in ((), self.batch_shape):
            return self._times(other.diag)
        if not isinstance(other, Kaleidoscope) or (other.radices, other.batch_shape) != (
            self.radices,
            self.batch_shape,
        ):
            return None
        # What S^T S crops between the two.
        left = self if self.ncols == self.size else self._times(self.factors[0].values.new_ones(self.ncols))
        return self._like((*left.factors, *other.factors), self.nrows, other.ncols)

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        if isinstance(other, Diagonal) and other.batch_shape in ((), self.batch_shape):
            return self.mT._times(other.diag).mT
        return None

    @classmethod
    def sum(cls, terms: Sequence[Kaleidoscope]) -> Kaleidoscope:
        """The sum of kaleidoscopes as one: of their largest width, and of the sum of their expansions.

        The terms stand side by side in a matrix k times as large, a radix k on top of theirs; the outermost factors
        copy the vector into all of them and add up. ``A + B`` stays lazy, and costs as much.

        Args:
            terms: k >= 1 matrices of one shape, sequence of radices, dtype and device.

        Raises:
            TypeError: if a term is no Kaleidoscope, or dtypes differ.
            ValueError: if there is none, or shapes, radices or devices differ.

        Example:
            >>> from structmat import Kaleidoscope
            >>> A = Kaleidoscope.sum([Kaleidoscope.random((8, 8)), Kaleidoscope.random((8, 8), width=2)])
            >>> A.width, A.expansion, A.shape
            (2, 2.0, torch.Size([8, 8]))
        """
        terms = list(terms)
        if not terms:
            raise ValueError("terms must hold at least one Kaleidoscope, got none")
        for term in terms:
            if not isinstance(term, Kaleidoscope):
                raise TypeError(f"terms must be Kaleidoscope matrices, got a {type(term).__name__}")
            for name in ("shape", "radices", "device"):
                if (got := getattr(term, name)) != (want := getattr(terms[0], name)):
                    raise ValueError(f"terms must have one {name}, got {want} and {got}")
            if term.dtype != terms[0].dtype:
                raise TypeError(f"terms must have one dtype, got {terms[0].dtype} and {term.dtype}")
        first, count = terms[0], len(terms)
        if count == 1:
            return first
        eye = cls.identity(first.size, radices=first.radices, dtype=first.dtype, device=first.device).factors
        eye = tuple(KroneckerSparse(f.values.expand(*first.batch_shape, *f.pattern)) for f in eye)
        width = max(t.width for t in terms)
        padded = [(*t.factors, *(eye * (width - t.width))) for t in terms]
        inner = [KroneckerSparse(torch.cat([f.values for f in level], -4)) for level in zip(*padded, strict=True)]
        keep = torch.eye(count, dtype=first.dtype, device=first.device)
        add, block, factors = torch.zeros_like(keep), 2 * len(first.radices), []
        add[0] = 1
        for i in range(width):
            ends = add if i == 0 else keep, add.mT if i == width - 1 else keep
            shape = (*first.batch_shape, 1, count, count, first.size)
            left, right = (KroneckerSparse(e[..., None].expand(shape).clone()) for e in ends)
            factors += [left, *inner[i * block : (i + 1) * block], right]
        return cls(tuple(factors), first.nrows, first.ncols)

    # ---------------------------------------------------------------- construction
    @classmethod
    def structure(cls, size: int, expansion: int = 1, radices: Iterable[int] | None = None) -> tuple[int, ...]:
        """The radices of every B of a kaleidoscope for vectors of a size.

        Args:
            size: the larger of rows and columns.
            expansion: how many times as large N is to be.
            radices: any that multiply to N >= expansion * size; by default N is the next number without prime factors
                above 7, and the radices are those, in an order that is the same from both ends where it can be.

        Raises:
            TypeError: if an argument is not an integer.
            ValueError: if one is not positive, or radices multiply to less.
        """
        wanted = check_int("size", size) * check_int("expansion", expansion)
        if radices is None:
            return palindrome(admissible_size(wanted))
        radices = tuple(check_int("a radix", r) for r in radices)
        if not radices or math.prod(radices) < wanted:
            raise ValueError(f"radices must multiply to at least {expansion} * {size} = {wanted}, got {radices}")
        return radices

    @classmethod
    def random(
        cls,
        shape: Any,
        width: int = 1,
        expansion: int = 1,
        radices: Iterable[int] | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random kaleidoscope of orthogonal (complex: unitary) factors, with ``nn.Linear``'s output variance.

        Args:
            shape: (*batch, m, n).
            width: number of pairs B B'^*.
            expansion: how many times as large as max(m, n) N is to be; see :meth:`structure`.
            radices: see :meth:`structure`.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if width or expansion is not positive, or radices multiply to less than needed.
        """
        batch, m, n = check_matrix_shape(shape)
        patterns = pair_patterns(cls.structure(max(m, n), expansion, radices)) * check_int("width", width)
        values = (torch.empty((*batch, *p), dtype=dtype, device=device) for p in patterns)
        return cls(tuple(map(KroneckerSparse, values)), m, n).randomize_(generator=generator)

    @classmethod
    def identity(
        cls,
        n: int,
        width: int = 1,
        expansion: int = 1,
        radices: Iterable[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """The identity of size n, every factor of which is one.

        Args:
            n: rows and columns.
            width: see :meth:`random`.
            expansion: see :meth:`random`.
            radices: see :meth:`structure`.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.
        """
        patterns = pair_patterns(cls.structure(n, expansion, radices)) * check_int("width", width)
        eyes = (torch.eye(p.b, dtype=dtype, device=device)[..., None].repeat(p.a, 1, 1, p.d) for p in patterns)
        return cls(tuple(map(KroneckerSparse, eyes)), n, n)

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        # Rows of an orthogonal matrix have length one, whatever the width: no draw has more variance than another, as
        # products of many factors with independent entries do.
        for i, f in enumerate(self.factors):
            _reflections_(f.values, std * math.sqrt(self.size / self.ncols) if i == 0 else 1.0, generator)
        return self


@torch.no_grad()
def _reflections_(values: Tensor, scale: float, generator: torch.Generator | None) -> None:
    """Fill values (*batch, a, b, b, d) in place with ``scale`` times random reflections, columns of random signs."""
    if values.device.type == "meta":
        return
    dtype = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    draw = torch.empty_like(values, dtype=dtype, memory_format=torch.contiguous_format).normal_(generator=generator)
    # Of sharded parameters (FSDP2) every process has whole blocks.
    draw, values = (getattr(t, "to_local", lambda t=t: t)() for t in (draw, values))
    v, signs = draw[..., :1, :], draw[..., -1:, :].transpose(-3, -2)  # with one column both are the same, which is ±1
    v = v / torch.linalg.vector_norm(v, dim=-3, keepdim=True)
    mirror = -2 * v * v.conj().transpose(-3, -2)
    mirror.diagonal(dim1=-3, dim2=-2).add_(1)
    values.copy_(mirror.mul_(signs.sgn() * scale))
