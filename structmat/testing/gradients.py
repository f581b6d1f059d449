"""Checks of gradients of first and second order, and of torch.func transformations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structmat.base import StructuredMatrix
from structmat.testing.entry import Entry, assert_close, draw


def _split(A: StructuredMatrix) -> tuple[list[Tensor], Any]:
    """The differentiable leaves, and a function that rebuilds the matrix from them."""
    leaves, spec = pytree.tree_flatten(A)
    inexact = [i for i, t in enumerate(leaves) if t.is_floating_point() or t.is_complex()]

    def rebuild(*values: Tensor) -> StructuredMatrix:
        new = list(leaves)
        for i, value in zip(inexact, values, strict=True):
            new[i] = value
        return pytree.tree_unflatten(new, spec)

    return [leaves[i].detach() for i in inexact], rebuild


def check_gradients(entry: Entry, device: Any = "cpu") -> None:
    """Gradcheck and gradgradcheck of linear and of the transpose in x and in every factor, real and complex."""
    for dtype in (torch.float64, torch.complex128):
        if dtype not in entry.dtypes:
            continue
        A = entry(dtype, device)
        values, rebuild = _split(A)
        for transpose in (False, True):

            def apply(x: Tensor, *factors: Tensor, _transpose: bool = transpose, _rebuild: Any = rebuild) -> Tensor:
                M = _rebuild(*factors)
                return (M.mT if _transpose else M).linear(x)

            size = A.shape[-2] if transpose else A.shape[-1]
            inputs = [t.clone().requires_grad_() for t in (draw((2, size), A), *values)]
            assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


def check_vmap(entry: Entry, device: Any = "cpu") -> None:
    """Vmap over operands, over stacked matrices, and over both."""
    A, B = entry(entry.dtypes[0], device), entry(entry.dtypes[0], device, seed=1)
    D, E = entry.reference(A), entry.reference(B)
    xs = draw((2, 3, A.shape[-1]), A)
    assert_close(torch.vmap(A.linear)(xs), torch.stack([x @ D.mT for x in xs]), what="vmap over x")
    last = torch.vmap(A.linear, in_dims=-1, out_dims=-1)(xs.movedim(0, -1).contiguous())
    assert_close(last.movedim(-1, 0), torch.stack([x @ D.mT for x in xs]), what="vmap over the last dimension")
    if not pytree.tree_leaves(A):
        return  # a shift has no tensors to stack
    both = pytree.tree_map(lambda a, b: torch.stack([a, b]), A, B)
    expected = torch.stack([xs[0] @ D.mT, xs[1] @ E.mT])
    assert_close(torch.vmap(lambda M, x: M.linear(x))(both, xs), expected, what="vmap over matrices and x")
    expected = torch.stack([xs[0] @ D.mT, xs[0] @ E.mT])
    assert_close(torch.vmap(lambda M: M.linear(xs[0]))(both), expected, what="vmap over matrices")
    mapped = torch.vmap(lambda M: M.mT.to_dense())(both)
    assert_close(mapped, torch.stack([D.mT, E.mT]), what="vmap of mT.to_dense")


def check_per_sample_gradients(entry: Entry, device: Any = "cpu") -> None:
    """Vmap of grad equals a loop of backward passes."""
    A = entry(entry.dtypes[0], device)
    values, rebuild = _split(A)
    if not values:
        return  # a permutation has nothing to differentiate; check_gradients covers x
    xs = draw((3, 2, A.shape[-1]), A)
    # Weighted: the norm of an orthogonal matrix's outputs has no gradient.
    weights = draw((A.shape[-2],), A, seed=2).abs()

    def loss(factors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return (rebuild(*factors).linear(x).abs().square() * weights).sum()

    fast = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(tuple(values), xs)
    for i in range(len(xs)):
        leaves = tuple(v.clone().requires_grad_() for v in values)
        slow = torch.autograd.grad(loss(leaves, xs[i]), leaves)
        for name, (f, s) in enumerate(zip(fast, slow, strict=True)):
            assert_close(f[i], s, what=f"gradient of factor {name} for sample {i}")
