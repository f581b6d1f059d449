"""Orthogonal and unitary butterfly matrices, by exponentials of skew blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_matrix_shape
from structmat.base import StructuredMatrix, matrix, static
from structmat.matrices._blocks import uniform_
from structmat.matrices.block_diagonal import crop_size
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.kronecker_sparse import KroneckerSparse


@matrix
class OrthogonalButterfly(StructuredMatrix):
    """A butterfly matrix whose blocks are ``exp(G - G^H)`` of blocks G of any numbers: orthogonal, or unitary.

    It stays so whatever the optimiser does to G. Cropped on one side it has orthonormal rows or columns. Closed under
    transposes, conjugates and, uncropped, inverses. Of size n = 2^L, L factors of 2 n numbers, of which each block uses
    one angle (complex: four numbers).

    Args:
        generators: the blocks G of the factors, from left to right, as Kronecker-sparse matrices of square blocks.
        nrows: rows to keep, all by default; with ``ncols`` only one side may be cropped.
        ncols: columns to keep, all by default.

    Raises:
        TypeError: if a generator is not a KroneckerSparse matrix.
        ValueError: if blocks are not square, sizes do not meet, or both sides are cropped.

    Example:
        >>> import torch, structmat
        >>> Q = structmat.OrthogonalButterfly.random((12, 12), generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(Q.to_dense() @ Q.to_dense().mT, torch.eye(12), atol=1e-5)
        True
    """

    generators: tuple[KroneckerSparse, ...]
    nrows: int = static(default=None)
    ncols: int = static(default=None)

    def __post_init__(self) -> None:
        whole = Butterfly(self.generators)  # checks that sizes meet
        for g in whole.factors:
            if g.pattern.b != g.pattern.c:
                raise ValueError(f"generators must have square blocks, got pattern {tuple(g.pattern)}")
        object.__setattr__(self, "generators", whole.factors)
        object.__setattr__(self, "nrows", crop_size("nrows", self.nrows, whole.shape[-2]))
        object.__setattr__(self, "ncols", crop_size("ncols", self.ncols, whole.shape[-1]))
        if max(self.nrows, self.ncols) < whole.shape[-1]:
            raise ValueError(
                f"only rows or only columns may be cropped, got {self.nrows} x {self.ncols} of {whole.shape[-1]}: what "
                "lacks both has neither orthonormal rows nor columns"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.generators[0].batch_shape, self.nrows, self.ncols))

    def butterfly(self) -> Butterfly:
        """The same matrix as a butterfly with the exponentials for factors."""
        return Butterfly(tuple(map(_exponential, self.generators)), self.nrows, self.ncols)

    def _linear(self, x: Tensor) -> Tensor:
        return self.butterfly()._linear(x)

    @property
    def mT(self) -> OrthogonalButterfly:
        return OrthogonalButterfly(tuple(g.mT for g in reversed(self.generators)), self.ncols, self.nrows)

    @property
    def flops(self) -> int:
        """Of the exponentials (scaling and squaring: about 20 products of blocks each) and of the butterfly."""
        exponentials = sum(40 * g.values.numel() * g.pattern.b for g in self.generators)
        return exponentials + Butterfly(self.generators, self.nrows, self.ncols).flops

    # ---------------------------------------------------------------- solving
    def _check_invertible(self, what: str) -> None:
        self._check_factorisable(what)
        full = self.generators[0].shape[-2]
        if self.nrows != full:
            raise ValueError(f"{what} needs an uncropped matrix, got {self.nrows} x {self.ncols} of {full}")

    @property
    def _solve_flops(self) -> int:
        return self.flops

    def _solve(self, b: Tensor) -> Tensor:
        self._check_invertible("solve")
        inverse: Any = self.H
        return inverse._linear(b.mT).mT

    def inverse(self) -> StructuredMatrix:
        """The conjugate transpose.

        Raises:
            ValueError: if the matrix is cropped.
        """
        self._check_invertible("inverse")
        return self.H

    def slogdet(self) -> tuple[Tensor, Tensor]:
        # det exp(S) = exp(tr S); the trace of G - G^H is 2 i times the imaginary part of that of G.
        self._check_invertible("slogdet")
        traces = [g.values.diagonal(dim1=-3, dim2=-2).sum((-3, -2, -1)) for g in self.generators]
        trace = torch.stack(traces).sum(0)
        sign = torch.exp(trace - trace.conj()) if self.dtype.is_complex else torch.ones_like(trace)
        return sign, torch.zeros_like(trace.real if self.dtype.is_complex else trace)

    # ---------------------------------------------------------------- construction
    @classmethod
    def random(
        cls,
        shape: Any,
        radices: Iterable[int] | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """A random orthogonal (of a complex dtype: unitary) butterfly, cropped to the shape.

        Args:
            shape: (*batch, m, n); of m != n the larger is the size of the square matrix.
            radices: of the square matrix; see :meth:`Butterfly.structure`.
            generator: source of randomness.
            dtype: the default dtype of torch if None.
            device: the default device of torch if None.

        Raises:
            ValueError: if radices do not multiply to the size.
        """
        batch, m, n = check_matrix_shape(shape)
        size = max(m, n)
        chain = Butterfly.structure(size, size, radices)
        values = tuple(torch.empty((*batch, *p), dtype=dtype, device=device) for p in chain)
        return cls(tuple(map(KroneckerSparse, values)), m, n).redraw_(generator)

    def redraw_(self, generator: torch.Generator | None = None) -> Self:
        """New generators in place, of standard deviation one; the outputs' deviation is the inputs'."""
        for g in self.generators:
            uniform_(g.values, 1.0, generator)
        return self


def _exponential(g: KroneckerSparse) -> KroneckerSparse:
    blocks = g._blocks()
    half = blocks.dtype in (torch.float16, torch.bfloat16)
    blocks = blocks.float() if half else blocks
    # matrix_exp takes a view of its argument.
    found = torch.linalg.matrix_exp((blocks - blocks.mH).contiguous())
    return KroneckerSparse._from_blocks(found.to(g.dtype))
