"""Sizes, radices and patterns of kaleidoscope matrices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

from structmat.chain import Chain, Pattern

#: Sizes without larger prime factors need no padding: blocks of any of these cost about as much for what they mix.
_PRIMES = (2, 3, 5, 7)


def admissible_size(n: int) -> int:
    """The smallest number that is at least n and has no prime factor above 7."""
    while _rest(n) > 1:
        n += 1
    return n


def _rest(n: int) -> int:
    for p in _PRIMES:
        while n % p == 0:
            n //= p
    return n


def paired_primes(n: int) -> tuple[list[int], list[int]]:
    """The prime factors of n that come in pairs, once each, and those left over."""
    pairs, single, rest, p = [], [], n, 2
    while rest > 1:
        count = 0
        while rest % p == 0:
            rest, count = rest // p, count + 1
        pairs += [p] * (count // 2)
        single += [p] * (count % 2)
        p += 1
    return pairs, single


def palindrome(n: int) -> tuple[int, ...]:
    """The prime factors of n: pairs of equal ones around those that are left over, (1,) of 1."""
    pairs, single = paired_primes(n)
    return (*pairs, *single, *reversed(pairs)) or (1,)


def radices_of(patterns: list[Pattern]) -> tuple[int, ...]:
    """Those of the first butterfly, which ends where a pattern stands twice."""
    turn = next((i for i, (p, q) in enumerate(itertools.pairwise(patterns), 1) if p == q), len(patterns))
    return tuple(p.b for p in patterns[:turn])


@functools.lru_cache(256)
def _patterns(radices: tuple[int, ...]) -> tuple[Pattern, ...]:
    chain = Chain.mixed_radix(radices).patterns
    return (*chain, *reversed(chain))


def pair_patterns(radices: Iterable[int]) -> list[Pattern]:
    """The patterns of B B'^*."""
    return list(_patterns(tuple(radices)))
