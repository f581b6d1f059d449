"""Conjugate gradients and GMRES on functions of rows: x has shape (*batch, k, n), and each row is a system of its own.

Nothing here can be differentiated; :mod:`structmat.linalg.iterative` differentiates the solution instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: A linear map of the last dimension.
Apply = Callable[[Tensor], Tensor]
#: From residuals, the sizes that they should have and a number of iterations: a correction of x, and the iterations.
Cycle = Callable[[Tensor, Tensor, int], tuple[Tensor, int]]


def norm(x: Tensor) -> Tensor:
    """2-norms of the rows."""
    return torch.linalg.vector_norm(x, dim=-1)


def iterate(
    product: Apply, cycle: Cycle, b: Tensor, tol: float, max_iterations: int, fall: float = 0.95
) -> tuple[Tensor, int, Tensor, str]:
    """Corrections of ``x = 0`` until ``|b - A x| <= tol |b|`` in every row, by residuals that are computed from x.

    Args:
        product: A.
        cycle: the method.
        b: shape (*batch, k, n).
        tol: positive.
        max_iterations: at least 1.
        fall: a cycle that leaves more than this part of the largest residual is the last one.

    Returns:
        x (*batch, k, n), the number of iterations, relative residuals (*batch, k), and why it stopped.
    """
    whole = norm(b)
    scale = torch.where(whole > 0, whole, 1)
    x, r, count, before = torch.zeros_like(b), b, 0, math.inf
    while True:
        residuals = norm(r) / scale
        worst = float(residuals.max()) if residuals.numel() else 0.0
        if worst <= tol:
            return x, count, residuals, "converged"
        if count >= max_iterations:
            return x, count, residuals, f"more than max_iterations = {max_iterations} are needed"
        if not worst <= fall * before:
            return x, count, residuals, "the residual does not fall any more: rounding, or a matrix out of its reach"
        step, done = cycle(r, tol * whole, max_iterations - count)
        if done == 0:
            return x, count, residuals, "the matrix or the preconditioner is not positive definite"
        x, count, before = x + step, count + done, worst
        r = b - product(x)


def cg_cycle(product: Apply, precondition: Apply) -> Cycle:
    """Preconditioned conjugate gradients; ends where a direction has no positive energy."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vecdot(a, b).real.unsqueeze(-1)

    def cycle(r: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, int]:
        x, z = torch.zeros_like(r), precondition(r)
        p, rz = z, dot(r, z)
        active = (norm(r) > goal).unsqueeze(-1)
        for done in range(limit):
            Ap = product(p)
            energy = dot(p, Ap)
            if bool((active & ~((energy > 0) & (rz > 0))).any()):
                return x, done
            alpha = torch.where(active, rz / energy, 0)  # a row that has converged stands still
            x, r = x + alpha * p, r - alpha * Ap
            active = (norm(r) > goal).unsqueeze(-1)
            if not bool(active.any()):
                return x, done + 1
            z = precondition(r)
            rz, old = dot(r, z), rz
            p = z + torch.where(active, rz / old, 0) * p
        return x, limit

    return cycle


def gmres_cycle(product: Apply, precondition: Apply, restart: int) -> Cycle:
    """GMRES, preconditioned from the right, up to a restart."""

    def cycle(r: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, int]:
        steps, size = min(restart, limit, r.shape[-1]), norm(r)
        basis = r.new_zeros(*r.shape[:-1], steps + 1, r.shape[-1])
        basis[..., 0, :] = r / torch.where(size > 0, size, 1).unsqueeze(-1)
        # The Hessenberg matrix is Q^H R, with Q the product of all rotations so far.
        R = r.new_zeros(*r.shape[:-1], steps, steps)
        Q = torch.eye(steps + 1, dtype=r.dtype, device=r.device).repeat(*r.shape[:-1], 1, 1)
        done = 0
        for j in range(steps):
            w = product(precondition(basis[..., j, :]))
            known, all_of_it = basis[..., : j + 1, :], norm(w)
            h = torch.zeros_like(known[..., 0])
            for _ in range(2):  # once leaves vectors that are not orthogonal
                part = (known.conj() @ w.unsqueeze(-1)).squeeze(-1)
                w, h = w - (part.unsqueeze(-2) @ known).squeeze(-2), h + part
            rest = norm(w)
            rest = torch.where(rest > 10 * torch.finfo(rest.dtype).eps * all_of_it, rest, 0)  # else all is found
            basis[..., j + 1, :] = torch.where(rest > 0, 1 / rest, 0).unsqueeze(-1) * w
            column = torch.cat([h, rest.unsqueeze(-1).to(h.dtype)], -1)
            column = (Q[..., : j + 2, : j + 2] @ column.unsqueeze(-1)).squeeze(-1)
            a, b = column[..., j : j + 1], column[..., j + 1 :]
            length = (a.abs().square() + b.abs().square()).sqrt()
            a, b = (torch.where(length > 0, t / length, one) for t, one in ((a, 1), (b, 0)))
            upper, lower = Q[..., j, :], Q[..., j + 1, :]
            Q[..., j, :], Q[..., j + 1, :] = a.conj() * upper + b.conj() * lower, a * lower - b * upper
            R[..., :j, j], R[..., j, j] = column[..., :j], length.squeeze(-1).to(R.dtype)
            done = j + 1
            if bool((size * Q[..., j + 1, 0].abs() <= goal).all()):
                break
        R, right = R[..., :done, :done], size.unsqueeze(-1) * Q[..., :done, 0]
        empty = R.diagonal(dim1=-2, dim2=-1) == 0  # directions beyond the end of a row's space: nothing of them
        R = R + torch.diag_embed(empty.to(R.dtype))
        y = torch.linalg.solve_triangular(R, torch.where(empty, 0, right).unsqueeze(-1), upper=True)
        return precondition((y.mT @ basis[..., :done, :]).squeeze(-2)), done

    return cycle
