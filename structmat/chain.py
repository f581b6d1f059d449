"""Patterns of Kronecker-sparse factors, and chains of them: what a butterfly matrix is a product of."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from structmat._checks import check_int


class Pattern(NamedTuple):
    """The support I_a (x) 1_{b x c} (x) I_d of a Kronecker-sparse factor: a b d rows, a c d columns.

    Entry ((A b + o) d + D, (A c + i) d + D) may be non-zero, for A < a, o < b, i < c and D < d; nothing else is.

    Source: Le, Zheng, Riccietti, Gribonval 2022, "Fast learning of fast transforms, with guarantees".
    """

    a: int
    b: int
    c: int
    d: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.a * self.b * self.d, self.a * self.c * self.d

    @property
    def num_params(self) -> int:
        """Entries of the support."""
        return self.a * self.b * self.c * self.d

    @property
    def mT(self) -> Pattern:
        """The pattern of the transpose."""
        return Pattern(self.a, self.c, self.b, self.d)

    def rank(self, right: Pattern) -> int | None:
        """The rank of the blocks of ``self right``, or None where the two cannot be chained.

        They can where the product's own support is Kronecker-sparse and its blocks are of one rank: a divides right's
        a, right's d divides d, and ``a c / right.a = right.b right.d / d`` is an integer, which is the rank.
        """
        if right.a % self.a or self.d % right.d or (self.a * self.c) % right.a or (right.b * right.d) % self.d:
            return None
        first, second = self.a * self.c // right.a, right.b * right.d // self.d
        return first if first == second else None

    def merge(self, right: Pattern) -> Pattern:
        """The pattern of ``self right``.

        Raises:
            ValueError: if the two cannot be chained.
        """
        if self.rank(right) is None:
            raise ValueError(unchainable(self, right))
        return Pattern(self.a, self.b * self.d // right.d, right.a * right.c // self.a, right.d)


def unchainable(left: Pattern, right: Pattern) -> str:
    """Why two patterns cannot be chained, in words."""
    (_, columns), (rows, _) = left.shape, right.shape
    names = f"patterns {tuple(left)} and {tuple(right)} cannot be chained: "
    if columns != rows:
        return names + f"the first has {columns} columns, the second {rows} rows"
    if right.a % left.a:
        return names + f"the first's a = {left.a} must divide the second's a = {right.a}"
    if left.d % right.d:
        return names + f"the second's d = {right.d} must divide the first's d = {left.d}"
    return names + (
        f"a c / a' = {left.a} * {left.c} / {right.a} and b' d' / d = {right.b} * {right.d} / {left.d} must be the same "
        "integer, the rank of the blocks of their product"
    )


@dataclasses.dataclass(frozen=True)
class Chain:
    """Patterns of the factors of a product, from left to right, each chainable with the next.

    Then every run of factors merges into one Kronecker-sparse factor (in any order: chaining is associative), and a
    dense matrix can be projected on the chain with an error that is bounded from both sides. The transposed patterns in
    reverse order are no chain, their strides grow the other way; matrices of both kinds multiply equally fast.

    Args:
        patterns: a :class:`Pattern` or a tuple (a, b, c, d) for every factor.

    Raises:
        TypeError: if an entry is not an integer.
        ValueError: if there is no pattern, an entry is not positive, or two neighbours cannot be chained.

    Example:
        >>> from structmat import Chain
        >>> chain = Chain.dyadic(8)
        >>> [tuple(p) for p in chain], chain.shape, chain.num_params
        ([(1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)], (8, 8), 48)
        >>> tuple(chain.merged(0, 2))
        (1, 4, 4, 2)
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        patterns = tuple(Pattern(*(check_int("a pattern's entry", v) for v in p)) for p in self.patterns)
        if not patterns:
            raise ValueError("a chain needs at least one pattern")
        for left, right in itertools.pairwise(patterns):
            if left.rank(right) is None:
                raise ValueError(unchainable(left, right))
        object.__setattr__(self, "patterns", patterns)

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self.patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    def __getitem__(self, index: int) -> Pattern:
        return self.patterns[index]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self[0].shape[0], self[-1].shape[1]

    @property
    def num_params(self) -> int:
        """Entries of all supports."""
        return sum(p.num_params for p in self)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank at every split: between factor i and the next, for i = 0, 1, ..."""
        return tuple(left.rank(right) or 0 for left, right in itertools.pairwise(self.patterns))

    def merged(self, start: int, stop: int) -> Pattern:
        """The pattern of the product of factors ``start`` to ``stop - 1``."""
        first, last = self[start], self[stop - 1]
        return Pattern(first.a, first.b * first.d // last.d, last.a * last.c // first.a, last.d)

    # ---------------------------------------------------------------- the usual ones
    @classmethod
    def dyadic(cls, n: int, rank: int = 1) -> Chain:
        """The chain of square butterflies of size n = 2^L.

        Of rank 1: L factors of 2 n numbers, those of the fast Fourier transform. Of rank r: L - 2 log2(r) factors of
        2 r^2 n numbers, whose products have blocks of rank r; the real part of a complex butterfly of rank 1 has rank 2
        (Chaumette, Gribonval and Riccietti).

        Args:
            n: a power of two.
            rank: a power of two with 4 rank^2 <= n, or 1.

        Raises:
            ValueError: if n or rank is no power of two, or the rank is too large.
        """
        check_int("n", n)
        check_int("rank", rank)
        if n < 2 or n & (n - 1):
            raise ValueError(f"n must be a power of two, got {n}; for other sizes use Chain.mixed_radix(radices)")
        if rank & (rank - 1) or (rank > 1 and 4 * rank * rank > n):
            raise ValueError(f"rank must be a power of two with 4 rank^2 <= n = {n}, got {rank}")
        if rank == 1:
            return cls.mixed_radix([2] * (n.bit_length() - 1))
        width = 2 * rank
        inner = [Pattern(1 << l, width, width, n >> (l + 1)) for l in range(_log2(width), _log2(n // (4 * rank)) + 1)]
        first, last = Pattern(1, width, width * rank, n // width), Pattern(n // width, width * rank, width, 1)
        return cls((first, *inner, last))

    @classmethod
    def mixed_radix(cls, radices: Iterable[int | tuple[int, int]]) -> Chain:
        """One factor of blocks b x c for every radix (b, c), or b x b for a number: of rank 1 at every split.

        The product has prod(b) rows and prod(c) columns: 1000 = 2 2 2 5 5 5 is a butterfly without padding.

        Args:
            radices: from left to right.
        """
        pairs = [r if isinstance(r, tuple) else (r, r) for r in radices]
        for pair in pairs:
            for v in pair:
                check_int("a radix", v)
        return cls(
            tuple(
                Pattern(math.prod(c for _, c in pairs[:i]), b, c, math.prod(b for b, _ in pairs[i + 1 :]))
                for i, (b, c) in enumerate(pairs)
            )
        )

    @classmethod
    def monarch(cls, m: int, n: int, nblocks: int, rank: int = 1) -> Chain:
        """Two factors: ``nblocks`` blocks of n / nblocks columns, m / nblocks rows, whose slices have a rank.

        Raises:
            ValueError: if nblocks divides not both sizes.
        """
        for name, v in (("m", m), ("n", n), ("nblocks", nblocks), ("rank", rank)):
            check_int(name, v)
        if m % nblocks or n % nblocks:
            raise ValueError(f"nblocks must divide m = {m} and n = {n}, got {nblocks}")
        return cls(
            (Pattern(1, m // nblocks, nblocks * rank, nblocks), Pattern(nblocks, nblocks * rank, n // nblocks, 1))
        )


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _primes(n: int) -> list[int]:
    """Prime factors, the largest first."""
    found, p = [], 2
    while p * p <= n:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return sorted([*found, n] if n > 1 else found, reverse=True)


def prime_radices(m: int, n: int) -> list[tuple[int, int]]:
    """Radices of an m x n butterfly: the prime factors of both sizes, in as many groups as the shorter list has."""
    rows, columns = _primes(m) or [1], _primes(n) or [1]
    count = min(len(rows), len(columns))

    def grouped(primes: list[int]) -> list[int]:
        groups = [1] * count
        for p in primes:  # the next one to the smallest group
            groups[groups.index(min(groups))] *= p
        return sorted(groups, reverse=True)

    return list(zip(grouped(rows), grouped(columns), strict=True))
