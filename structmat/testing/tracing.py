"""Checks of torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn.parameters import MatrixParameters
from structmat.testing.entry import Entry, assert_close, draw


class Apply(nn.Module):
    """A module that owns a matrix and multiplies by it."""

    def __init__(self, A: Any) -> None:
        super().__init__()
        self.weight = MatrixParameters(A)

    def forward(self, x: Tensor) -> Tensor:
        """``weight().linear(x)``."""
        return self.weight().linear(x)


def check_compile(entry: Entry, device: Any = "cpu", backend: str = "aot_eager") -> None:
    """``torch.compile(fullgraph=True)`` of linear, forward and backward; and compiled ``A @ X`` equals eager."""
    torch.compiler.reset()
    A = entry(entry.dtypes[0], device)
    D = entry.reference(A)
    module = Apply(A)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = draw((4, A.shape[-1]), A).requires_grad_()
    y = compiled(x)
    assert_close(y, x @ D.mT, what="compiled linear")
    inputs = [x, *module.parameters()]
    weights = draw((A.shape[-2],), A, seed=2).abs()  # the plain norm of an orthogonal matrix's outputs has no gradient
    expected = torch.autograd.grad((module(x).abs().square() * weights).sum(), inputs)
    got = torch.autograd.grad((y.abs().square() * weights).sum(), inputs)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, what="gradient of compiled linear")
    value = torch.compile(lambda M, v: M.linear(v), fullgraph=True, backend=backend)(A, x.detach())
    assert_close(value, x @ D.mT, what="compiled linear of a value")
    X = draw((A.shape[-1], 3), A)
    assert_close(torch.compile(lambda M, v: M @ v, backend=backend)(A, X), D @ X, what="compiled A @ X")


def check_export(entry: Entry, device: Any = "cpu") -> None:
    """``torch.export`` of a module with the matrix, with a dynamic number of tokens."""
    A = entry(entry.dtypes[0], device)
    D = entry.reference(A)
    x = draw((4, A.shape[-1]), A)
    program = torch.export.export(Apply(A), (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
    for tokens in (4, 9):
        x = draw((tokens, A.shape[-1]), A)
        assert_close(program.module()(x), x @ D.mT, what=f"exported linear of {tokens} tokens")
