"""Pairs of displacement operators: their corners, and whether they have a common eigenvalue."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_tensor
from structmat.base import StructuredMatrix
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement._convolution import values_visible, working
from structmat.matrices.displacement.operators import Shift, check_number


def dtype_for(like: Tensor, *corners: float | complex) -> torch.dtype:
    """The dtype of a tensor, once it is sure that these corners fit it."""
    for corner in corners:
        if isinstance(corner, complex) and corner.imag and not like.is_complex():
            raise TypeError(f"a shift with corner {corner} needs complex generators, got {like.dtype}")
    return like.dtype


def check_rows(name: str, value: Any) -> None:
    """Raise unless a generator is a tensor with rows."""
    check_tensor(name, value, 2)
    if value.shape[-2] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(value.shape)}")


def shifts(G: Any, H: Any, e: float | complex | None, f: float | complex | None) -> tuple[Shift, Shift]:
    """Z_e and Z_f for generators, with the corners that are not given."""
    for name, value in (("left", G), ("right", H)):
        check_rows(name, value)
    m, n = G.shape[-2], H.shape[-2]
    if e is None:
        e = 1.0 if f is None else -check_number("f", f) or 1.0
        if f is None and meet(1.0, m, -1.0, n):
            e = -1.0
    if f is None:
        f = -check_number("e", e) or 1.0
    dtype = dtype_for(G, e, f)
    return Shift(m, e, dtype=dtype), Shift(n, f, dtype=dtype)


def meet(e: float | complex, m: int, f: float | complex, n: int) -> bool:
    """Whether Z_e of size m and Z_f of size n have a common eigenvalue: z^m = e and z^n = f."""
    g = math.gcd(m, n)
    if e == 0 or f == 0:
        return e == f
    # By logarithms, since powers overflow: the lengths of both sides and their angles must agree.
    left, right = complex(e), complex(f)
    a, b = n // g, m // g
    lengths = a * math.log(abs(left)) - b * math.log(abs(right))
    turns = (a * math.atan2(left.imag, left.real) - b * math.atan2(right.imag, right.real)) / (2 * math.pi)
    small = 1e-13 * (a + b)
    return abs(lengths) <= small and abs(turns - round(turns)) <= small


#: Of numbers that float32 holds.
_LARGEST_LOG = 80.0


def check_disjoint(A: Shift | Diagonal, B: Shift | Diagonal) -> None:
    """Raise if A and B have a common eigenvalue, where that is known without waiting."""
    if isinstance(A, Shift) and isinstance(B, Shift):
        for name, one, other in (("A", A, B), ("B", B, A)):
            # Products take powers of one shift up to the other's size.
            if one.f and abs(math.log(abs(one.f))) * other.n / one.n > _LARGEST_LOG:
                raise ValueError(
                    f"the corner {one.f} of {name} is too far from modulus 1 for sizes {A.n} and {B.n}: powers of the "
                    "shift overflow"
                )
        if meet(A.f, A.n, B.f, B.n):
            raise ValueError(
                f"the shifts of sizes {A.n} and {B.n} with corners {A.f} and {B.f} have a common eigenvalue: the "
                f"matrix is not determined; corners e and f need e^({B.n}/g) != f^({A.n}/g), g = {math.gcd(A.n, B.n)}"
            )
        return
    if not all(values_visible(o.diag) for o in (A, B) if isinstance(o, Diagonal)):
        return
    if isinstance(A, Diagonal) and isinstance(B, Diagonal):
        if _common(A, B):
            raise ValueError("the diagonals A and B must not have a number in common: s_i - t_j divides")
        return
    nodes, shift = (A, B) if isinstance(A, Diagonal) else (B, A)
    assert isinstance(nodes, Diagonal)
    assert isinstance(shift, Shift)
    met = distance(nodes.diag, shift.n, shift.f) <= shift.n * torch.finfo(torch.float64).eps
    if met or bool((working(nodes.diag).pow(shift.n) == shift.f).any()):  # powers may underflow to a corner of 0
        raise ValueError(f"no node may be an eigenvalue of the shift: v^{shift.n} = {shift.f} for some of the nodes")


def _common(A: Diagonal, B: Diagonal) -> bool:
    """Whether two diagonals have a number in common, in a member of the batch."""
    batch = torch.broadcast_shapes(A.diag.shape[:-1], B.diag.shape[:-1])
    s, t = (o.diag.expand(*batch, -1).reshape(math.prod(batch), o.diag.shape[-1]) for o in (A, B))
    return any(
        len(_distinct(torch.cat([one, two]))) < len(_distinct(one)) + len(_distinct(two))
        for one, two in zip(s, t, strict=True)
    )


def distance(nodes: Tensor, n: int, f: float | complex) -> float:
    """The least of ``|v^n - f| / max(|v^n|, |f|)``, zero if a node is an eigenvalue of the shift; waits for values."""
    if nodes.numel() == 0:
        return 1.0
    powers = nodes.detach().to(torch.complex128 if nodes.is_complex() else torch.float64).pow(n)
    scale = powers.abs().clamp(min=max(abs(f), torch.finfo(torch.float64).tiny))
    return float(((powers - f).abs() / scale).nan_to_num(nan=1.0, posinf=1.0).min())


def far_corner(nodes: Tensor, n: int, known: float | complex) -> float | complex:
    """The known corner of a shift of size n if the nodes are away from its eigenvalues, else the best of a few."""
    size = abs(known) or 1.0
    corners = [size, -size, 2 * size, -2 * size]
    if known and distance(nodes, n, known) > near(nodes):
        return known
    return max(corners, key=lambda c: distance(nodes, n, c))


def near(nodes: Tensor) -> float:
    """The :func:`distance` at which half of the digits are lost."""
    return torch.finfo(nodes.dtype).eps ** 0.5


def _distinct(values: Tensor) -> Tensor:
    return torch.view_as_real(values.resolve_conj()).unique(dim=0) if values.is_complex() else values.unique()


def same(A: StructuredMatrix, B: StructuredMatrix) -> bool:
    """Whether two operators are known to be equal: shifts by their corners, diagonals by their values on the CPU."""
    if isinstance(A, Shift) and isinstance(B, Shift):
        return (A.n, A.f, A.up) == (B.n, B.f, B.up)
    if not (isinstance(A, Diagonal) and isinstance(B, Diagonal)):
        return False
    if A.diag is B.diag:
        return True
    # The result keeps one of them: of two that are learned the other would lose its gradient.
    if A.diag.requires_grad or B.diag.requires_grad:
        return False
    return values_visible(A.diag) and values_visible(B.diag) and torch.equal(A.diag, B.diag)
