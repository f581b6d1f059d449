"""Derivatives of solutions and determinants by the implicit-function theorem: no solver is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structmat.base import StructuredMatrix

Solver = Callable[[Any, Tensor], Tensor]


def implicit_solve(A: StructuredMatrix, b: Tensor, solver: Solver) -> Tensor:
    """``solver(A, b)`` with the derivatives of ``A^-1 b``, of every order.

    The backward solves ``A^H c = grad`` by ``A.H._solve`` and takes ``-c x^H`` through one product with A.

    Args:
        A: a square matrix whose ``_solve`` and that of its transpose call this function.
        b: shape (*batch, n, k).
        solver: computes ``A^-1 b``; nothing flows through it.
    """
    leaves, spec = pytree.tree_flatten(A)
    return _Solve.apply(solver, spec, b, *leaves)


def implicit_logdet(A: StructuredMatrix, value: Callable[[Any], Tensor]) -> Tensor:
    """``value(A)`` with the derivatives of log|det A|, or of log det A where it is complex.

    Args:
        A: a square matrix with ``_solve``; its backward needs the dense inverse, n solves.
        value: computes it; nothing flows through it.
    """
    leaves, spec = pytree.tree_flatten(A)
    return _LogDet.apply(value, spec, *leaves)


def _vjp(spec: Any, leaves: tuple[Tensor, ...], wanted: list[int], apply: Callable, grad: Tensor) -> list[Any]:
    """Gradients of ``apply(A)`` for the wanted leaves of A, None for the others."""

    def product(*some: Tensor) -> Tensor:
        full = list(leaves)
        for i, t in zip(wanted, some, strict=True):
            full[i] = t
        return apply(pytree.tree_unflatten(full, spec))

    found: list[Any] = [None] * len(leaves)
    if wanted:
        for i, g in zip(wanted, torch.func.vjp(product, *(leaves[i] for i in wanted))[1](grad), strict=True):
            found[i] = g
    return found


def _each(info: Any, in_dims: tuple, args: tuple, call: Callable[..., Tensor]) -> tuple[Tensor, int]:
    """Vmap by a loop: solvers look at values, and vectorise over the batches of the matrix instead."""
    moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
    picked = ([m if d is None else m[i] for m, d in zip(moved, in_dims, strict=True)] for i in range(info.batch_size))
    return torch.stack([call(*some) for some in picked]), 0


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(solver: Solver, spec: Any, b: Tensor, *leaves: Tensor) -> Tensor:
        return solver(pytree.tree_unflatten(list(leaves), spec), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.spec, b, *leaves = inputs
        ctx.batch = b.shape[:-2]
        ctx.save_for_backward(output, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, *leaves = ctx.saved_tensors
        A = pytree.tree_unflatten(leaves, ctx.spec)
        c = A.H._solve(grads[0])
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        gradients = _vjp(ctx.spec, tuple(leaves), wanted, lambda A: A._linear(x.mT).mT, -c)
        return None, None, c.sum_to_size(*ctx.batch, *c.shape[-2:]), *gradients

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple, solver: Solver, spec: Any, *args: Tensor
    ) -> tuple[Tensor, int]:
        return _each(info, in_dims[2:], args, lambda *some: _Solve.apply(solver, spec, *some))


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(value: Callable[[Any], Tensor], spec: Any, *leaves: Tensor) -> Tensor:
        return value(pytree.tree_unflatten(list(leaves), spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.spec = inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        leaves = ctx.saved_tensors
        A = pytree.tree_unflatten(list(leaves), ctx.spec)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        inverse = A.H._solve(eye.expand(A.shape))
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        grad = grads[0][..., None, None] * inverse
        return None, None, *_vjp(ctx.spec, leaves, wanted, lambda A: A.to_dense(), grad)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple, value: Callable, spec: Any, *args: Tensor
    ) -> tuple[Tensor, int]:
        return _each(info, in_dims[2:], args, lambda *some: _LogDet.apply(value, spec, *some))
