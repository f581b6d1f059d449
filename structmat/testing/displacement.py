"""Market entries and dense definitions of matrices of low displacement rank."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.matrices import Fastfood
from structmat.matrices.displacement import (
    LDR,
    CauchyLike,
    Companion,
    HankelLike,
    LDRSubdiagonal,
    LDRTridiagonal,
    Shift,
    ShiftEigenvectors,
    ToeplitzLike,
    VandermondeLike,
)

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
    yield "shifteigenvectors", lambda dt, dev: ShiftEigenvectors(6, -1.0, dtype=dt, place=str(dev)), True
    yield "shifteigenvectors-corner", lambda dt, dev: ShiftEigenvectors(5, 0.5, True, dtype=dt, place=str(dev)), True
    yield "shifteigenvectors-inverted", lambda dt, dev: ShiftEigenvectors(3, 1j, False, True, dt, str(dev)), True
    yield "companion", _random(Companion, (5, 5)), True
    yield "companion-transposed", _transposed(_random(Companion, (4, 4))), True
    yield "companion-one", _random(Companion, (1, 1)), True
    yield "companion-batch", _random(Companion, (2, 3, 3)), True
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
    for name, cls in (("subdiagonal", LDRSubdiagonal), ("tridiagonal", LDRTridiagonal)):
        yield f"ldr{name}", _random(cls, (6, 6), 2), False
        yield f"ldr{name}-open", _random(cls, (7, 7), 1, False), False
        yield f"ldr{name}-wide", _random(cls, (4, 7), 2), False
        yield f"ldr{name}-tall", _random(cls, (9, 5), 3, False), False
        yield f"ldr{name}-transposed", _transposed(_random(cls, (5, 4), 2)), False
        yield f"ldr{name}-row", _random(cls, (1, 5), 1), False
        yield f"ldr{name}-column", _random(cls, (5, 1), 1, False), False
        yield f"ldr{name}-one", _random(cls, (1, 1), 1), False
        yield f"ldr{name}-batch", _random(cls, (2, 3, 4, 5), 2), False
    yield "fastfood", _random(Fastfood, (8, 8)), False
    yield "fastfood-blocks", _random(Fastfood, (11, 4)), False
    yield "fastfood-padded", _random(Fastfood, (3, 5)), False
    yield "fastfood-one", _random(Fastfood, (1, 1)), False
    yield "fastfood-batch", _random(Fastfood, (2, 3, 6, 4)), False


def dense_eigenvectors(U: StructuredMatrix) -> Tensor:
    """The eigenvectors by their formula."""
    assert isinstance(U, ShiftEigenvectors)
    modulus, angle = abs(U.f), cmath.phase(U.f)
    rows = [
        [modulus ** (-i / U.n) * cmath.exp(1j * (2 * cmath.pi * k - angle) * i / U.n) / U.n**0.5 for k in range(U.n)]
        for i in range(U.n)
    ]
    dense = torch.tensor(rows, dtype=torch.complex128, device=U.device)
    dense = dense.mT if U.transposed else dense
    return (torch.linalg.inv(dense) if U.inverted else dense).to(U.dtype)


def dense_companion(C: StructuredMatrix) -> Tensor:
    """The subdiagonal of ones and the last column, entry by entry."""
    assert isinstance(C, Companion)
    n = C.shape[-1]
    below = torch.tensor([[float(i == j + 1) for j in range(n)] for i in range(n)], dtype=C.dtype, device=C.device)
    last = torch.tensor([float(j == n - 1) for j in range(n)], dtype=C.dtype, device=C.device)
    dense = below - C.coefficients.unsqueeze(-1) * last
    return dense.mT if C.transposed else dense


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


def krylov_operators(M: StructuredMatrix) -> tuple[Tensor, Tensor]:
    """A and B of a matrix with learned operators, entry by entry."""
    assert isinstance(M, (LDRSubdiagonal, LDRTridiagonal))
    operators = []
    for t, size in ((M.a, M.shape[-2]), (M.b, M.shape[-1])):
        A = torch.zeros(*t.shape[:-1], size, size, dtype=t.dtype, device=t.device)
        side = t.shape[-1] if isinstance(M, LDRSubdiagonal) else (t.shape[-1] - size) // 2
        for i in range(side):
            A[..., (i + 1) % size, i] += t[..., i]
            if isinstance(M, LDRTridiagonal):
                A[..., i, (i + 1) % size] += t[..., side + size + i]
        if isinstance(M, LDRTridiagonal):
            for i in range(size):
                A[..., i, i] += t[..., side + i]
        operators.append(A.mT if isinstance(M, LDRSubdiagonal) and M.up else A)
    return operators[0], operators[1]


def dense_krylov(M: StructuredMatrix) -> Tensor:
    """The sum of ``A^k G H^T B^k``, term by term."""
    assert isinstance(M, (LDRSubdiagonal, LDRTridiagonal))
    A, B = krylov_operators(M)
    term = M.left @ M.right.mT
    total = term
    for _ in range(1, min(M.shape[-2:])):
        term = A @ term @ B
        total = total + term
    return total.expand(M.shape)
