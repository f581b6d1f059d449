"""Toeplitz, Hankel and circulant matrices and their convolutions, beyond what the market checks."""

import cmath
import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat as sm
from structmat.matrices.displacement import _convolution
from structmat.matrices.displacement._convolution import (
    convolve,
    correlate,
    f_circulant,
    good_size,
    power_series_inverse,
    toeplitz,
)
from structmat.testing import assert_close
from structmat.testing.strategies import sizes

F = torch.float64
C = torch.complex128
CORNERS = [-1, 0, 1, 0.5, 2, cmath.exp(0.7j)]


def randn(*shape, dtype=F, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_transforms(monkeypatch):
    """Products of small matrices by transforms, as those of large ones."""
    for module in (_convolution, sm.matrices.displacement.circulant):
        monkeypatch.setattr(module, "DENSE_ENTRIES", 0)


# -------------------------------------------------------------------- convolutions
def test_good_sizes_are_the_smallest_even_smooth_ones():
    def smooth(n):
        for p in (2, 3, 5, 7):
            while n % p == 0:
                n //= p
        return n == 1

    wanted = [n for n in range(2, 5000, 2) if smooth(n)]
    for n in range(1, 4001):
        assert good_size(n) == next(w for w in wanted if w >= n)
    assert good_size(2**21 - 1) == 2**21 and good_size(2**32) == 2**32
    with pytest.raises(ValueError, match=str(2**32 + 1)):
        good_size(2**32 + 1)


@given(sizes(20), sizes(20), st.integers(1, 45), st.integers(0, 40), st.sampled_from([F, C, torch.float32]))
def test_pieces_of_a_convolution(p, q, size, start, dtype):
    a, b = randn(2, p, dtype=dtype), randn(3, 1, q, dtype=dtype, seed=1)
    full = np.zeros((3, 2, 100), dtype=complex)
    for i, j in itertools.product(range(3), range(2)):
        full[i, j, : p + q - 1] = np.convolve(a[j].to(C).numpy(), b[i, 0].to(C).numpy())
    expected = torch.from_numpy(full[..., start : start + size])
    got = convolve(a, b, size, start)
    assert got.dtype == dtype and got.shape == expected.shape
    # Relative to all entries: those that are asked for may be zero.
    assert (got - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * np.linalg.norm(full)
    transposed = correlate(a, b[..., : min(p, q)], p)
    T = scipy.linalg.toeplitz(np.r_[b[0, 0, : min(p, q)].numpy(), np.zeros(p - min(p, q))], np.zeros(p))
    assert_close(transposed[0], a @ torch.from_numpy(T).to(a.dtype), 3e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("f", CORNERS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 1000])
def test_f_circulants_are_polynomials_in_the_shift(n, f):
    dtype = C if isinstance(f, complex) else F
    v, x = randn(2, n, dtype=dtype), randn(2, n, dtype=dtype, seed=1)
    expected, power = torch.zeros_like(x), x
    for k in range(n):
        expected = expected + v[:, k : k + 1] * power
        power = torch.cat([f * power[:, -1:], power[:, :-1]], -1)
    assert_close(f_circulant(v, x, f), expected, 1e-13)
    if n == 1000 and dtype == F:
        assert_close(f_circulant(v.float(), x.float(), f), expected, 1e-6)


def test_a_complex_corner_needs_complex_numbers():
    with pytest.raises(TypeError, match=r"f = 1j is complex but the column has dtype torch.float64"):
        f_circulant(randn(3), randn(3), 1j)


@given(sizes(24), st.integers(1, 40), st.sampled_from([F, C]))
def test_power_series_inverse(p, size, dtype):
    c = randn(2, p, dtype=dtype) / (4 * p)
    c[:, 0] = 1.5
    inverse = power_series_inverse(c, size)
    unit = convolve(c, inverse, size)
    unit[:, 0] -= 1
    assert inverse.shape == (2, size) and unit.norm() < 1e-13


def test_a_power_series_without_constant_has_no_inverse():
    singular = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(RuntimeError, match="singular"):
        power_series_inverse(singular, 2)
    with pytest.raises(RuntimeError, match="singular"):
        sm.CausalToeplitz(singular).solve(torch.ones(2, 2))
    assert not torch.vmap(lambda c: power_series_inverse(c, 2))(singular).isfinite().all()


def test_convolutions_differentiate_map_and_compile():
    a, b = randn(2, 5).requires_grad_(), randn(7, seed=1).requires_grad_()

    def both(a, b):
        return convolve(a, power_series_inverse(b + 5, 6), 6, 2)

    assert torch.autograd.gradcheck(both, (a, b)) and torch.autograd.gradgradcheck(both, (a, b))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_close(compiled(a, b), both(a, b), 1e-14)
    assert_close(torch.vmap(both, in_dims=(0, None))(a, b), both(a, b), 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    a, b = randn(3, 500).to(dtype), randn(500, seed=1).to(dtype)
    exact = convolve(a.double(), b.double(), 500)
    assert convolve(a, b, 500).dtype == dtype
    assert_close(convolve(a, b, 500), exact, torch.finfo(dtype).eps / 2)
    with torch.autocast("cpu", torch.bfloat16):  # not in an autocast region either
        assert_close(convolve(a.float(), b.float(), 500), exact, 1e-6)


# -------------------------------------------------------------------- Toeplitz and Hankel
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1000, 3), (3, 1000), (499, 503), (256, 256)])
@pytest.mark.parametrize("dtype", [F, C])
def test_scipy_conventions_in_any_size(shape, dtype):
    m, n = shape
    column, row = randn(m, dtype=dtype), randn(n, dtype=dtype, seed=1)
    x, y = randn(4, n, dtype=dtype, seed=2), randn(4, m, dtype=dtype, seed=3)
    for cls, reference in ((sm.Toeplitz, scipy.linalg.toeplitz), (sm.Hankel, scipy.linalg.hankel)):
        A, D = cls(column, row), torch.from_numpy(reference(column.numpy(), row.numpy()))
        assert A.num_params == m + n - 1
        assert torch.equal(A.to_dense(), D) and torch.equal(A.mT.to_dense(), D.mT)
        assert_close(A.linear(x), x @ D.mT, 1e-13)
        assert_close(A.mT.linear(y), y @ D, 1e-13)
        assert torch.equal(A.diagonal(), D.diagonal()) and torch.equal(A.column, D[:, 0])
    assert torch.equal(sm.Toeplitz(column, row).row[1:], row[1:])
    assert torch.equal(sm.Hankel(column, row).row[1:], row[1:])


