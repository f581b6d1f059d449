"""Dense matrices entry by entry, from the definitions in the docstrings: slow, and independent of the fast code."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
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
    Fastfood,
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
from structmat.matrices.displacement import LDR, Companion, LDRSubdiagonal, LDRTridiagonal, Shift, ShiftEigenvectors
from structmat.testing.displacement import dense_companion, dense_eigenvectors, dense_krylov, dense_ldr, dense_shift


def dense_by_definition(A: StructuredMatrix) -> Tensor:
    """The dense tensor of A, shape (*batch, m, n), made by Python loops over the definition of its class.

    Raises:
        TypeError: if the class has no definition here.
    """
    batch = A.shape[:-2]
    if isinstance(A, (Product, Sum, Kronecker)):
        parts = A.terms if isinstance(A, Sum) else A.factors
        dense = [dense_by_definition(p).expand(*batch, *p.shape[-2:]) for p in parts]
        join = {Product: torch.matmul, Sum: torch.add, Kronecker: _kron}[type(A)]
        return functools.reduce(join, dense)
    if isinstance(A, (Butterfly, Kaleidoscope)):
        return functools.reduce(torch.matmul, map(dense_by_definition, A.factors))[..., : A.nrows, : A.ncols]
    if isinstance(A, OrthogonalButterfly):
        dense = [dense_by_definition(g) for g in A.generators]
        return functools.reduce(torch.matmul, [torch.linalg.matrix_exp(g - g.mH) for g in dense])[
            ..., : A.nrows, : A.ncols
        ]
    if isinstance(A, Pixelfly):
        gamma = A.gamma[..., None]
        return gamma * dense_by_definition(A.block_sparse) + (1 - gamma) * dense_by_definition(A.low_rank)
    if isinstance(A, Companion):
        return dense_companion(A)
    if isinstance(A, ShiftEigenvectors):
        return dense_eigenvectors(A)
    if isinstance(A, Shift):
        return dense_shift(A)
    if isinstance(A, LDR):
        return dense_ldr(A)
    if isinstance(A, (LDRSubdiagonal, LDRTridiagonal)):
        return dense_krylov(A)
    if isinstance(A, Transposed):
        return dense_by_definition(A.base).mT
    if isinstance(A, Scaled):
        return A.scale * dense_by_definition(A.base)
    if isinstance(A, Inverse):
        return torch.linalg.inv(dense_by_definition(A.base))
    if type(A) not in _ENTRIES:
        raise TypeError(f"no definition of {type(A).__name__}; known are {', '.join(c.__name__ for c in _ENTRIES)}")
    tensors = [
        t.expand(*batch, *t.shape[t.ndim - rank :]) for t, rank in zip(A.tensors(), _RANKS[type(A)], strict=True)
    ]
    dense = torch.zeros(A.shape, dtype=A.dtype, device=A.device)
    for index in itertools.product(*(range(b) for b in batch)):
        _ENTRIES[type(A)](dense[index], A, *(t[index] for t in tensors))
    return dense


def _kron(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_zeros(*a.shape[:-2], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])
    for i, j in itertools.product(range(a.shape[-2]), range(a.shape[-1])):
        rows, cols = slice(i * b.shape[-2], (i + 1) * b.shape[-2]), slice(j * b.shape[-1], (j + 1) * b.shape[-1])
        out[..., rows, cols] = a[..., i : i + 1, j : j + 1] * b
    return out


def _dense(out: Tensor, A: Any, weight: Tensor) -> None:
    out.copy_(weight)


def _diagonal(out: Tensor, A: Any, diag: Tensor) -> None:
    for i in range(out.shape[0]):
        out[i, i] = diag[i]


def _permutation(out: Tensor, A: Any, perm: Tensor) -> None:
    for i in range(out.shape[0]):
        out[i, perm[i]] = 1


def _low_rank(out: Tensor, A: Any, left: Tensor, right: Tensor) -> None:
    for c in range(left.shape[1]):
        out += torch.outer(left[:, c], right[c])


def _pivoted_low_rank(out: Tensor, A: Any, pivots: Tensor, rest: Tensor, perm: Tensor) -> None:
    r = len(pivots)
    for i, k in enumerate(perm.tolist()):
        if k < r:
            out[i] = pivots[k]
        else:
            for c in range(r):
                out[i] += rest[k - r, c] * pivots[c]


def _block_diagonal(out: Tensor, A: Any, blocks: Tensor) -> None:
    k, q, p = blocks.shape
    for i, a, b in itertools.product(range(k), range(q), range(p)):
        if i * q + a < out.shape[0] and i * p + b < out.shape[1]:
            out[i * q + a, i * p + b] = blocks[i, a, b]


def _block_sparse(out: Tensor, A: Any, values: Tensor, places: Tensor) -> None:
    nnz, bo, bi = values.shape
    mb = -(-out.shape[0] // bo)
    offsets, columns = places[: mb + 1].tolist(), places[mb + 1 : mb + 1 + nnz].tolist()
    for i in range(mb):
        for k in range(offsets[i], offsets[i + 1]):
            for a, b in itertools.product(range(bo), range(bi)):
                if i * bo + a < out.shape[0] and columns[k] * bi + b < out.shape[1]:
                    out[i * bo + a, columns[k] * bi + b] = values[k, a, b]


def _kronecker_sparse(out: Tensor, A: Any, values: Tensor) -> None:
    a, b, c, d = values.shape
    for i, o, j, k in itertools.product(range(a), range(b), range(c), range(d)):
        out[(i * b + o) * d + k, (i * c + j) * d + k] = values[i, o, j, k]


def _monarch(out: Tensor, A: Any, left: Tensor, right: Tensor) -> None:
    (l, s, r), (k, q, p) = left.shape, right.shape
    first = out.new_zeros(k * q, k * p)
    for i, a, b in itertools.product(range(k), range(q), range(p)):
        first[i * q + a, i * p + b] = right[i, a, b]
    second = out.new_zeros(l * s, l * r)
    for j, u, t in itertools.product(range(l), range(s), range(r)):
        second[u * l + j, t * l + j] = left[j, u, t]
    out.copy_((second @ first)[: out.shape[0], : out.shape[1]])


def _toeplitz(out: Tensor, A: Any, diagonals: Tensor) -> None:
    for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
        out[i, j] = diagonals[out.shape[1] - 1 + i - j]


def _causal_toeplitz(out: Tensor, A: Any, column: Tensor) -> None:
    for i in range(len(column)):
        for j in range(i + 1):
            out[(j, i) if A.upper else (i, j)] = column[i - j]


def _hankel(out: Tensor, A: Any, entries: Tensor) -> None:
    for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
        out[i, j] = entries[i + j]


def _circulant(out: Tensor, A: Any, column: Tensor) -> None:
    for k, j in itertools.product(range(len(column)), repeat=2):  # the first column, moved down j times
        out[(k + j) % len(column), j] = column[k] if k + j < len(column) else A.f * column[k]


def _vandermonde(out: Tensor, A: Any, nodes: Tensor) -> None:
    out[:, 0] = 1
    for j in range(1, out.shape[1]):
        out[:, j] = out[:, j - 1] * nodes


def _cauchy(out: Tensor, A: Any, s: Tensor, t: Tensor) -> None:
    for i, j in itertools.product(range(len(s)), range(len(t))):
        out[i, j] = 1 / (s[i] - t[j])


def _fastfood(out: Tensor, A: Any, s: Tensor, g: Tensor, b: Tensor, perm: Tensor) -> None:
    q, k = g.shape
    S = torch.zeros(q * k).to(s)
    S[: len(s)] = s
    H = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(k)] for i in range(k)]).to(out) / k**0.5
    for block in range(q):
        P = torch.zeros_like(H)
        for i in range(k):
            P[i, perm[block, i]] = 1
        V = torch.diag(S[block * k : (block + 1) * k]) @ H @ torch.diag(g[block]) @ P @ H[:, : out.shape[1]]
        rows = out[block * k : (block + 1) * k]
        rows.copy_((V @ torch.diag(b[block]))[: len(rows)])


_ENTRIES = {
    Dense: _dense,
    Diagonal: _diagonal,
    Permutation: _permutation,
    LowRank: _low_rank,
    PivotedLowRank: _pivoted_low_rank,
    BlockDiagonal: _block_diagonal,
    BlockSparse: _block_sparse,
    KroneckerSparse: _kronecker_sparse,
    Monarch: _monarch,
    Toeplitz: _toeplitz,
    CausalToeplitz: _causal_toeplitz,
    Hankel: _hankel,
    Circulant: _circulant,
    Vandermonde: _vandermonde,
    Fastfood: _fastfood,
    Cauchy: _cauchy,
}
# How many dimensions of each factor are not batch.
_RANKS = {
    Dense: (2,),
    Diagonal: (1,),
    Permutation: (1,),
    LowRank: (2, 2),
    PivotedLowRank: (2, 2, 1),
    BlockDiagonal: (3,),
    BlockSparse: (3, 1),
    KroneckerSparse: (4,),
    Monarch: (3, 3),
    Toeplitz: (1,),
    CausalToeplitz: (1,),
    Hankel: (1,),
    Circulant: (1,),
    Vandermonde: (1,),
    Fastfood: (1, 2, 2, 2),
    Cauchy: (1, 1),
}
