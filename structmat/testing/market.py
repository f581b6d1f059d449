"""One entry for every class and structure: a new class is tested everywhere by adding its entries here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from structmat import layouts
from structmat.base import StructuredMatrix
from structmat.chain import Chain
from structmat.kaleidoscopes import permutation
from structmat.lazy import Inverse, Kronecker, Product, Scaled, Sum, Transposed
from structmat.matrices import (
    BlockDiagonal,
    BlockSparse,
    Butterfly,
    Cauchy,
    CausalToeplitz,
    Circulant,
    Dense,
    Diagonal,
    Hankel,
    Kaleidoscope,
    KroneckerSparse,
    LowRank,
    Monarch,
    OrthogonalButterfly,
    Permutation,
    PivotedLowRank,
    Pixelfly,
    Toeplitz,
    Vandermonde,
)
from structmat.testing import causal, displacement
from structmat.testing.definitions import dense_by_definition
from structmat.testing.entry import Entry
from structmat.transforms import Selection, dct, haar

Make = Callable[[torch.dtype, Any], StructuredMatrix]
# What torch.linalg factorises.
_SOLVABLE = (torch.float64, torch.complex128, torch.float32, torch.complex64)
# Of entries that do not have all dtypes, by how their names begin.
_DTYPES = {"inverse": _SOLVABLE, "shifteigenvectors": (torch.complex128, torch.complex64)}


def _random(cls: Any, *args: Any, **structure: Any) -> Make:
    return lambda dtype, device: cls.random(*args, **structure, dtype=dtype, device=device)


def _near_identity(*shape: int) -> Callable[[torch.dtype, Any], Tensor]:
    """Square blocks that are safely invertible: the identity plus something of norm below one."""

    def make(dtype: torch.dtype, device: Any) -> Tensor:
        n = shape[-1]
        noise = torch.randn(shape, dtype=dtype) / (4 * n**0.5)
        return (torch.eye(n, dtype=dtype) + noise).to(device)

    return make


def _invertible_monarch(l: int, s: int, k: int, p: int, batch: tuple[int, ...] = ()) -> Make:
    left, right = _near_identity(*batch, l, s, s), _near_identity(*batch, k, p, p)
    return lambda dtype, device: Monarch(left(dtype, device), right(dtype, device))


def _invertible_blocks(k: int, q: int, size: int) -> Make:
    blocks = _near_identity(k, q, q)
    return lambda dtype, device: BlockDiagonal(blocks(dtype, device), size, size)


def _invertible_kronecker_sparse(a: int, b: int, d: int) -> Make:
    blocks = _near_identity(a, d, b, b)
    return lambda dtype, device: KroneckerSparse(blocks(dtype, device).movedim(-3, -1))


def _invertible_butterfly(*patterns: tuple[int, int, int, int], batch: tuple[int, ...] = ()) -> Make:
    """Factors whose blocks are near the identity, of square patterns."""
    blocks = [_near_identity(*batch, a, d, b, b) for a, b, _, d in patterns]
    return lambda dt, dev: Butterfly(tuple(KroneckerSparse(f(dt, dev).movedim(-3, -1)) for f in blocks))


def _invertible_dense(*shape: int) -> Make:
    weight = _near_identity(*shape)
    return lambda dtype, device: Dense(weight(dtype, device))


def _dominant(cls: Any, shape: tuple[int, ...], *structure: Any) -> Make:
    """Of a first column that begins with a number larger than the others together."""

    def make(dtype: torch.dtype, device: Any) -> StructuredMatrix:
        column = torch.rand(shape, dtype=dtype) / (2 * shape[-1])
        column[..., 0] += 1
        return cls(column.to(device), *structure)

    return make


def _invertible_diagonals(cls: Any, n: int, batch: tuple[int, ...] = ()) -> Make:
    """A Toeplitz or a Hankel matrix whose middle (anti)diagonal is larger than the others together."""

    def make(dtype: torch.dtype, device: Any) -> StructuredMatrix:
        entries = torch.randn(*batch, 2 * n - 1, dtype=dtype) / (4 * n**0.5)
        entries[..., n - 1] += 1
        made = Toeplitz.from_diagonals if cls is Toeplitz else Hankel.from_entries
        return made(entries.to(device), n)

    return make


def _vandermonde(m: int, n: int, batch: tuple[int, ...] = ()) -> Make:
    """Nodes evenly spread in [-1, 1] or on the unit circle, and moved a little."""

    def make(dtype: torch.dtype, device: Any) -> StructuredMatrix:
        spread = torch.arange(m, dtype=torch.float64) + 0.4 * torch.rand(*batch, m, dtype=torch.float64) - 0.2
        circle = torch.polar(torch.ones_like(spread), 2 * torch.pi * spread / m)
        return Vandermonde((circle if dtype.is_complex else 2 * (spread + 0.5) / m - 1).to(device), n).to(dtype)

    return make


def _kaleidoscope_sum(dtype: torch.dtype, device: Any) -> StructuredMatrix:
    """Of different widths and a matrix that is cropped."""
    return Kaleidoscope.sum([Kaleidoscope.random((3, 4), w, dtype=dtype, device=device) for w in (1, 2)])


def _join(cls: Any, *makes: Make) -> Make:
    return lambda dtype, device: cls(tuple(m(dtype, device) for m in makes))


def _wrap(cls: Any, make: Make, *args: Any) -> Make:
    return lambda dtype, device: cls(make(dtype, device), *args)


def _entries() -> Iterator[tuple[str, Make, bool]]:
    """Name, factory, and whether the matrix is invertible."""
    yield "dense", _random(Dense, (5, 7)), False
    yield "dense-square", _invertible_dense(6, 6), True
    yield "dense-batch", _random(Dense, (2, 3, 4, 5)), False
    yield "diagonal", lambda dt, dev: Diagonal(2 + torch.rand(7, dtype=dt).to(dev)), True
    yield "diagonal-one", lambda dt, dev: Diagonal(2 + torch.rand(1, dtype=dt).to(dev)), True
    yield "diagonal-batch", lambda dt, dev: Diagonal(2 + torch.rand(3, 5, dtype=dt).to(dev)), True
    yield "permutation", _random(Permutation, (11, 11)), True
    yield "permutation-batch", _random(Permutation, (2, 6, 6)), True
    yield "lowrank", _random(LowRank, (7, 11), 3), False
    yield "lowrank-row", _random(LowRank, (1, 5), 1), False
    yield "lowrank-batch", _random(LowRank, (2, 3, 5, 4), 2), False
    yield "pivotedlowrank", _random(PivotedLowRank, (7, 11), 3), False
    yield "pivotedlowrank-tall", _random(PivotedLowRank, (11, 4), 4), False
    yield "pivotedlowrank-whole", _random(PivotedLowRank, (3, 5), 3), False
    yield "pivotedlowrank-one", _random(PivotedLowRank, (1, 1), 1), False
    yield "pivotedlowrank-batch", _random(PivotedLowRank, (2, 3, 5, 4), 2), False
    yield "blockdiagonal", _random(BlockDiagonal, (6, 9), nblocks=3), False
    yield "blockdiagonal-prime", _random(BlockDiagonal, (7, 11), nblocks=3), False
    yield "blockdiagonal-square", _invertible_blocks(3, 4, 12), True
    yield "blockdiagonal-cropped", _invertible_blocks(3, 4, 11), True
    yield "blockdiagonal-column", _random(BlockDiagonal, (5, 1), nblocks=1), False
    yield "blockdiagonal-batch", _random(BlockDiagonal, (2, 4, 6), nblocks=2), False
    grid = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    empty_rows = layouts.Layout(grid, (2, 3))
    flat = layouts.flat_butterfly((12, 14), (4, 2), max_stride=2)  # a 3 x 7 grid
    cut = layouts.banded((7, 11), (2, 3))
    yield "blocksparse", _random(BlockSparse, (8, 8), layouts.flat_butterfly((8, 8), 2, max_stride=2)), False
    yield "blocksparse-grid", _random(BlockSparse, (12, 14), flat), False
    yield "blocksparse-cut", _random(BlockSparse, (7, 11), cut), False
    yield "blocksparse-one", _random(BlockSparse, (3, 5), layouts.full((3, 5), (3, 5))), False
    yield "blocksparse-entries", _random(BlockSparse, (5, 5), 0.4, block=1), False
    yield "blocksparse-row", _random(BlockSparse, (1, 9), 0.6, block=(1, 2)), False
    yield "blocksparse-empty-rows", _random(BlockSparse, (6, 9), empty_rows), False
    yield "blocksparse-joined", _random(BlockSparse, (6, 9), layouts.Layout(~grid, (2, 3), coarsening=(2, 2))), False
    yield "blocksparse-batch", _random(BlockSparse, (2, 3, 4, 6), layouts.block_diagonal((4, 6), (2, 3))), False
    yield "pixelfly", _random(Pixelfly, (8, 8), layouts.flat_butterfly((8, 8), 2, max_stride=2), rank=2), False
    yield "pixelfly-grid", _random(Pixelfly, (12, 14), flat, rank=3), False
    yield "pixelfly-cut", _random(Pixelfly, (7, 11), cut, rank=1), False
    yield "pixelfly-empty-rows", _random(Pixelfly, (6, 9), empty_rows, rank=2), False
    yield "pixelfly-row", _random(Pixelfly, (1, 5), layouts.banded((1, 5), (1, 2)), rank=1), False
    yield "pixelfly-batch", _random(Pixelfly, (2, 3, 4, 6), layouts.block_diagonal((4, 6), (2, 3)), rank=1), False
    yield "monarch", _random(Monarch, (6, 10), nblocks=2), False
    yield "monarch-square", _invertible_monarch(3, 4, 2, 6), True
    yield "monarch-sqrt", _invertible_monarch(4, 4, 4, 4), True
    yield "monarch-prime", _random(Monarch, (13, 7), nblocks=(2, 3)), False
    yield "monarch-rank", _random(Monarch, (11, 13), nblocks=(3, 2), rank=2), False
    yield "monarch-uneven", _random(Monarch, (13, 13), nblocks=4), False
    yield "monarch-empty-block", _random(Monarch, (5, 5), nblocks=4), False
    yield "monarch-row", _random(Monarch, (1, 9), nblocks=(3, 1)), False
    yield "monarch-column", _random(Monarch, (9, 1), nblocks=(1, 3)), False
    yield "monarch-batch", _random(Monarch, (2, 3, 6, 4), nblocks=2), False
    yield "monarch-batch-square", _invertible_monarch(2, 3, 3, 2, batch=(2,)), True
    yield "kroneckersparse", _random(KroneckerSparse, (12, 8), a=2, d=2), False
    yield "kroneckersparse-prime", _random(KroneckerSparse, (7, 5), a=1, d=1), False
    yield "kroneckersparse-strided", _random(KroneckerSparse, (6, 9), a=1, d=3), False
    yield "kroneckersparse-square", _invertible_kronecker_sparse(2, 3, 2), True
    yield "kroneckersparse-batch", _random(KroneckerSparse, (2, 3, 4, 6), a=2, d=1), False
    yield "butterfly", _random(Butterfly, (8, 16)), False
    yield "butterfly-mixed", _random(Butterfly, (12, 18), radices=(2, (3, 3), (2, 3))), False
    yield "butterfly-rectangular", _random(Butterfly, (6, 15)), False
    yield "butterfly-prime", _random(Butterfly, (7, 11)), False
    yield "butterfly-padded", _random(Butterfly, (7, 11), pad=True), False
    yield "butterfly-row", _random(Butterfly, (1, 6)), False
    yield "butterfly-column", _random(Butterfly, (6, 1)), False
    yield "butterfly-batch", _random(Butterfly, (2, 3, 4, 6)), False
    yield "butterfly-rank", lambda dt, dev: Butterfly.from_chain(Chain.dyadic(16, 2), dtype=dt, device=dev), False
    yield "butterfly-square", _invertible_butterfly((1, 2, 2, 6), (2, 3, 3, 2), (6, 2, 2, 1)), True
    yield "butterfly-reversed", _invertible_butterfly((4, 2, 2, 1), (2, 2, 2, 2), (1, 2, 2, 4)), True
    yield "butterfly-batch-square", _invertible_butterfly((1, 3, 3, 2), (3, 2, 2, 1), batch=(2,)), True
    yield "kaleidoscope", _random(Kaleidoscope, (8, 8)), True
    yield "kaleidoscope-mixed", _random(Kaleidoscope, (6, 6), width=2), True
    yield "kaleidoscope-batch-square", _random(Kaleidoscope, (2, 4, 4), width=2), True
    yield "kaleidoscope-one", _random(Kaleidoscope, (1, 1), width=2), True
    yield "kaleidoscope-expanded", _random(Kaleidoscope, (4, 4), width=2, expansion=2), False
    yield "kaleidoscope-padded", _random(Kaleidoscope, (11, 11)), False
    yield "kaleidoscope-rows", _random(Kaleidoscope, (3, 10), width=2), False
    yield "kaleidoscope-batch", _random(Kaleidoscope, (2, 3, 4, 6)), False
    yield "kaleidoscope-permutation", lambda dt, dev: permutation(torch.randperm(10), dtype=dt, device=dev), True
    yield "kaleidoscope-sum", _kaleidoscope_sum, False
    yield "orthogonalbutterfly", _random(OrthogonalButterfly, (8, 8)), True
    yield "orthogonalbutterfly-mixed", _random(OrthogonalButterfly, (6, 6), radices=(2, 3)), True
    yield "orthogonalbutterfly-rows", _random(OrthogonalButterfly, (5, 12)), False
    yield "orthogonalbutterfly-columns", _random(OrthogonalButterfly, (7, 3)), False
    yield "orthogonalbutterfly-batch", _random(OrthogonalButterfly, (2, 4, 4)), True
    yield "toeplitz", _invertible_diagonals(Toeplitz, 8), True
    yield "toeplitz-one", _invertible_diagonals(Toeplitz, 1), True
    yield "toeplitz-rectangular", _random(Toeplitz, (6, 10)), False
    yield "toeplitz-prime", _random(Toeplitz, (13, 7)), False
    yield "toeplitz-row", _random(Toeplitz, (1, 5)), False
    yield "toeplitz-column", _random(Toeplitz, (5, 1)), False
    yield "toeplitz-batch", _random(Toeplitz, (2, 3, 4, 6)), False
    yield "toeplitz-batch-square", _invertible_diagonals(Toeplitz, 5, (2,)), True
    yield "causaltoeplitz", _dominant(CausalToeplitz, (9,)), True
    yield "causaltoeplitz-upper", _dominant(CausalToeplitz, (8,), True), True
    yield "causaltoeplitz-one", _dominant(CausalToeplitz, (1,)), True
    yield "causaltoeplitz-batch", _dominant(CausalToeplitz, (2, 3, 5)), True
    yield "hankel", _invertible_diagonals(Hankel, 7), True
    yield "hankel-rectangular", _random(Hankel, (5, 9)), False
    yield "hankel-row", _random(Hankel, (1, 5)), False
    yield "hankel-column", _random(Hankel, (5, 1)), False
    yield "hankel-batch", _random(Hankel, (2, 3, 6, 4)), False
    yield "hankel-batch-square", _invertible_diagonals(Hankel, 4, (2, 1)), True
    yield "circulant", _dominant(Circulant, (8,)), True
    yield "circulant-prime", _dominant(Circulant, (7,)), True
    yield "circulant-skew", _dominant(Circulant, (9,), -1), True
    yield "circulant-skew-even", _dominant(Circulant, (6,), -1), True
    yield "circulant-one", _dominant(Circulant, (1,)), True
    yield "circulant-batch", _dominant(Circulant, (2, 3, 5)), True
    yield "vandermonde", _vandermonde(5, 5), True
    yield "vandermonde-tall", _vandermonde(7, 4), False
    yield "vandermonde-wide", _vandermonde(3, 6), False
    yield "vandermonde-row", _vandermonde(1, 5), False
    yield "vandermonde-column", _vandermonde(5, 1), False
    yield "vandermonde-batch", _vandermonde(3, 3, (2, 2)), True
    yield "cauchy", _random(Cauchy, (8, 8)), True
    yield "cauchy-rectangular", _random(Cauchy, (6, 9)), False
    yield "cauchy-prime", _random(Cauchy, (7, 5)), False
    yield "cauchy-one", _random(Cauchy, (1, 1)), True
    yield "cauchy-row", _random(Cauchy, (1, 5)), False
    yield "cauchy-column", _random(Cauchy, (5, 1)), False
    yield "cauchy-batch", _random(Cauchy, (2, 3, 4, 4)), True
    yield from displacement.entries()
    monarch, square = _random(Monarch, (6, 10), nblocks=2), _invertible_monarch(3, 4, 2, 6)
    yield "transposed", _wrap(Transposed, monarch), False
    yield "transposed-square", _wrap(Transposed, square), True
    yield "product", _join(Product, _random(Dense, (3, 6)), monarch, _random(Permutation, (10, 10))), False
    diagonal: Make = lambda dt, dev: Diagonal(2 + torch.rand(12, dtype=dt).to(dev))  # noqa: E731
    yield "product-square", _join(Product, square, diagonal, _random(Permutation, (12, 12))), True
    yield "product-batch", _join(Product, _random(Dense, (2, 1, 3, 6)), _random(Monarch, (3, 6, 4), 2)), False
    yield "sum", _join(Sum, monarch, _random(LowRank, (6, 10), 2), _random(BlockDiagonal, (6, 10), 2)), False
    yield "sum-batch", _join(Sum, _random(Monarch, (2, 6, 4), 2), _random(LowRank, (6, 4), 1)), False
    yield "scaled", _wrap(Scaled, _random(Permutation, (7, 7)), -0.5), True
    yield "scaled-batch", _wrap(Scaled, _random(Monarch, (2, 6, 4), 2), 3.0), False
    yield "kronecker", _join(Kronecker, _random(Dense, (2, 3)), _random(LowRank, (4, 2), 1)), False
    yield "kronecker-square", _join(Kronecker, _invertible_dense(2, 2), _invertible_monarch(1, 3, 1, 3)), True
    yield "kronecker-three", _join(Kronecker, _random(Dense, (2, 1)), diagonal, _random(Dense, (1, 2))), False
    yield "kronecker-batch", _join(Kronecker, _random(Dense, (3, 2, 2)), _random(Dense, (2, 3))), False
    yield "selection", lambda dt, dev: Selection(torch.tensor([4, 1, 5, 0], device=dev), 5, dt), False
    yield "transform-dct", lambda dt, dev: dct(12, dtype=dt, device=dev), False
    yield "transform-haar", lambda dt, dev: haar(8, dtype=dt, device=dev), True
    yield "inverse", _wrap(Inverse, square), True
    yield "inverse-batch", _wrap(Inverse, _invertible_dense(2, 5, 5)), True


def _selection_by_definition(S: StructuredMatrix) -> Tensor:
    assert isinstance(S, Selection)
    rows = [[float(i == j) for j in range(S.ncols)] for i in S.index.tolist()]
    return torch.tensor(rows, dtype=S.dtype, device=S.device)


def _dtypes(name: str) -> dict[str, tuple[torch.dtype, ...]]:
    found = [dtypes for start, dtypes in _DTYPES.items() if name.startswith(start)]
    return {"dtypes": found[0]} if found else {}


def market(match: str = "") -> list[Entry]:
    """The entries of the library.

    Args:
        match: only entries whose name contains this.

    Example:
        >>> from structmat.testing import market
        >>> [entry.name for entry in market("diagonal-")][:2]
        ['diagonal-one', 'diagonal-batch']
    """
    return [
        Entry(
            name,
            make,
            dense=_selection_by_definition if name == "selection" else dense_by_definition,
            invertible=invertible,
            **_dtypes(name),
        )
        for name, make, invertible in _entries()
        if match in name
    ] + [entry for entry in causal.entries() if match in entry.name]
