"""Solving with square Toeplitz matrices: iterations where they are sure to serve, elimination otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat.linalg.krylov import Apply, gmres_cycle, iterate, norm
from structmat.matrices.displacement import _algebra, _pairs
from structmat.matrices.displacement._convolution import good_size, transform, untransform
from structmat.matrices.displacement._solve import eliminate
from structmat.matrices.displacement.toeplitz_like import ToeplitzLike

#: From this size on iterations are tried first; of smaller matrices elimination takes no longer.
ITERATIVE_SIZE = 512
#: Iterations before a restart, and in all. Ten are a small part of an elimination.
RESTART, ITERATIONS = 10, 50
#: Part of the residual that the iterations up to a restart may leave; else the matrix is eliminated.
FALL = 1e-3
#: Relative residual that is asked for.
TOLERANCE = 1e-13


def toeplitz_like(T: Any, e: float | complex | None, f: float | complex | None) -> ToeplitzLike:
    """``Z_e T - T Z_f``, which has a first row and a last column only."""
    m, n = T.shape[-2:]
    A, B = _pairs.shifts(T.column.unsqueeze(-1), T.row.unsqueeze(-1), e, f)
    d = T.diagonals
    # Last column: T[i - 1, n - 1] - f T[i, 0]; of the corner, which the row has as well, only the second term.
    column = torch.cat([torch.zeros_like(d[..., :1]), d[..., : m - 1]], -1) - B.f * T.column
    # First row: e T[m - 1, j] - T[0, j + 1].
    last = d.flip(-1)[..., :n]
    row = A.f * last - torch.cat([T.row[..., 1:], torch.zeros_like(d[..., :1])], -1)
    left = torch.stack([_unit(T.column, 0), column], -1)
    right = torch.stack([row, _unit(T.row, -1)], -1)
    return ToeplitzLike(left, right, A.f, B.f)


def _unit(like: Tensor, index: int) -> Tensor:
    i = torch.arange(like.shape[-1], device=like.device)
    return (i == index % like.shape[-1]).to(like.dtype).expand(like.shape)


def solve_toeplitz(T: Any, b: Tensor) -> Tensor:
    """``T^-1 b`` in double precision; nothing is differentiated.

    From n = 512 on, of at most n / 64 columns, GMRES with T. Chan's circulant preconditioner is tried first, and given
    up if 10 iterations do not bring the residuals to 1e-3. Its result is taken if it is what a backward stable solver
    gives, see :func:`_iterate`; otherwise T is eliminated.

    Raises:
        torch.linalg.LinAlgError: if T is singular to double precision.
    """
    n, dtype = T.shape[-1], T.dtype
    double = torch.complex128 if dtype.is_complex else torch.float64
    T, b = T.to(double), b.to(double)
    x = _iterate(T, b) if n >= ITERATIVE_SIZE and 64 * b.shape[-1] <= n else None
    return (_eliminate(T, b) if x is None else x).to(dtype)


def _iterate(T: Any, b: Tensor) -> Tensor | None:
    """``T^-1 b``, or None if a column is not solved as well as by elimination, or T may be singular.

    A column of random signs is solved beside those of b. It lies in the range of no singular matrix, and comes to a
    small residual with none, while a column of b might.
    """
    n = T.shape[-1]
    batch = torch.broadcast_shapes(b.shape[:-2], T.shape[:-2])
    signs = torch.randint(2, (n,), generator=torch.Generator().manual_seed(0), device="cpu")  # on every device the same
    signs = signs.to(b.device, b.dtype) * 2 - 1
    rows = torch.cat([b.mT.expand(*batch, *b.mT.shape[-2:]), signs.expand(*batch, 1, n)], -2)
    product, norms = _product(T)
    cycle = gmres_cycle(product, _preconditioner(T), RESTART)
    x, _, residuals, _ = iterate(product, cycle, rows, TOLERANCE, ITERATIONS, FALL)
    # A relative residual of 1e-13, or if rounding leaves more, 1e-14 of |T| |x|.
    limit = (1e-14 * norms * norm(x) / norm(rows)).clamp(TOLERANCE, 1e-10)
    return x[..., :-1, :].mT if bool((~(residuals > limit)).all()) else None


def _eliminate(T: Any, b: Tensor) -> Tensor:
    """By elimination for b and for the inverse's generators, with which x is refined where that makes it better."""
    x = eliminate(toeplitz_like(T, 1.0, -1.0), _algebra.join(b, _edges(T)))[0]
    inverse, x = _inverse(T, x[..., -2:]), x[..., :-2]
    r = b - T._linear(x.mT).mT
    for _ in range(2):
        new = x + inverse._linear(r.mT).mT
        rest = b - T._linear(new.mT).mT
        better = norm(rest.mT).unsqueeze(-2) < norm(r.mT).unsqueeze(-2)
        x, r = torch.where(better, new, x), torch.where(better, rest, r)
    return x


def _product(T: Any) -> tuple[Apply, Tensor]:
    """T for rows, its spectrum made once; and a bound of its 2-norm, shape (*batch, 1)."""
    n = T.shape[-1]
    size = good_size(2 * n - 1)
    # The first column of the circulant matrix with T for its first rows and columns.
    above, below = T.diagonals[..., : n - 1], T.diagonals[..., n - 1 :]
    column = torch.cat([below, below.new_zeros(*below.shape[:-1], size - 2 * n + 1), above], -1)
    spectrum = transform(column, size).unsqueeze(-2)
    apply = lambda rows: untransform(transform(rows, size) * spectrum, size, rows.dtype)[..., :n]  # noqa: E731
    return apply, spectrum.abs().amax(-1)


def _preconditioner(T: Any) -> Apply:
    """The inverse of the nearest circulant matrix, with ones in place of eigenvalues near zero."""
    from structmat.matrices.displacement.circulant import Circulant

    n = T.shape[-1]
    spectrum = transform(Circulant.from_toeplitz(T).column, n).unsqueeze(-2)
    sizes = spectrum.abs()
    spectrum = torch.where(sizes > 1e-6 * sizes.amax(-1, keepdim=True), spectrum, 1).reciprocal()
    return lambda rows: untransform(transform(rows, n) * spectrum, n, rows.dtype)


def _edges(T: Any) -> Tensor:
    """The columns e_0 and f, the diagonals above the main one below a zero: shape (*batch, n, 2)."""
    zero = torch.zeros_like(T.column[..., :1])
    return torch.stack([_unit(T.column, 0), torch.cat([zero, T.diagonals[..., : T.shape[-1] - 1]], -1)], -1)


def _inverse(T: Any, solutions: Tensor) -> ToeplitzLike:
    """``T^-1`` from the solutions x and z of ``T x = e_0`` and ``T z = f``.

    With the first column t, ``Z_1 T - T Z_-1 = e_0 (J (t - f))^T + (t + f) e_(n-1)^T``; ``T^-1 t = e_0``; J T^T J = T.
    Unlike Gohberg and Semencul's formula, of the first and last columns, nothing is divided by x_0: it holds for every
    invertible T. Source: Ben-Artzi, Shalom 1986, "On inversion of Toeplitz and close to Toeplitz matrices".
    """
    (x, z), first = solutions.unbind(-1), _unit(T.column, 0)
    left, right = torch.stack([x, first + z], -1), torch.stack([first - z, x], -1).flip(-2)
    return ToeplitzLike(-left, right, -1.0, 1.0)


def inverse_toeplitz(T: Any) -> ToeplitzLike:
    """``T^-1``, of displacement rank 2."""
    return _inverse(T, T._solve(_edges(T)))