def test_default_rows_are_scipys():
    c = randn(5, dtype=C)
    assert torch.equal(sm.Toeplitz(c).to_dense(), torch.from_numpy(scipy.linalg.toeplitz(c.numpy())))
    assert torch.equal(sm.Hankel(c).to_dense(), torch.from_numpy(scipy.linalg.hankel(c.numpy())))


@given(sizes(24), sizes(24), st.sampled_from([F, C]))
def test_the_matrix_and_the_transforms_agree(m, n, dtype):
    d, x = randn(2, 1, m + n - 1, dtype=dtype), randn(3, 4, n, dtype=dtype, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_convolution, "DENSE_ENTRIES", 0)
        by_transforms = toeplitz(d, x, m)
    assert by_transforms.shape == (2, 3, 4, m)
    assert_close(by_transforms, toeplitz(d, x, m), 1e-13)


@pytest.mark.usefixtures("by_transforms")
@pytest.mark.parametrize(
    "name", ["toeplitz-rectangular", "hankel-batch", "causaltoeplitz-upper", "circulant", "circulant-prime"]
)
def test_large_matrices_pass_the_checks(name):
    from structmat.testing import check_all, market

    checks = ["products", "dtypes", "layouts", "autocast", "structure", "gradients", "vmap", "compile", "export"]
    check_all(next(e for e in market(name) if e.name == name), only=checks)


