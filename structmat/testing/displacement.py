"""Market entries and dense definitions of matrices of low displacement rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.matrices.displacement import LDR, CauchyLike, HankelLike, Shift, ToeplitzLike, VandermondeLike

Make = Callable[[torch.dtype, Any], StructuredMatrix]


def _random(cls: Any, *args: Any, **structure: Any) -> Make:
    return lambda dtype, device: cls.random(*args, **structure, dtype=dtype, device=device)


def _transposed(make: Make) -> Make:
    return lambda dtype, device: make(dtype, device).mT


def entries() -> Iterator[tuple[str, Make, bool]]:
    """Name, factory, and whether the matrix is invertible."""
    yield "shift", lambda dt, dev: Shift(5, -2.0, dtype=dt, place=str(dev)), True
    yield "shift-up", lambda dt, dev: Shift(4, 0.5, True, dt, str(dev)), True
    yield "shift-one", lambda dt, dev: Shift(1, 3.0, dtype=dt, place=str(dev)), True
    yield "toeplitzlike", _random(ToeplitzLike, (6, 6), 2), True
    yield "toeplitzlike-prime", _random(ToeplitzLike, (7, 5), 3), False
    yield "toeplitzlike-wide", _random(ToeplitzLike, (4, 8), 1), False
    yield "toeplitzlike-row", _random(ToeplitzLike, (1, 5), 1), False
    yield "toeplitzlike-column", _random(ToeplitzLike, (5, 1), 1), False
    yield "toeplitzlike-one", _random(ToeplitzLike, (1, 1), 1), True
    yield "toeplitzlike-corners", _random(ToeplitzLike, (5, 5), 2, 0.0, 2.0), True
    yield "toeplitzlike-nilpotent", _random(ToeplitzLike, (5, 7), 2, 0.5, 0.0), False
    yield "toeplitzlike-up", _transposed(_random(ToeplitzLike, (5, 4), 2)), False
    yield "toeplitzlike-batch", _random(ToeplitzLike, (2, 3, 4, 5), 2), False
    yield "toeplitzlike-batch-square", _random(ToeplitzLike, (2, 5, 5), 2), True
    yield "hankellike", _random(HankelLike, (6, 6), 2), True
    yield "hankellike-wide", _random(HankelLike, (3, 8), 2), False
    yield "vandermondelike", _random(VandermondeLike, (6, 6), 2), True
    yield "vandermondelike-tall", _random(VandermondeLike, (9, 5), 2), False
    yield "vandermondelike-wide", _random(VandermondeLike, (4, 7), 2, -1.0), False
    yield "vandermondelike-batch", _random(VandermondeLike, (2, 4, 3), 1), False
    yield "ldr-vandermonde-transposed", _transposed(_random(VandermondeLike, (5, 4), 2)), False
    yield "cauchylike", _random(CauchyLike, (6, 6), 2), True
    yield "cauchylike-tall", _random(CauchyLike, (7, 3), 1), False
    yield "cauchylike-batch", _random(CauchyLike, (2, 3, 5), 2), False


def dense_shift(A: StructuredMatrix) -> Tensor:
    """Z_f or its transpose, entry by entry."""
    assert isinstance(A, Shift)
    rows: list[list[Any]] = [[float(i == j + 1) for j in range(A.n)] for i in range(A.n)]
    rows[0][A.n - 1] = A.f
    dense = torch.tensor(rows, dtype=A.dtype, device=A.device)
    return dense.mT if A.up else dense


def dense_ldr(M: StructuredMatrix) -> Tensor:
    """The solution of the linear equations ``(A kron I - I kron B^T) vec(M) = vec(G H^T)``."""
    assert isinstance(M, LDR)
    m, n = M.shape[-2:]
    A, B = (dense_shift(o) if isinstance(o, Shift) else torch.diag_embed(o.diag) for o in (M.A, M.B))
    system = torch.einsum("...ik,jl->...ijkl", A, torch.eye(n, dtype=M.dtype, device=M.device))
    system = system - torch.einsum("ik,...lj->...ijkl", torch.eye(m, dtype=M.dtype, device=M.device), B)
    system = system.flatten(-4, -3).flatten(-2)
    right = torch.einsum("...ir,...jr->...ij", M.left, M.right).flatten(-2)
    batch = M.shape[:-2]
    solution = torch.linalg.solve(system.expand(*batch, *system.shape[-2:]), right.expand(*batch, -1).unsqueeze(-1))
    return solution.unflatten(-2, (m, n)).squeeze(-1)
