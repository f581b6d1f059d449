"""The algebra of displacement: which class a pair of operators has, and the ranks of sums and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement._convolution import values_visible
from structmat.matrices.displacement._pairs import (
    _common,
    check_disjoint,
    distance,
    dtype_for,
    far_corner,
    meet,
    near,
    same,
)
from structmat.matrices.displacement.operators import Shift, check_number
from structmat.matrices.low_rank import LowRank


def _ldr() -> Any:
    from structmat.matrices.displacement.ldr import LDR

    return LDR


def class_for(base: Any, A: StructuredMatrix, B: StructuredMatrix) -> Any:
    """The class of matrices with these operators."""
    from structmat.matrices.displacement import cauchy_like, toeplitz_like

    if isinstance(A, Shift) and isinstance(B, Shift):
        return toeplitz_like.ToeplitzLike if A.up == B.up else toeplitz_like.HankelLike
    if isinstance(A, Diagonal):
        return cauchy_like.VandermondeLike if isinstance(B, Shift) else cauchy_like.CauchyLike
    return base


# -------------------------------------------------------------------- generators
def join(*parts: Tensor) -> Tensor:
    """Generators side by side; batches broadcast."""
    batch = torch.broadcast_shapes(*(p.shape[:-2] for p in parts))
    return torch.cat([p.expand(*batch, *p.shape[-2:]) for p in parts], -1)


def _unit(like: Tensor, size: int, index: int) -> Tensor:
    """The unit vector as a column (size, 1)."""
    i = torch.arange(size, device=like.device)
    return (i == index % size).to(like.dtype).unsqueeze(-1)


def _row(M: Any, index: int) -> Tensor:
    """A row of M as a column (*batch, n, 1)."""
    return M.mT._linear(_unit(M.left, M.shape[-2], index).mT).mT


def _column(M: Any, index: int) -> Tensor:
    return M._linear(_unit(M.right, M.shape[-1], index).mT).mT


def with_shifts(M: Any, e: Any, f: Any) -> Any:
    """See :meth:`LDR.with_shifts`."""
    A, B, G, H = M.A, M.B, M.left, M.right
    m, n = M.shape[-2:]
    for name, operator, corner in (("e", A, e), ("f", B, f)):
        if corner is not None and not isinstance(operator, Shift):
            raise ValueError(f"{name} is the corner of a shift, but that operator is a {type(operator).__name__}")
    e, f = (None if c is None else check_number(name, c) for name, c in (("e", e), ("f", f)))
    if e is not None and e != A.f:
        # Z_e' = Z_e + (e' - e) times one unit matrix, which takes one row of M to another place.
        to, place = (m - 1, 0) if A.up else (0, m - 1)
        G, H = join(G, (e - A.f) * _unit(G, m, to)), join(H, _row(M, place))
        A = A._rebuild((), (m, e, A.up, A.dtype, A.place))
    if f is not None and f != B.f:
        place, to = (n - 1, 0) if B.up else (0, n - 1)
        G, H = join(G, (B.f - f) * _column(M, place)), join(H, _unit(H, n, to))
        B = B._rebuild((), (n, f, B.up, B.dtype, B.place))
    dtype_for(G, *(o.f for o in (A, B) if isinstance(o, Shift)))
    check_disjoint(A, B)
    return M._make(A, B, G, H)


def turned(M: Any) -> Any:
    """The same matrix with the inverses of its shifts for operators: ``A^-1 M - M B^-1 = -A^-1 G (B^-T H)^T``."""
    A, B = M.A.inverse(), M.B.inverse()
    return M._make(A, B, -A._linear(M.left.mT).mT, B.mT._linear(M.right.mT).mT)


def add(M: Any, other: Any) -> StructuredMatrix | None:
    """The sum with another matrix of low displacement rank, or of low rank."""
    if isinstance(other, LowRank):  # A U V - U V B = (A U) V - U (V B)
        U, V = other.left, other.right
        left, right = join(M.A._linear(U.mT).mT, -U), join(V.mT, M.B.mT._linear(V).mT)
        return M._make(M.A, M.B, join(M.left, left), join(M.right, right))
    if not isinstance(other, _ldr()):
        # A Toeplitz or Hankel matrix, which has rank 2 under any shifts.
        if not (hasattr(other, "to_ldr") and isinstance(M.A, Shift) and isinstance(M.B, Shift)):
            return None
        other = other.to_ldr(M.A.f, M.B.f)
    if not same(M.A, other.A) or not same(M.B, other.B):
        other = _agree(other, M)
    if other is None:
        return None
    return M._make(M.A, M.B, join(M.left, other.left), join(M.right, other.right))


def _agree(other: Any, M: Any) -> Any:
    """``other`` with M's operators, or None."""
    pairs = ((other.A, M.A), (other.B, M.B))
    if not all(isinstance(a, Shift) == isinstance(b, Shift) for a, b in pairs):
        return None
    if not all(isinstance(a, Shift) or same(a, b) for a, b in pairs):
        return None
    turns = [a.up != b.up for a, b in pairs if isinstance(a, Shift)]
    if all(turns) and len(turns) == 2 and other.A.f and other.B.f:
        other = turned(other)
    elif any(turns):
        return None
    new = [b.f if isinstance(b, Shift) else None for b in (M.A, M.B)]
    return with_shifts(other, *new)