@pytest.mark.parametrize("cls", [sm.Toeplitz, sm.Hankel])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (7, 4), (4, 7), (2, 3, 3)])
def test_from_dense_is_the_orthogonal_projection(cls, shape):
    W, member = randn(*shape), cls.random(shape, dtype=F).to_dense()
    P = cls.from_dense(W)
    assert P.shape == W.shape
    assert ((W - P.to_dense()) * member).sum().abs() < 1e-13
    assert_close(cls.from_dense(member).to_dense(), member, 1e-15)


def test_closed_sums():
    T, K, S, Z = (cls.random((6, 6), dtype=F) for cls in (sm.Toeplitz, sm.CausalToeplitz, sm.Circulant, sm.Hankel))
    for A, B in itertools.product((T, K, K.mT, S, sm.Circulant(S.column, -1)), repeat=2):
        total = A + B
        assert isinstance(total, (sm.Toeplitz, sm.CausalToeplitz, sm.Circulant))
        assert_close(total.to_dense(), A.to_dense() + B.to_dense(), 1e-15)
    assert isinstance(Z + 2 * Z, sm.Hankel) and isinstance(T + Z, sm.Sum)


def test_errors_of_the_constructors():
    with pytest.raises(ValueError, match=r"row must have at least one entry, got shape \(0,\)"):
        sm.Toeplitz(torch.ones(2), torch.ones(0))
    with pytest.raises(TypeError, match=r"row has dtype torch\.float64"):
        sm.Hankel(torch.ones(2), randn(3))
    with pytest.raises(ValueError, match=r"batch dimensions \(2,\) of row do not broadcast with \(3,\)"):
        sm.Toeplitz(torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"column must be floating point or complex, got torch\.int64"):
        sm.Toeplitz(torch.arange(3))
    with pytest.raises(ValueError, match="nrows must be at most the number of diagonals 3, got 4"):
        sm.Toeplitz.from_diagonals(torch.ones(3), 4)
    with pytest.raises(ValueError, match="f must be 1"):
        sm.Circulant(torch.ones(3), 2)
    with pytest.raises(ValueError, match="square"):
        sm.Circulant.from_dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="square"):
        sm.CausalToeplitz.from_dense(torch.ones(2, 3))
    with pytest.raises(TypeError, match="upper must be a bool, got int"):
        sm.CausalToeplitz(torch.ones(3), 1)


# -------------------------------------------------------------------- closed algebras
@pytest.mark.parametrize("n", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [F, C, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        lambda c: sm.CausalToeplitz(c),
        lambda c: sm.CausalToeplitz(c, True),
        lambda c: sm.Circulant(c),
        lambda c: sm.Circulant(c, -1),
    ],
)
def test_commutative_algebras(make, n, dtype):
    a, b = randn(n, dtype=dtype) / (2 * n), randn(n, dtype=dtype, seed=1) / (2 * n)
    a[0], b[0] = 1, -2
    A, B = make(a), make(b)
    tol = 2e-6 if dtype == torch.float32 else 1e-14
    for closed, expected in (
        (A @ B, A.to_dense() @ B.to_dense()),
        (B @ A, A.to_dense() @ B.to_dense()),
        (A.inverse(), torch.linalg.inv(A.to_dense())),
        ((A @ B).inverse().mT, torch.linalg.inv(A.to_dense() @ B.to_dense()).mT),
        (3 * A - B, 3 * A.to_dense() - B.to_dense()),
    ):
        assert type(closed) is type(A)
        assert_close(closed.to_dense(), expected, tol)
    assert (A @ A.mT).to_dense().shape == (n, n)
    x = randn(n, 3, dtype=dtype, seed=2)
    assert_close(A.solve(A @ x), x, tol)
    assert_close(A.mT.solve(A.mT @ x), x, tol)


