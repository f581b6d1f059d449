"""Vandermonde and Cauchy matrices beyond what the market checks."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat as sm
from structmat.matrices.displacement import cauchy, vandermonde
from structmat.testing import assert_close
from structmat.testing.strategies import sizes

F = torch.float64
C = torch.complex128


def randn(*shape, dtype=F, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def roots(n, dtype=C):
    angle = 2 * torch.pi * torch.arange(n, dtype=F) / n
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


# -------------------------------------------------------------------- Vandermonde
@given(sizes(24), sizes(24), st.integers(1, 9), st.sampled_from([F, C]))
def test_products_in_any_chunks(m, n, chunk, dtype):
    V = sm.Vandermonde.random((2, m, n), dtype=dtype, generator=torch.Generator().manual_seed(m + n))
    D = V.nodes.unsqueeze(-1) ** torch.arange(n)
    x, y = randn(3, n, dtype=dtype), randn(3, m, dtype=dtype, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vandermonde, "CHUNK", chunk)
        assert_close(V.linear(x), x @ D.mT, 1e-13)
        assert_close(V.mT.linear(y), y @ D, 1e-13)
    assert_close(V.diagonal(), D.diagonal(dim1=-2, dim2=-1), 1e-13)


def test_many_columns_on_the_unit_circle_are_the_fourier_transform():
    n = 1000
    V, x = sm.Vandermonde(roots(n).conj(), n), randn(2, n, dtype=C)
    assert_close(V.linear(x), torch.fft.fft(x), 1e-11)
    single = V.to(torch.complex64)
    assert_close(single.linear(x.to(torch.complex64)), torch.fft.fft(x), 1e-3)  # nodes are rounded, times up to n


@pytest.mark.parametrize("n", [1, 2, 3, 16, 128])
def test_solves_on_the_unit_circle(n):
    V, b = sm.Vandermonde(roots(n) * torch.exp(0.3j * torch.ones(1, dtype=C) / n), n), randn(n, 2, dtype=C)
    D = V.to_dense()
    assert_close(V.solve(D @ b), b, 1e-11)
    assert_close(V.mT.solve(D.mT @ b), b, 1e-11)
    sign, logabs = V.slogdet()
    expected = torch.linalg.slogdet(D)
    assert (sign - expected[0]).abs() < 1e-9 and (logabs - expected[1]).abs() < 1e-9


def test_real_interpolation_keeps_digits():
    # Chebyshev nodes: the interpolating polynomial of a smooth function has this backward error.
    n = 20
    nodes = torch.cos(torch.pi * (torch.arange(n, dtype=F) + 0.5) / n)
    V, values = sm.Vandermonde(nodes, n), nodes.exp()
    coefficients = V.solve(values)
    assert_close(V @ coefficients, values, 1e-14)
    assert_close(coefficients[:8], torch.tensor([1 / math.factorial(k) for k in range(8)], dtype=F), 1e-9)


def test_solves_differentiate_and_broadcast():
    nodes = torch.linspace(-1, 1, 5, dtype=F) + 0.05 * randn(3, 5)
    b = randn(5, 2, seed=1)
    V = sm.Vandermonde(nodes, 5)
    assert_close(V.solve(b), torch.linalg.solve(V.to_dense(), b), 1e-12)
    assert_close(V.mT.solve(b), torch.linalg.solve(V.to_dense().mT, b), 1e-12)
    assert_close(sm.Vandermonde(nodes[0], 5).solve(V.to_dense() @ b)[0], b, 1e-12)
    inputs = nodes[0].clone().requires_grad_(), b.clone().requires_grad_()
    for f in (
        lambda v, b: sm.Vandermonde(v, 5).solve(b),
        lambda v, b: sm.Vandermonde(v, 5).mT.solve(b),
        lambda v, b: sm.Vandermonde(v, 5).logdet(),
    ):
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    mapped = torch.vmap(lambda v: sm.Vandermonde(v, 5).solve(b))(nodes)
    assert_close(mapped, V.solve(b), 1e-13)


def test_gradients_at_a_node_of_zero():
    nodes = torch.tensor([0.0, 0.5, -1.0], dtype=F, requires_grad=True)
    f = lambda v: sm.Vandermonde(v, 5).linear(torch.arange(5.0, dtype=F)[None])  # noqa: E731
    assert torch.autograd.gradcheck(f, nodes) and torch.autograd.gradgradcheck(f, nodes)


@pytest.mark.parametrize(
    ("nodes", "n", "number"),
    [
        (0.98 * roots(1024, torch.complex64), 1024, r"1e9"),
        (torch.linspace(-1, 1, 64, dtype=F), 64, r"1e2\d"),
        (torch.tensor([1.0, 4.0]), 40, r"1e2[23]"),
    ],
)
def test_bad_nodes_warn_with_the_number(nodes, n, number):
    with pytest.warns(
        sm.ConditioningWarning, match=rf"{len(nodes)} x {n} .* condition number of at least {number}"
    ) as seen:
        sm.Vandermonde(nodes, n)
    assert seen[0].filename == __file__


def test_good_nodes_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sm.Vandermonde(roots(1024), 1024)
        sm.Vandermonde(torch.zeros(1), 1)
        sm.Vandermonde(torch.tensor([0.0, 0.5, 1.0]), 3).mT.to_dense()


@given(sizes(12), sizes(12), st.floats(0.3, 3), st.booleans())
def test_the_bound_is_below_the_condition_number(m, n, scale, real):
    nodes = scale * (
        torch.rand(m, dtype=F) * 2 - 1 if real else torch.polar(torch.rand(m, dtype=F), 6 * torch.rand(m, dtype=F))
    )
    V = sm.Vandermonde._rebuild((nodes,), (n, nodes.dtype))
    values = torch.linalg.svdvals(V.to_dense())
    if values[-1] > 1e-13 * values[0]:
        assert V.log10_condition() <= (values[0] / values[-1]).log10() + 1e-6


def test_equal_nodes_and_projections_raise():
    V = sm.Vandermonde(torch.tensor([1.0, 2.0, 1.0]), 3)
    for call in (lambda: V.solve(torch.ones(3)), lambda: V.mT.solve(torch.ones(3))):
        with pytest.raises(RuntimeError, match="two equal nodes is singular"):
            call()
    for cls in (sm.Vandermonde, sm.Cauchy):
        with pytest.raises(NotImplementedError, match="no projection"):
            cls.from_dense(torch.eye(3))


@pytest.mark.parametrize("cls", [sm.Vandermonde, sm.Cauchy])
def test_nodes_are_never_rounded_to_half(cls):
    A = cls.random((12, 12), dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    half = A.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in half.tensors())
    x = randn(3, 12).to(torch.bfloat16)
    D = A.to(F).to_dense()
    assert_close(half.linear(x), x.double() @ D.mT, 2**-8)
    assert_close(half.mT.linear(x), x.double() @ D, 2**-8)
    assert torch.equal(half.to(torch.float32).to_dense(), A.to_dense())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(A.mT.linear(x.float()), x.double() @ D, 1e-2)
    assert cls.random((3, 3), dtype=torch.float16).to_dense().dtype == torch.float16
    wrong = (*A.tensors(), *(12,) * (cls is sm.Vandermonde), F)
    with pytest.raises(
        TypeError, match=r"dtype must be that of the nodes, torch\.float32, or a half one, got torch\.float64"
    ):
        cls(*wrong)


# -------------------------------------------------------------------- Cauchy
@given(sizes(24), sizes(24), st.integers(1, 60), st.sampled_from([F, C]))
def test_cauchy_products_in_any_chunks(m, n, chunk, dtype):
    A = sm.Cauchy.random((2, m, n), dtype=dtype, generator=torch.Generator().manual_seed(m + n))
    D, x = A.to_dense(), randn(3, n, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cauchy, "CHUNK", chunk)
        assert_close(A.linear(x), x @ D.mT, 1e-13)
        sm.Cauchy(A.s, A.t)
        with pytest.raises(ValueError, match=r"no s\[i\] may equal a t\[j\]"):
            sm.Cauchy(A.s, torch.cat([A.t, A.s[..., -1:]], -1))


def test_the_inverse_of_a_hilbert_matrix_is_exact():
    n = 10  # of condition number 1e13: a dense inverse has three digits
    k = torch.arange(n, dtype=F)
    H = sm.Cauchy(k, -1 - k)
    got = H.inverse().to_dense()
    i = np.arange(1, n + 1)
    exact = [
        [
            (-1) ** (a + b)
            * (a + b - 1)
            * math.comb(n + a - 1, n - b)
            * math.comb(n + b - 1, n - a)
            * math.comb(a + b - 2, a - 1) ** 2
            for b in i.tolist()
        ]
        for a in i.tolist()
    ]
    assert ((got / torch.tensor(exact, dtype=F)) - 1).abs().max() < 1e-11
    assert_close(H.logdet(), torch.tensor(math.log(2.164179226431492e-53), dtype=F), 1e-12)


@pytest.mark.parametrize("n", [1, 2, 50, 1000])
@pytest.mark.parametrize("dtype", [F, torch.complex64, torch.float32])
def test_cauchy_solves(n, dtype):
    A = sm.Cauchy.random((n, n), dtype=dtype, generator=torch.Generator().manual_seed(n))
    b, tol = randn(n, 2, dtype=dtype), 1e-11 if dtype == F else 2e-5
    assert_close(A.solve(A @ b), b, tol)
    assert_close(A.mT.inverse() @ (A.mT @ b), b, tol)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(A.solve(torch.ones_like(b)), torch.linalg.solve(A.to_dense(), torch.ones_like(b)), 10 * tol)


def test_cauchy_solves_differentiate():
    A = sm.Cauchy.random((4, 4), dtype=F)
    inputs = [t.clone().requires_grad_() for t in (A.s, A.t, randn(4, 2))]
    for f in (lambda s, t, b: sm.Cauchy(s, t).solve(b), lambda s, t, b: sm.Cauchy(s, t).logdet().exp()):
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_cauchy_errors():
    with pytest.raises(ValueError, match=r"2\.0 is in both"):
        sm.Cauchy(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    with pytest.raises(RuntimeError, match="two equal entries of t is singular"):
        sm.Cauchy(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])).solve(torch.ones(2))
