"""Market entries and dense definitions of causal bases and of the matrices of causal Monarch maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.lazy import Inverse, Product
from structmat.matrices import Butterfly, CausalMonarch, CausalToeplitz
from structmat.matrices.causal import CausalBasis
from structmat.matrices.monarch_p import MonarchP
from structmat.testing.entry import Entry

_SOLVABLE = (torch.float64, torch.complex128, torch.float32, torch.complex64)


def blocks(radix: Sequence[int], scheme: str, batch: tuple[int, ...] = (), **kind: Any) -> list[Tensor]:
    """Triangular blocks with a diagonal near one for every digit, drawn from torch's global generator."""
    found, count = [], 1
    for n in radix:
        noise = torch.randn(*batch, count, n, n, **kind) / (4 * n**0.5)
        near = torch.eye(n, **kind) + noise
        found.append(near.tril() if scheme == "fourier" else near.triu())
        count *= n
    return found


def dense_basis(L: StructuredMatrix) -> Tensor:
    """Column by column: the polynomials are multiplied out, of scheme "chebyshev" in exact products of T_i T_j."""
    assert isinstance(L, CausalBasis)
    radix, dense = L.radix, torch.zeros(L.shape, dtype=L.dtype, device=L.device)
    for index in itertools.product(*(range(b) for b in L.shape[:-2])):
        for s in range(L.n):
            j = L.offset + L.n - 1 - s if L.scheme == "chebyshev" else s
            column = torch.zeros(2 * L.points, dtype=L.dtype)
            parts, weight, lower = [], 1, 0
            for a, n in enumerate(radix):
                digit = j // weight % n
                parts.append([(d, L.stages[a].blocks[index][lower, d, digit].item()) for d in range(n)])
                lower, weight = lower + digit * weight, weight * n
            for choice in itertools.product(*parts):
                degrees = [d * math.prod(radix[:a]) for a, (d, _) in enumerate(choice)]
                value = math.prod([v for _, v in choice])
                if L.scheme == "fourier":
                    column[sum(degrees)] += value
                    continue
                product = [1.0]  # of tau_d(Y_a) = tau_{d w_a}(Z), in the T_i
                for d in degrees:
                    product = chebyshev.chebmul(product, [0.0] * d + [2.0]) if d else product
                for i, c in enumerate(product):
                    column[i] += value * (c / 2 if i else c)
            for t in range(L.n):
                dense[index][t, s] = column[L.offset + L.n - 1 - t if L.scheme == "chebyshev" else t]
    return dense


def _dense(A: StructuredMatrix) -> Tensor:
    """The dense matrix of an entry of this module."""
    from structmat.testing.definitions import dense_by_definition

    if isinstance(A, CausalBasis):
        return dense_basis(A)
    if isinstance(A, Inverse):
        return torch.linalg.inv(_dense(A.base))
    if isinstance(A, Product):
        dense = _dense(A.factors[0])
        for f in A.factors[1:]:
            dense = dense @ _dense(f)
        return dense
    assert isinstance(A, (Butterfly, CausalToeplitz))
    return dense_by_definition(A)


def _monarch_p(dtype: torch.dtype, device: Any) -> StructuredMatrix:
    """Of three digits, near the identity."""
    sizes = ((2, 6), (3, 4), (2, 6))
    factors = [torch.eye(n, dtype=dtype) + torch.randn(k, n, n, dtype=dtype) / (4 * n**0.5) for n, k in sizes]
    return MonarchP([f.to(device) for f in factors], (2, 3, 2))


def _monarch_p_rectangular(dtype: torch.dtype, device: Any) -> StructuredMatrix:
    """From 3 * 2 * 2 to 2 * 3 * 2, cropped."""
    shapes = ((6, 2, 3), (6, 3, 2), (6, 2, 2))
    factors = [torch.randn(shape, dtype=dtype).to(device) for shape in shapes]
    return MonarchP(factors, ((2, 3), (3, 2), (2, 2)), nrows=11, ncols=9)


def entries() -> Iterator[Entry]:
    """The entries, each with its own definition."""

    def basis(name: str, *args: Any, radix: Sequence[int], scheme: str, batch: tuple[int, ...] = ()) -> Entry:
        def make(dtype: torch.dtype, device: Any) -> StructuredMatrix:
            stages = tuple(b.to(device) for b in blocks(radix, scheme, batch, dtype=dtype))
            return CausalBasis(stages, scheme, *args)  # pyright: ignore[reportArgumentType]

        return Entry(f"causalbasis-{name}", make, dense=_dense, invertible=True)

    def matrix(name: str, n: int, radix: Sequence[int], scheme: str, batch: tuple[int, ...] = ()) -> Entry:
        def make(dtype: torch.dtype, device: Any) -> StructuredMatrix:
            bases = [[b.to(device) for b in blocks(radix, scheme, batch, dtype=dtype)] for _ in range(3)]
            kernel = torch.rand(*batch, n, dtype=dtype) / (4 * n)
            kernel[..., 0] += 1
            return CausalMonarch.from_blocks(bases, n, scheme).toeplitz(kernel.to(device))

        return Entry(f"causalmonarch-{name}", make, dense=_dense, invertible=True, dtypes=_SOLVABLE)

    yield Entry("monarchp", _monarch_p, dense=_dense, invertible=True)
    yield Entry("monarchp-rectangular", _monarch_p_rectangular, dense=_dense)
    yield basis("fourier", radix=(3, 4), scheme="fourier")
    yield basis("prime", 11, radix=(2, 2, 3), scheme="fourier")
    yield basis("one", radix=(1,), scheme="fourier")
    yield basis("batch", radix=(2, 3), scheme="fourier", batch=(2, 3))
    yield basis("chebyshev", radix=(3, 4), scheme="chebyshev")
    yield basis("chebyshev-block", 5, 4, radix=(2, 3, 2), scheme="chebyshev")
    yield basis("chebyshev-batch", 3, radix=(2, 2), scheme="chebyshev", batch=(2,))
    yield matrix("fourier", 8, (2, 2, 2), "fourier")
    yield matrix("fourier-prime", 7, (3, 3), "fourier")
    yield matrix("fourier-batch", 4, (2, 2), "fourier", (2, 3))
    yield matrix("one", 1, (1,), "fourier")
    yield matrix("chebyshev", 6, (3, 4), "chebyshev")
    yield matrix("chebyshev-batch", 3, (2, 3), "chebyshev", (2,))
