"""Hypothesis strategies: sizes, dtypes, layouts, and matrices of the classes with random structures.

Needs hypothesis (``pip install hypothesis``).
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from structmat import layouts as patterns
from structmat.base import StructuredMatrix
from structmat.lazy import Kronecker, Product, Sum
from structmat.matrices import BlockDiagonal, BlockSparse, Dense, Diagonal, LowRank, Monarch, Permutation, Pixelfly

Strategy = st.SearchStrategy


def register_profiles() -> None:
    """Register the hypothesis profiles ``ci`` (derandomised), ``dev`` (short) and ``nightly`` (long)."""
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("ci", derandomize=True, max_examples=60, **common)
    settings.register_profile("dev", max_examples=30, **common)
    settings.register_profile("nightly", max_examples=2000, **common)


def dtypes(complex: bool = True) -> Strategy[torch.dtype]:
    """float64 and float32, and complex128 and complex64 if asked."""
    real = [torch.float64, torch.float32]
    return st.sampled_from([*real, torch.complex128, torch.complex64] if complex else real)


def sizes(max_size: int = 24) -> Strategy[int]:
    """Sizes from 1; one, primes and powers of two are as likely as the rest."""
    return st.one_of(st.integers(1, max_size), st.sampled_from([s for s in (1, 2, 7, 8, 13, 16, 23) if s <= max_size]))


def batches() -> Strategy[tuple[int, ...]]:
    """Batch shapes of up to two dimensions, an empty one among them."""
    return st.sampled_from([(), (), (), (1,), (3,), (2, 3), (0,)])


def shapes(max_size: int = 24) -> Strategy[tuple[int, ...]]:
    """Matrix shapes (*batch, m, n)."""
    return st.tuples(batches(), sizes(max_size), sizes(max_size)).map(lambda t: (*t[0], t[1], t[2]))


def _square(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-2])


@st.composite
def _built(draw: Any, cls: Any, max_size: int) -> StructuredMatrix:
    shape, dtype, seed = draw(shapes(max_size)), draw(dtypes()), draw(st.integers(0, 2**16))
    m, n = shape[-2:]
    structure: dict[str, Any] = {}
    if cls in (Diagonal, Permutation):
        shape = _square(shape)
    elif cls is LowRank:
        structure["rank"] = draw(st.integers(1, max(m, n)))
    elif cls is BlockDiagonal:
        structure["nblocks"] = draw(st.integers(1, min(m, n)))
    elif cls is Monarch:
        k, l = draw(st.integers(1, n)), draw(st.integers(1, m))
        structure["nblocks"] = (k, l)
        if draw(st.booleans()):
            structure["rank"] = draw(st.integers(1, min(-(-n // k), -(-m // l))))
    return cls.random(shape, **structure, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.Dense` matrices."""
    return _built(Dense, max_size)


def diagonal(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.Diagonal` matrices."""
    return _built(Diagonal, max_size)


def permutation(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.Permutation` matrices."""
    return _built(Permutation, max_size)


def low_rank(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.LowRank` matrices."""
    return _built(LowRank, max_size)


def block_diagonal(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.BlockDiagonal` matrices."""
    return _built(BlockDiagonal, max_size)


def monarch(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.Monarch` matrices: any (k, l), ranked and full."""
    return _built(Monarch, max_size)


@st.composite
def _layout(draw: Any, max_size: int) -> patterns.Layout:
    m, n = draw(sizes(max_size)), draw(sizes(max_size))
    size = (m, n), (draw(st.integers(1, m)), draw(st.integers(1, n)))
    grid = patterns.full(*size).grid
    kind = draw(st.sampled_from(["flat_butterfly", "banded", "bigbird", "random", "mask"]))
    if kind == "flat_butterfly":
        return patterns.flat_butterfly(*size, 1 << draw(st.integers(0, min(grid).bit_length() - 1)))
    if kind == "banded":
        return patterns.banded(*size, draw(st.integers(0, max(grid))))
    if kind == "bigbird":
        return patterns.bigbird(*size, seed=draw(st.integers(0, 2**16)))
    if kind == "random":
        return patterns.random(*size, draw(st.floats(0.01, 1)), draw(st.integers(0, 2**16)))
    rows = st.lists(st.booleans(), min_size=grid[1], max_size=grid[1])
    mask = draw(st.lists(rows, min_size=grid[0], max_size=grid[0]))
    return patterns.Layout(torch.tensor(mask), size[1], size[0])


def layouts(max_size: int = 24) -> Strategy[patterns.Layout]:
    """:class:`structmat.layouts.Layout`: named patterns and any masks, with cut blocks and empty rows."""
    return _layout(max_size)


@st.composite
def _sparse(draw: Any, cls: Any, max_size: int) -> StructuredMatrix:
    layout, batch, dtype = draw(layouts(max_size)), draw(batches()), draw(dtypes())
    rank = {"rank": draw(st.integers(0, min(layout.shape)))} if cls is Pixelfly else {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return cls.random((*batch, *layout.shape), layout, **rank, dtype=dtype, generator=generator)


def block_sparse(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.BlockSparse` matrices of :func:`layouts`."""
    return _sparse(BlockSparse, max_size)


def pixelfly(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """:class:`structmat.Pixelfly` matrices of :func:`layouts` and any rank, 0 among them."""
    return _sparse(Pixelfly, max_size)


@st.composite
def _lazy(draw: Any, max_size: int) -> StructuredMatrix:
    A = draw(st.one_of(low_rank(max_size), block_diagonal(max_size), monarch(max_size)))
    m, n = A.shape[-2:]
    like = {"dtype": A.dtype, "generator": torch.Generator().manual_seed(draw(st.integers(0, 2**16)))}
    kind = draw(st.sampled_from(["transposed", "product", "sum", "scaled", "kronecker"]))
    if kind == "transposed":
        return A.mT
    if kind == "scaled":
        return A * draw(st.floats(-3, 3).filter(lambda c: abs(c) > 0.1))
    if kind == "sum":
        return Sum((A, LowRank.random((m, n), 1, **like)))
    if kind == "kronecker":
        return Kronecker((A, Dense.random((2, 3), **like)))
    return Product((Permutation.random((m, m), **like), A, Diagonal.random((n, n), **like)))


def lazy(max_size: int = 12) -> Strategy[StructuredMatrix]:
    """Transposes, products, sums, scalings and Kronecker products."""
    return _lazy(max_size)


def matrices(max_size: int = 24) -> Strategy[StructuredMatrix]:
    """Matrices of every class."""
    families = (dense, diagonal, permutation, low_rank, block_diagonal, monarch, block_sparse, pixelfly)
    return st.one_of(*(f(max_size) for f in families), lazy(min(max_size, 12)))
