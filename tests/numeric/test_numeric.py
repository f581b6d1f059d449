"""Numerical tools against NumPy, SciPy and dense torch."""

import numpy as np
import pytest
import scipy.interpolate
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import polynomial as npp

from structmat import ConditioningWarning, Toeplitz
from structmat.numeric import (
    levinson,
    levinson_durbin,
    pade,
    polynomial_divide,
    polynomial_evaluate,
    polynomial_interpolate,
    polynomial_multiply,
    rational_interpolation,
    toeplitz_lstsq,
    toeplitz_solve,
)
from structmat.testing import assert_close

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
DOUBLE = (torch.float64, torch.complex128)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def autocorrelation(*batch, order, dtype=torch.float64, seed=0):
    """Of random sequences, by the estimate that is positive definite."""
    x = draw(*batch, 4 * order + 8, dtype=dtype, seed=seed)
    x = x + 0.7 * x.roll(1, -1) - 0.4 * x.roll(2, -1)
    n = x.shape[-1]
    return torch.stack([(x[..., k:] * x[..., : n - k].conj()).sum(-1) / n for k in range(order + 1)], -1)


def circle(n):
    angle = 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.polar(torch.ones_like(angle), angle + 0.1)


# -------------------------------------------------------------------- Toeplitz
@pytest.mark.parametrize("dtype", DTYPES)
def test_square_systems(dtype):
    column, row, b = draw(2, 9, dtype=dtype), draw(2, 9, dtype=dtype, seed=1), draw(2, 9, 3, dtype=dtype, seed=2)
    D = Toeplitz(column, row).to_dense()
    tol = 1e-11 if dtype in DOUBLE else 1e-3
    assert_close(toeplitz_solve(column, row, b), torch.linalg.solve(D, b), tol)
    column[..., 0] = 5 * 9**0.5
    D = Toeplitz(column, row).to_dense()
    assert_close(levinson(column, row, b), torch.linalg.solve(D, b), 1e-13 if dtype in DOUBLE else 1e-5)
    assert_close(levinson(column, row, b[..., 0]), torch.linalg.solve(D, b)[..., 0], 1e-13 if dtype in DOUBLE else 1e-5)
    H = Toeplitz(column).to_dense()
    assert_close(levinson(column, None, b), torch.linalg.solve(H, b), 1e-13 if dtype in DOUBLE else 1e-5)
    assert_close(H, H.mH)


@pytest.mark.parametrize("dtype", DOUBLE)
def test_levinson_has_derivatives(dtype):
    column, row, b = draw(4, dtype=dtype), draw(4, dtype=dtype, seed=1), draw(4, 2, dtype=dtype, seed=2)
    column[0] = 8
    torch.autograd.gradcheck(levinson, [t.requires_grad_() for t in (column, row, b)])


def test_levinson_needs_leading_minors_and_the_solver_does_not():
    column, b = torch.tensor([0.0, 1.0, 2.0]).double(), draw(3)
    with pytest.raises(torch.linalg.LinAlgError, match="leading minor"):
        levinson(column, None, b)
    assert_close(toeplitz_solve(column, None, b), torch.linalg.solve(Toeplitz(column).to_dense(), b), 1e-12)
    with pytest.raises(ValueError, match="3 rows"):
        levinson(column, None, draw(4))
    with pytest.raises(TypeError, match="b has dtype"):
        levinson(column, None, b.float())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), st.booleans(), st.integers(0, 99))
def test_least_squares(n, more, complex, seed):
    dtype = torch.complex128 if complex else torch.float64
    T = Toeplitz(draw(2, n + more, dtype=dtype, seed=seed), draw(2, n, dtype=dtype, seed=seed + 1))
    D, b = T.to_dense(), draw(2, n + more, 2, dtype=dtype, seed=seed + 2)
    cond = torch.linalg.cond(D).max().item()
    if cond < 1e5:
        tol = 1e-13 * cond * max(1, 1e-3 * cond)
        assert_close(toeplitz_lstsq(T, b), torch.linalg.lstsq(D, b).solution, tol)
        assert_close(toeplitz_lstsq(T, b[..., 0]), torch.linalg.lstsq(D, b).solution[..., 0], tol)


def test_least_squares_of_many_rows():
    T, b = Toeplitz(draw(3000, dtype=torch.float32), draw(200, dtype=torch.float32)), draw(3000, dtype=torch.float32)
    expected = torch.linalg.lstsq(T.to_dense().double(), b.double().unsqueeze(-1)).solution.squeeze(-1)
    assert_close(toeplitz_lstsq(T, b), expected, 1e-6)
    x = draw(200)
    assert_close(toeplitz_lstsq(T.to(torch.float64), T.to(torch.float64) @ x), x, 1e-13)


@pytest.mark.parametrize("dtype", DOUBLE)
def test_derivatives_of_least_squares(dtype):
    column, row, b = draw(6, dtype=dtype), draw(3, dtype=dtype, seed=1), draw(6, 2, dtype=dtype, seed=2)
    leaves = [t.requires_grad_() for t in (column, row, b)]
    call = lambda column, row, b: toeplitz_lstsq(Toeplitz(column, row), b)  # noqa: E731
    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)