def compose(M: Any, other: Any) -> StructuredMatrix | None:
    """``M N``: ``A M N - M N C = G_M (N^T H_M)^T + M (B - B') N + (M G_N) H_N^T``, if the operators fit."""
    for value, partner in ((M, other), (other, M)):
        near = "B" if value is M else "A"
        if not isinstance(value, _ldr()) and not (hasattr(value, "to_ldr") and hasattr(partner, "displacement_rank")):
            return None
        if not isinstance(value, _ldr()):
            operator = getattr(partner, "A" if near == "B" else "B")
            if not isinstance(operator, Shift):
                return None
            # The inner corners agree; the outer one is free.
            if value is M:
                M = value.to_ldr(_free_corner(operator, value.shape[-2]), operator.f)
            else:
                other = value.to_ldr(operator.f, _free_corner(operator, value.shape[-1]))
    if isinstance(M.B, Shift) and isinstance(other.A, Shift):
        if M.B.up != other.A.up:
            if isinstance(other.B, Shift) and other.A.f and other.B.f:
                other = turned(other)
            elif isinstance(M.A, Shift) and M.A.f and M.B.f:
                M = turned(M)
            else:
                return None
    elif not same(M.B, other.A):
        return None
    A, C = M.A, other.B
    if isinstance(A, Shift) and isinstance(C, Diagonal):  # the case of nodes on the left
        found = compose(other.mT, M.mT)
        return None if found is None else found.mT
    if isinstance(C, Shift):
        f = _apart(A, C)
        if f is None:
            return None
    elif isinstance(A, Diagonal) and (not (values_visible(A.diag) and values_visible(C.diag)) or _common(A, C)):
        return None  # some entries of the product are not determined
    lefts, rights = [M.left, M._linear(other.left.mT).mT], [other.mT._linear(M.right.mT).mT, other.right]
    if isinstance(M.B, Shift) and M.B.f != other.A.f:
        n = M.B.n
        column, row = (n - 1, 0) if M.B.up else (0, n - 1)
        lefts.append((M.B.f - other.A.f) * _column(M, column))
        rights.append(_row(other, row))
    if isinstance(C, Shift) and f != C.f:  # P (C - C') is one of the product's columns, at another place
        n = C.n
        column, to = (n - 1, 0) if C.up else (0, n - 1)
        lefts.append((C.f - f) * M._linear(_column(other, column).mT).mT)
        rights.append(_unit(other.right, n, to))
        C = C._rebuild((), (n, f, C.up, C.dtype, C.place))
    return M._make(A, C, join(*lefts), join(*rights))


def _apart(A: Shift | Diagonal, C: Shift) -> float | complex | None:
    """C's corner, or another one if A and C have a common eigenvalue with it; None where that is not known."""
    if isinstance(A, Shift):
        return _free_corner(A, C.n) if meet(A.f, A.n, C.f, C.n) else C.f
    if not values_visible(A.diag):
        return None
    f = far_corner(A.diag, C.n, C.f)
    return f if distance(A.diag, C.n, f) > near(A.diag) else None


def _free_corner(A: Shift, n: int) -> float | complex:
    """A corner for size n that does not meet A."""
    size = abs(A.f) ** (n / A.n) if A.f else 1.0
    candidates = [-size, size, 2 * size]
    return next(c for c in candidates if not meet(A.f, A.n, c, n))


def compress(M: Any, tol: float | None, rank: int | None) -> Any:
    """See :meth:`LDR.compress`."""
    r = M.displacement_rank
    if tol is not None and rank is not None:
        raise ValueError("give tol or rank, not both")
    if tol is not None and tol < 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if rank is not None and check_int("rank", rank) > r:
        raise ValueError(f"rank must be at most the number of columns {r}, got {rank}")
    wide = torch.promote_types(M.dtype, torch.float32)
    (qg, rg), (qh, rh) = (torch.linalg.qr(t.to(wide)) for t in (M.left, M.right))
    u, s, vh = torch.linalg.svd(rg @ rh.mT)
    if rank is None:
        # Rounding is relative to the terms of G H^T, which may cancel.
        terms = (torch.linalg.vector_norm(rg, dim=-2) * torch.linalg.vector_norm(rh, dim=-2)).sum(-1, keepdim=True)
        rounding = max(M.left.shape[-2:]) * torch.finfo(M.dtype).eps
        kept = (s > (rounding * terms if tol is None else tol * s[..., :1])).sum(-1)
        rank = max(1, int(kept.max())) if kept.numel() else 1
    rank = min(rank, s.shape[-1])
    root = s[..., :rank].sqrt().unsqueeze(-2)
    # G H^T = qg u s vh qh^T, without conjugates.
    G, H = (qg @ u[..., :rank]) * root, (qh @ vh.mT[..., :rank]) * root
    return M._make(M.A, M.B, G.to(M.dtype), H.to(M.dtype))
