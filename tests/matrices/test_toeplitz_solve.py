"""Solving with Toeplitz and Hankel matrices: generators, both ways of solving, inverses, determinants, derivatives."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structmat import CausalToeplitz, Circulant, Hankel, HankelLike, Toeplitz, ToeplitzLike
from structmat.matrices.displacement import _toeplitz_solve as ways
from structmat.testing import assert_close


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def decaying(n, dtype=torch.float64):
    k = torch.arange(n, dtype=torch.float64)
    return Toeplitz(((1 + k) ** -1.1).to(dtype), (0.7 * (1 + k) ** -1.3).to(dtype))


def random(n, *batch, dtype=torch.float64, seed=0):
    return Toeplitz.from_diagonals(draw(*batch, 2 * n - 1, dtype=dtype, seed=seed), n)


@pytest.fixture
def only(monkeypatch):
    """Take one of the two ways of solving; the other fails the test."""

    def choose(kept):
        def never(*_):
            raise AssertionError("solved the other way")

        monkeypatch.setattr(ways, "_eliminate" if kept == "_iterate" else "_iterate", never)

    return choose


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.sampled_from([None, 0.0, 0.5, -2.0]), st.integers(0, 99))
def test_generators_of_rank_two(m, n, complex, e, seed):
    dtype = torch.complex128 if complex else torch.float64
    f = None if e is None else 3.0
    column, row = draw(2, m, dtype=dtype, seed=seed), draw(2, n, dtype=dtype, seed=seed + 1)
    T, H = Toeplitz(column, row), Hankel(column, row)
    for plain, like in ((T, ToeplitzLike), (H, HankelLike)):
        M = plain.to_ldr(e, f)
        assert type(M) is like
        assert M.displacement_rank == 2
        assert_close(M.to_dense(), plain.to_dense(), 1e-11)
        A, B = M.A.to_dense(), M.B.to_dense()
        assert_close(M.displacement().to_dense(), A @ plain.to_dense() - plain.to_dense() @ B)


def test_generators_of_relatives():
    column = draw(6)
    for C in (Circulant(column), Circulant(column, -1), CausalToeplitz(column), CausalToeplitz(column, True)):
        assert_close(C.to_ldr().to_dense(), C.to_dense())
        assert_close(C.to_ldr(0.0, 2.0).to_dense(), C.to_dense())
    with pytest.raises(ValueError, match="common eigenvalue"):
        Circulant(column).to_ldr(1.0, 1.0)
    with pytest.raises(TypeError, match="complex generators"):
        Toeplitz(column).to_ldr(1j)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [1, 2, 3, 50, 131])
def test_elimination_against_dense(n, dtype):
    for M in (random(n, 2, dtype=dtype), Hankel.from_entries(draw(2, 2 * n - 1, dtype=dtype), n)):
        D, b = M.to_dense(), draw(n, 3, dtype=dtype, seed=1)
        cond = torch.linalg.cond(D).max().item()
        assert_close(M.solve(b), torch.linalg.solve(D, b), 1e-14 * cond + 1e-13)
        residual = (b - M.matmul(M.solve(b))).norm() / (D.norm() * M.solve(b).norm())
        assert residual <= 1e-15, "not backward stable"
        assert M.inverse().displacement_rank == 2
        assert_close(M.inverse().to_dense(), torch.linalg.inv(D), 1e-13 * cond)
        assert_close(M.inverse().inverse().to_dense(), D, 1e-13 * cond**2)
        for got, expected in zip(M.slogdet(), torch.linalg.slogdet(D), strict=True):
            assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_iterations_where_entries_decay(only, dtype):
    only("_iterate")
    T = decaying(700, dtype)
    D, b = T.to_dense(), draw(700, 4, dtype=dtype)
    assert_close(T.solve(b), torch.linalg.solve(D, b), 1e-12)
    assert_close(T.mT.solve(b), torch.linalg.solve(D.mT, b), 1e-12)
    H = Hankel.from_entries(T.diagonals, 700)
    assert_close(H.solve(b), torch.linalg.solve(H.to_dense(), b), 1e-12)
    assert_close(T.inverse().to_dense(), torch.linalg.inv(D), 1e-11)
    assert_close(T.to(torch.complex64).solve(b.to(torch.complex64)), torch.linalg.solve(D, b).to(torch.complex64), 1e-5)


def test_elimination_where_nothing_decays():
    n = 600
    T, b = random(n), draw(n)
    assert ways._iterate(T, b.unsqueeze(-1)) is None
    cond = torch.linalg.cond(T.to_dense()).item()
    assert_close(T.solve(b), torch.linalg.solve(T.to_dense(), b), 1e-15 * cond + 1e-13)


def test_many_columns_are_eliminated(only):
    only("_eliminate")
    T, b = decaying(520), draw(520, 9)
    assert_close(T.matmul(T.solve(b)), b, 1e-13)


def test_batches_of_iterations_broadcast(only):
    only("_iterate")
    scale = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    T = Toeplitz.from_diagonals(scale * decaying(512).diagonals, 512)
    b = draw(3, 1, 512, 2)
    assert_close(T.solve(b), torch.linalg.solve(T.to_dense(), b.expand(3, 2, 512, 2)), 1e-12)
    assert T.solve(draw(2, 512)).shape == (2, 512)


@pytest.mark.parametrize("n", [64, 512, 1024])
def test_a_tiny_main_diagonal(n):
    d = draw(2 * n - 1)
    d[n - 1] = 1e-10
    T, b = Toeplitz.from_diagonals(d, n), draw(n)
    assert torch.linalg.cond(T.to_dense()) < 1e6
    residual = (b - T @ T.solve(b)).norm() / b.norm()
    scipys = scipy.linalg.solve_toeplitz((T.column.numpy(), T.row.numpy()), b.numpy())
    assert residual <= 1e-12
    assert (b - T @ torch.from_numpy(scipys)).norm() / b.norm() > 1e-8, "SciPy got better: say so"


@pytest.mark.parametrize(("n", "frequency"), [(6, 0.0), (600, 0.0), (600, 0.1)])
def test_singular_matrices_raise(n, frequency):
    T = Toeplitz.from_diagonals(torch.cos(frequency * torch.arange(1 - n, n, dtype=torch.float64)), n)
    H = Hankel.from_entries(T.diagonals, n)
    b = T @ torch.ones(n, dtype=torch.float64)  # which has solutions
    for call in (lambda: T.solve(b), T.inverse, T.slogdet, lambda: H.solve(b), H.inverse):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            call()


def test_inverses_need_no_first_entry():
    # (T^-1)[0, 0] = 0, by which Gohberg and Semencul's formula divides.
    T = Toeplitz(torch.tensor([1.0, 2.0, 0.0, 1.0]).double(), torch.tensor([1.0, 1.0, 1.0, 0.5]).double())
    minor = T.to_dense()[1:, 1:]
    T = Toeplitz.from_diagonals(T.diagonals, 4)
    shift = torch.linalg.eigvals(minor)
    real = shift[shift.imag.abs() < 1e-12].real[0]
    T = T + Toeplitz(torch.tensor([-real, 0, 0, 0]).double(), torch.zeros(4).double())
    assert torch.linalg.inv(T.to_dense())[0, 0].abs() < 1e-13
    assert_close(T.inverse().to_dense(), torch.linalg.inv(T.to_dense()), 1e-12)


def test_inverse_of_4096_multiplies_back():
    T, x = decaying(4096, torch.float64), draw(4096)
    assert_close(T.inverse() @ (T @ x), x, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("make", [Toeplitz.from_diagonals, Hankel.from_entries])
def test_derivatives(make, dtype):
    d = draw(2, 7, dtype=dtype)
    d[:, 3] += 4
    leaves = d.requires_grad_(), draw(2, 4, 2, dtype=dtype).requires_grad_()
    torch.autograd.gradcheck(lambda d, b: make(d, 4).solve(b), leaves)
    torch.autograd.gradgradcheck(lambda d, b: make(d, 4).solve(b), leaves)
    torch.autograd.gradcheck(lambda d: make(d, 4).inverse().to_dense(), leaves[:1])
    torch.autograd.gradcheck(lambda d: make(d, 4).slogdet()[1], leaves[:1])


def test_derivatives_of_iterated_solutions(only):
    only("_iterate")
    T, b = decaying(512), draw(512)
    d = T.diagonals.clone().requires_grad_()
    b.requires_grad_()
    y = Toeplitz.from_diagonals(d, 512).solve(b)
    got = torch.autograd.grad(y.square().sum(), (d, b))
    dense = Toeplitz.from_diagonals(d, 512).to_dense()
    expected = torch.autograd.grad(torch.linalg.solve(dense, b).square().sum(), (d, b))
    for one, two in zip(got, expected, strict=True):
        assert_close(one, two, 1e-11)


def test_float32_solutions_have_float32_errors():
    T = decaying(300).to(torch.float32)
    b = draw(300, dtype=torch.float32)
    expected = np.linalg.solve(T.to_dense().double().numpy(), b.double().numpy())
    assert_close(T.solve(b), torch.from_numpy(expected), 1e-7)


def test_what_has_no_solution_is_refused():
    with pytest.raises(ValueError, match="square"):
        Toeplitz(draw(3), draw(4)).solve(draw(3))
    with pytest.raises(ValueError, match="square"):
        Hankel(draw(3), draw(4)).inverse()
    with pytest.raises(TypeError, match="float32"):
        decaying(4).to(torch.bfloat16).inverse()


def test_iterations_under_a_default_device():
    T, b = Toeplitz(0.5 ** torch.arange(600, dtype=torch.float64)), torch.ones(600, dtype=torch.float64)
    with torch.device("meta"):
        x = T.solve(b)
    assert_close(T.matvec(x), b)