def test_errors_of_least_squares():
    with pytest.raises(ValueError, match="as many rows"):
        toeplitz_lstsq(Toeplitz(draw(2), draw(3)), draw(2))
    with pytest.raises(TypeError, match="a structmat"):
        toeplitz_lstsq(draw(3, 2), draw(3))
    with pytest.raises(TypeError, match="b has dtype"):
        toeplitz_lstsq(Toeplitz(draw(3), draw(2)), draw(3).float())
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        toeplitz_lstsq(Toeplitz(torch.ones(5), torch.ones(2)), torch.ones(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autoregressive_models_solve_yule_walker(dtype):
    r = autocorrelation(3, order=6, dtype=dtype)
    model = levinson_durbin(r, 4)
    tol = 1e-12 if dtype in DOUBLE else 1e-4
    expected = torch.linalg.solve(Toeplitz(r[..., :4]).to_dense(), r[..., 1:5])
    assert_close(model.coefficients, expected, tol)
    for order in range(1, 5):
        last = torch.linalg.solve(Toeplitz(r[..., :order]).to_dense(), r[..., 1 : order + 1])[..., -1]
        assert_close(model.reflection[..., order - 1], last, 2 * tol)
    assert (model.reflection.abs() < 1).all()
    assert not model.variance.is_complex()
    assert_close(model.variance, (r[..., 0] - (expected * r[..., 1:5].conj()).sum(-1)).real, tol)
    assert levinson_durbin(r).coefficients.shape == (3, 6)


def test_a_known_process_is_found():
    a = torch.tensor([0.5, -0.3]).double()
    x = torch.from_numpy(scipy.signal.lfilter([1.0], [1.0, -0.5, 0.3], draw(200_000).numpy()))
    r = torch.stack([(x[k:] * x[: len(x) - k]).mean() for k in range(5)])
    model = levinson_durbin(r)
    assert_close(model.coefficients, torch.nn.functional.pad(a, (0, 2)), 0.02)
    assert abs(model.variance - 1) < 0.02


def test_derivatives_and_errors_of_models():
    r = autocorrelation(2, order=3).requires_grad_()
    torch.autograd.gradcheck(lambda r: (levinson_durbin(r).coefficients, levinson_durbin(r).variance), r)
    with pytest.raises(torch.linalg.LinAlgError, match="positive definite"):
        levinson_durbin(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="order must be at most 1"):
        levinson_durbin(torch.tensor([1.0, 0.5]), 2)
    with pytest.raises(ValueError, match="order must be at least 1"):
        levinson_durbin(torch.tensor([1.0]))


# -------------------------------------------------------------------- rational functions
@pytest.mark.parametrize(("m", "n"), [(0, 0), (3, 0), (0, 3), (2, 2), (1, 4), (4, 1)])
def test_pade_against_scipy(m, n):
    c = 1 / torch.cumprod(torch.arange(12, dtype=torch.float64).clamp(min=1), 0)
    p, q = pade(c, m, n)
    expected = scipy.interpolate.pade(c[: m + n + 1].numpy(), n, m)
    for got, poly in zip((p, q), expected, strict=True):
        assert_close(got, torch.from_numpy(np.array(poly.coeffs[::-1], dtype=float)), 1e-10)
    error = polynomial_multiply(q, c[: m + n + 1])[: m + n + 1] - torch.nn.functional.pad(p, (0, n))
    assert error.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", DOUBLE)
def test_pade_batches_and_derivatives(dtype):
    c = draw(2, 6, dtype=dtype).requires_grad_()
    p, q = pade(c, 2, 3)
    assert (p.shape, q.shape) == ((2, 3), (2, 4))
    for i in range(2):
        for got, one in zip((p, q), pade(c[i], 2, 3), strict=True):
            assert_close(got[i], one, 1e-12)
    torch.autograd.gradcheck(lambda c: pade(c, 2, 3), c)
    with pytest.raises(ValueError, match="at least m \\+ n \\+ 1 = 7"):
        pade(c, 3, 3)
    with pytest.raises(ValueError, match="n must be at least 0"):
        pade(c, 3, -1)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        pade(torch.ones(5, dtype=dtype), 2, 2)  # 1 / (1 - z), of degrees (0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(0, 99))
def test_rational_functions_are_found(n, seed):
    generator = torch.Generator().manual_seed(seed)
    # On both sides and apart: of poles close together the function is nearly one of lower degree.
    distance = 1.2 + 0.4 * torch.arange(n) + 0.2 * torch.rand(n, generator=generator, dtype=torch.float64)
    poles = distance * (-1) ** torch.arange(n)
    residues = 1 + torch.rand(n, generator=generator, dtype=torch.float64)

    def f(z):
        return 2 + (residues / (z.unsqueeze(-1) - poles)).sum(-1)

    nodes = torch.cos(torch.pi * (torch.arange(2 * n + 1, dtype=torch.float64) + 0.5) / (2 * n + 1))
    r = rational_interpolation(nodes, f(nodes))
    z = torch.linspace(-1, 1, 17, dtype=torch.float64)
    assert_close(r(z), f(z), 1e-6 if n > 3 else 1e-8)
    assert_close(r(nodes), f(nodes), 1e-8)


def test_rational_interpolation_of_batches_complex_and_derivatives():
    nodes, values = circle(7), draw(2, 7, dtype=torch.complex128)
    r = rational_interpolation(nodes, values)
    assert r.weights.shape == (2, 4)
    assert_close(r(nodes.expand(2, 7)), values, 1e-10)
    assert torch.equal(r(nodes[::2].expand(2, 4)), values[:, ::2])
    z = 0.3 * circle(3)
    torch.autograd.gradcheck(
        lambda n, v: rational_interpolation(n, v)(z), (nodes.requires_grad_(), values.requires_grad_())
    )
    single = rational_interpolation(nodes.detach().to(torch.complex64), values.detach().to(torch.complex64))
    assert_close(single(z.to(torch.complex64)), r(z), 1e-4)
    with pytest.raises(ValueError, match="2 n \\+ 1 each"):
        rational_interpolation(draw(4), draw(4))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        rational_interpolation(torch.arange(5.0), torch.ones(5))


# -------------------------------------------------------------------- polynomials
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(DTYPES), st.integers(0, 99))
def test_products_and_quotients_against_numpy(p, q, dtype, seed):
    a, b = draw(2, p, dtype=dtype, seed=seed), draw(q, dtype=dtype, seed=seed + 1)
    b[-1] = 6 * q**0.5  # roots within the unit circle
    tol = 1e-12 if dtype in DOUBLE else 1e-4
    product = polynomial_multiply(a, b)
    assert_close(product, torch.stack([torch.from_numpy(np.convolve(r.numpy(), b.numpy())) for r in a]), tol)
    quotient, rest = polynomial_divide(a, b)
    for i in range(2):
        expected = npp.polydiv(a[i].numpy(), b.numpy())
        for got, wanted in zip((quotient[i], rest[i]), expected, strict=True):
            wanted = torch.from_numpy(np.atleast_1d(wanted)).to(dtype)
            wanted = torch.nn.functional.pad(wanted, (0, len(got) - len(wanted)))
            assert (got - wanted).norm() <= tol * a[i].norm()
    whole = polynomial_divide(product, b)
    assert_close(whole[0], a, tol)
    assert whole[1].norm() <= tol * product.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_coefficients(dtype):
    nodes = (circle(8) if dtype.is_complex else torch.linspace(-1, 1, 8)).to(dtype)
    c = draw(3, 8, dtype=dtype)
    values = polynomial_evaluate(c, nodes)
    expected = torch.stack([torch.from_numpy(npp.polyval(nodes.numpy(), r.numpy())) for r in c])
    assert_close(values, expected, 1e-13 if dtype in DOUBLE else 1e-5)
    assert_close(polynomial_interpolate(nodes, values), c, 1e-10 if dtype in DOUBLE else 1e-2)
    assert_close(polynomial_evaluate(c[0], nodes[:3].expand(2, 3)), expected[:1, :3].expand(2, 3), 1e-5)


@pytest.mark.filterwarnings("error")
def test_evaluation_does_not_warn_and_interpolation_does():
    nodes = torch.linspace(-3, 3, 40)
    assert polynomial_evaluate(torch.ones(40) / 1e10, nodes).isfinite().all()
    with pytest.raises(ConditioningWarning, match="condition number"):
        polynomial_interpolate(nodes, torch.ones(40))


@pytest.mark.parametrize("dtype", DOUBLE)
def test_derivatives_of_polynomials(dtype):
    a, b = draw(2, 5, dtype=dtype).requires_grad_(), draw(3, dtype=dtype, seed=1).requires_grad_()
    nodes = (circle(5) if dtype.is_complex else torch.linspace(-1, 1, 5, dtype=dtype)).requires_grad_()
    torch.autograd.gradcheck(polynomial_multiply, (a, b))
    torch.autograd.gradcheck(polynomial_divide, (a, b))
    torch.autograd.gradcheck(polynomial_evaluate, (a, nodes))
    torch.autograd.gradcheck(polynomial_interpolate, (nodes, a))


def test_errors_of_polynomials():
    with pytest.raises(torch.linalg.LinAlgError, match="is 0"):
        polynomial_divide(draw(3), torch.tensor([1.0, 0.0]).double())
    with pytest.raises(ValueError, match="b must have at least one entry"):
        polynomial_multiply(draw(3), draw(0))
    with pytest.raises(TypeError, match="b has dtype"):
        polynomial_multiply(draw(3), draw(3).float())
    with pytest.raises(TypeError, match="floating point"):
        polynomial_evaluate(torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="as many as nodes, 3"):
        polynomial_interpolate(draw(3), draw(4))
    with pytest.raises(ValueError, match="do not broadcast"):
        polynomial_multiply(draw(2, 3), draw(3, 3))


def test_least_squares_name_the_right_hand_side():
    with pytest.raises(ValueError, match="b must have 5 rows"):
        toeplitz_lstsq(Toeplitz.random((5, 3)), torch.ones(4))
