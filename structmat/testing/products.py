"""Checks of products: against the dense reference, in every dtype and layout, and of the errors of bad operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from structmat.base import StructuredMatrix
from structmat.testing.entry import TOLERANCES, Entry, assert_close, draw


def _double(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _compare_products(A: StructuredMatrix, D: torch.Tensor) -> None:
    *batch, m, n = A.shape
    x, v = draw((*batch, 3, n), A), draw((*batch, n), A, 2)
    X, w, Y = draw((*batch, n, 2), A, 3), draw((*batch, m), A, 4), draw((*batch, m, 2), A, 5)
    assert_close(A.linear(x), _double(x) @ D.mT, what="linear")
    assert_close(A.matvec(v), (D @ _double(v).unsqueeze(-1)).squeeze(-1), what="matvec")
    assert_close(A.matmul(X), D @ _double(X), what="matmul")
    assert_close(A.rmatvec(w), (D.mH @ _double(w).unsqueeze(-1)).squeeze(-1), what="rmatvec")
    assert_close(A.rmatmul(Y), D.mH @ _double(Y), what="rmatmul")
    assert_close(A @ X, D @ _double(X), what="A @ X")
    assert_close(Y.mT @ A, _double(Y).mT @ D, what="X @ A")
    assert_close(torch.matmul(A, X), D @ _double(X), what="torch.matmul(A, X)")  # pyright: ignore[reportArgumentType]
    assert_close(torch.matmul(Y.mT, A), _double(Y).mT @ D, what="torch.matmul(X, A)")  # pyright: ignore[reportArgumentType]
    bias = draw((m,), A, 6)
    assert_close(F.linear(x, A, bias), _double(x) @ D.mT + _double(bias), what="F.linear")  # pyright: ignore[reportArgumentType]
    assert_close(A.mT.linear(Y.mT), _double(Y).mT @ D, what="mT.linear")
    assert_close(A.mT.mT.linear(x), _double(x) @ D.mT, what="mT.mT.linear")
    assert_close(A.H.linear(Y.mT), _double(Y).mT @ D.conj(), what="H.linear")
    assert_close(A.conj().linear(x), _double(x) @ D.mH, what="conj.linear")


def check_products(entry: Entry, device: Any = "cpu") -> None:
    """Every product and transpose equals the dense one, in real and complex double precision."""
    for dtype in (torch.float64, torch.complex128):
        if dtype in entry.dtypes:
            A = entry(dtype, device)
            _compare_products(A, entry.reference(A))
    A = entry(entry.dtypes[0], device)
    if A.ndim == 2:
        D, v = entry.reference(A), draw((A.shape[-1],), A)
        assert_close(A.linear(v), D @ _double(v), what="linear of a vector")
        assert_close(A @ v, D @ _double(v), what="A @ v")
        w = draw((A.shape[-2],), A)
        assert_close(w @ A, _double(w) @ D, what="v @ A")
        assert A.T.shape == D.T.shape


def check_dtypes(entry: Entry, device: Any = "cpu") -> None:
    """Every supported dtype keeps its dtype and its tolerance."""
    for dtype in entry.dtypes:
        A = entry(dtype, device)
        assert A.dtype == dtype, f"asked for {dtype}, got a matrix of {A.dtype}"
        D, x = entry.reference(A), draw((4, A.shape[-1]), A)
        y = A.linear(x)
        assert y.dtype == dtype, f"{dtype} in, {y.dtype} out"
        assert_close(y, _double(x) @ D.mT, what=f"linear in {dtype}")
        assert_close(A.to_dense(), D, what=f"to_dense in {dtype}")


def check_layouts(entry: Entry, device: Any = "cpu") -> None:
    """Empty, one-, two- and four-dimensional, non-contiguous and stride-0 operands."""
    A = entry(entry.dtypes[0], device)
    D, (*batch, m, n) = entry.reference(A), A.shape
    ones = (1,) * len(batch)
    for lead in ((0,), (1,), (5,), (3, 0), (2, *ones, 3), (2, 1, *ones, 3)):
        x = draw((*lead, n), A) if len(lead) == 1 or not batch else draw((*lead[:1], *batch, *lead[-1:], n), A)
        expected = torch.matmul(_double(x), D.mT)
        assert_close(A.linear(x), expected, what=f"linear of shape {tuple(x.shape)}")
    transposed = draw((n, 4), A).mT
    assert not transposed.is_contiguous() or n == 1 or transposed.shape[0] == 1
    assert_close(A.linear(transposed), _double(transposed) @ D.mT, what="linear of a non-contiguous x")
    strided = draw((4, 2 * n), A)[:, ::2]
    assert_close(A.linear(strided), _double(strided) @ D.mT, what="linear of a strided x")
    expanded = draw((1, n), A).expand(6, n)
    assert_close(A.linear(expanded), _double(expanded) @ D.mT, what="linear of a stride-0 x")
    empty = A.matmul(draw((*batch, n, 0), A))
    assert empty.shape == (*batch, m, 0)


def check_linearity(entry: Entry, device: Any = "cpu") -> None:
    """``A(ax + y) = a A x + A y``, and x is left as it was."""
    A = entry(entry.dtypes[0], device)
    x, y = draw((4, A.shape[-1]), A), draw((4, A.shape[-1]), A, 2)
    before = x.clone()
    assert_close(A.linear(-2.5 * x + y), -2.5 * A.linear(x) + A.linear(y), what="linearity")
    assert torch.equal(x, before), "linear changed its argument"


def check_adjoint(entry: Entry, device: Any = "cpu") -> None:
    """``<A x, y> = <x, A^H y>``."""
    for dtype in (torch.float64, torch.complex128):
        if dtype not in entry.dtypes:
            continue
        A = entry(dtype, device)
        x, y = draw((*A.batch_shape, A.shape[-1]), A), draw((*A.batch_shape, A.shape[-2]), A, 2)
        left = (A.matvec(x).conj() * y).sum(-1)
        right = (x.conj() * A.rmatvec(y)).sum(-1)
        # Relative to the sizes of the vectors: the inner product itself may cancel.
        scale = torch.linalg.vector_norm(A.matvec(x), dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        scale = scale + torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(A.rmatvec(y), dim=-1)
        worst = ((left - right).abs() / scale.clamp_min(1e-300)).max().item()
        assert worst <= 1e-12, f"<Ax, y> and <x, A^H y> differ by {worst:.2e}"


def check_autocast(entry: Entry, device: Any = "cpu") -> None:
    """Inside autocast float32 operands give the region's dtype; float64 and complex stay what they are."""
    kind = torch.device(device).type
    if torch.float32 in entry.dtypes and torch.bfloat16 in entry.dtypes:
        A = entry(torch.float32, device)
        x = draw((4, A.shape[-1]), A)
        with torch.autocast(kind, torch.bfloat16):
            y = A.linear(x)
        assert y.dtype == torch.bfloat16, f"autocast to bfloat16 gave {y.dtype}"
        assert_close(y, _double(x) @ entry.reference(A).mT, what="linear under autocast")
    for dtype in (torch.float64, torch.complex128):
        if dtype in entry.dtypes:
            A = entry(dtype, device)
            x = draw((4, A.shape[-1]), A)
            with torch.autocast(kind, torch.bfloat16):
                y = A.linear(x)
            assert y.dtype == dtype, f"autocast turned {dtype} into {y.dtype}"
            assert_close(y, x @ entry.reference(A).mT, what=f"linear of {dtype} under autocast")