def test_solves_differentiate_and_map():
    c = randn(3, 5) / 8 + torch.tensor([1.0, 0, 0, 0, 0], dtype=F)
    b = randn(3, 5, 2, seed=1)
    for make in (sm.CausalToeplitz, sm.Circulant, lambda c: sm.Circulant(c, -1)):
        inputs = c[0].clone().requires_grad_(), b[0].clone().requires_grad_()
        for f in (lambda c, b: make(c).solve(b), lambda c, b: make(c).inverse().slogdet()[1]):  # noqa: B023
            assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
        mapped = torch.vmap(lambda c, b: make(c).solve(b))(c, b)  # noqa: B023
        assert_close(mapped, torch.linalg.solve(make(c).to_dense(), b), 1e-13)
        compiled = torch.compile(lambda c, b: make(c).solve(b), fullgraph=True, backend="aot_eager")  # noqa: B023
        assert_close(compiled(c, b), mapped, 1e-13)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(make(c.float()).solve(b.float()), mapped, 1e-6)


@pytest.mark.parametrize("f", [1, -1])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_eigenvalues_belong_to_their_eigenvectors(n, f):
    A = sm.Circulant(randn(n), f)
    k = torch.arange(n, dtype=F)
    shift = 0 if f == 1 else 0.5
    vectors = torch.polar(torch.ones(n, n, dtype=F), 2 * torch.pi * k[:, None] * (k + shift) / n)
    assert_close(A.to_dense().to(C) @ vectors, vectors * A.eigenvalues(), 1e-13)
    assert_close(A.eigenvalues().sum(), A.trace().to(C), 1e-13)


@pytest.mark.parametrize("f", [1, -1])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_circulant_projections(n, f):
    W, member = randn(2, n, n), sm.Circulant(randn(2, n, seed=1), f).to_dense()
    P = sm.Circulant.from_dense(W, f)
    assert ((W - P.to_dense()) * member).sum((-2, -1)).abs().max() < 1e-13
    assert_close(sm.Circulant.from_dense(member, f).to_dense(), member, 1e-15)
    T = sm.Toeplitz.random((2, n, n), dtype=F)
    assert_close(
        sm.Circulant.from_toeplitz(T, f).to_dense(), sm.Circulant.from_dense(T.to_dense(), f).to_dense(), 1e-14
    )


def test_a_singular_circulant_raises():
    for A in (sm.Circulant(torch.ones(4)), sm.Circulant(torch.tensor([1.0, -1.0])), sm.Circulant(torch.zeros(3))):
        for call in (A.inverse, lambda: A.solve(torch.ones(A.shape[-1]))):  # noqa: B023
            with pytest.raises(RuntimeError, match="singular to working precision"):
                call()
        sign, logabs = A.slogdet()
        assert sign == 0 or logabs < -10


def test_large_products_against_numpy():
    n = 30011  # a prime
    A, x = sm.Toeplitz.random((n, n), dtype=F), randn(n)
    expected = scipy.linalg.matmul_toeplitz((A.column.numpy(), A.row.numpy()), x.numpy())
    assert_close(A @ x, torch.from_numpy(expected), 1e-13)
    S = sm.Circulant.random((n, n), dtype=F)
    spectrum = np.fft.fft(S.column.numpy())
    assert_close(S @ x, torch.from_numpy(np.fft.ifft(spectrum * np.fft.fft(x.numpy())).real), 1e-12)
    assert A.flops < 100 * n * 16 and S.flops <= A.flops


@pytest.mark.parametrize("f", [1, -1])
def test_circulant_systems_without_columns_or_members(f):
    assert sm.Circulant.random((4, 4), f).solve(torch.ones(4, 0)).shape == (4, 0)
    none = sm.Circulant.random((0, 4, 4), f)
    assert none.solve(torch.ones(0, 4, 1)).shape == (0, 4, 1)
    assert none.inverse().shape == (0, 4, 4) and none.slogdet()[1].shape == (0,)