def _raises(kinds: Any, text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kinds as error:
        assert text in str(error), f"the message {str(error)!r} does not say {text!r}"
    else:
        raise AssertionError(f"no error where {text!r} was expected")


def check_errors(entry: Entry, device: Any = "cpu") -> None:
    """Bad operands raise, and the message names what was wrong; nothing becomes dense by itself."""
    A = entry(entry.dtypes[0], device)
    assert A.dtype in TOLERANCES
    n = A.shape[-1]
    x: Any = draw((3, n), A)
    anything: Any = A
    _raises(ValueError, str(n), lambda: A.linear(draw((3, n + 1), A)))
    _raises(ValueError, str(n), lambda: A.matmul(draw((n + 1, 3), A)))
    _raises(TypeError, "dtype", lambda: A.linear(x.to(torch.float32 if A.dtype != torch.float32 else torch.float64)))
    _raises(TypeError, "torch.Tensor", lambda: A.linear([1.0] * n))  # pyright: ignore[reportArgumentType]
    _raises(ValueError, "meta", lambda: A.linear(x.to("meta")))
    _raises(TypeError, "to_dense", lambda: torch.exp(anything))
    _raises(TypeError, "to_dense", lambda: anything + x)
    _raises(TypeError, "", lambda: x + anything)
    _raises(TypeError, "@", lambda: anything * anything)
    _raises(TypeError, "Diagonal", lambda: anything * x)
    _raises(TypeError, "", lambda: anything @ [1.0])
    if not A.dtype.is_complex:
        _raises(TypeError, "complex", lambda: A * 1j)
    if A.ndim > 2:
        _raises(ValueError, "mT", lambda: A.T)
    if A.shape[-1] != A.shape[-2]:
        _raises(ValueError, "square", lambda: A.solve(draw((A.shape[-2],), A)))
        _raises(ValueError, "square", lambda: A.inverse())
