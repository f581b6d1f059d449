"""Exact members of the kaleidoscope hierarchy against their dense definitions."""

import itertools
import math

import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from structmat import Kaleidoscope, KroneckerSparse, kaleidoscopes
from structmat.kaleidoscopes._routing import route, route_inside_out
from structmat.testing import assert_close, dense_by_definition

SIZES = [1, 2, 3, 4, 6, 8, 9, 11, 13, 30, 64, 97]
# float64 as promised; float32 with room to 5e-7 at n = 1024
TOLERANCES = {torch.complex128: 1e-12, torch.complex64: 5e-7, torch.float64: 1e-12, torch.float32: 5e-7}
complex_dtypes = pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def randperm(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def check(K, dense, width, dtype, expansion=None):
    assert isinstance(K, Kaleidoscope) and K.width == width and K.dtype == dtype
    if expansion is not None:
        assert K.expansion <= expansion
    assert_close(K.to_dense(), torch.as_tensor(dense), TOLERANCES[dtype])


# -------------------------------------------------------------------- permutations
def test_all_permutations_of_four():
    for perm in itertools.permutations(range(4)):
        P = kaleidoscopes.permutation(perm)
        assert (P.width, P.expansion) == (1, 1.0)
        assert torch.equal(P.to_dense(), torch.eye(4)[list(perm)])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 11, 60, 97, 243, 1000, 1009, 4096])
def test_random_permutations(n):
    for seed in range(3):
        perm, x = randperm(n, seed), randn(2, n)
        P = kaleidoscopes.permutation(perm, dtype=torch.float64)
        assert P.width == 1 and P.expansion < 4 / 3
        assert torch.equal(P.linear(x), x[:, perm])
        assert all(((f.values == 0) | (f.values == 1)).all() for f in P.factors)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.integers(0, 1000))
def test_networks_of_any_radices(radices, seed):
    """Both kinds, also of composite and of odd radices; every factor is a permutation itself."""
    n = math.prod(radices)
    perm, x = randperm(n, seed), torch.arange(float(n))
    for network in (route, route_inside_out):
        y = x
        for values in reversed(network(perm, radices)):
            assert (values.sum(-3) == 1).all() and (values.sum(-2) == 1).all()
            y = KroneckerSparse(values.float()).linear(y)
        assert torch.equal(y, x[perm])


def test_batches_of_permutations():
    perm = torch.stack([randperm(10, s) for s in range(6)]).view(2, 3, 10)
    P = kaleidoscopes.permutation(perm, dtype=torch.complex64)
    assert P.shape == (2, 3, 10, 10) and P.dtype == torch.complex64
    assert torch.equal(P.to_dense().real, torch.eye(10)[perm])
    with pytest.raises(ValueError, match="perm must hold every index"):
        kaleidoscopes.permutation([0, 0, 1])
    with pytest.raises(TypeError, match="int64"):
        kaleidoscopes.permutation([0.0, 1.0])


# -------------------------------------------------------------------- Fourier, cosine and sine transforms
@complex_dtypes
@pytest.mark.parametrize("n", [*SIZES, 1000, 1024])
def test_fourier(n, dtype):
    eye = torch.eye(n, dtype=torch.complex128)
    smooth = n not in (11, 13, 97)
    for norm in (None, "ortho", "forward"):
        check(kaleidoscopes.dft(n, norm, dtype=dtype), torch.fft.fft(eye, norm=norm), 1, dtype, 1 if smooth else 2.2)
    check(kaleidoscopes.idft(n, dtype=dtype), torch.fft.ifft(eye), 1, dtype, 1 if smooth else 2.2)
    if smooth:
        F = kaleidoscopes.dft(n, "ortho", dtype=dtype)
        assert_close(F.inverse().to_dense(), F.to_dense().mH.resolve_conj(), 1e-5)


@pytest.mark.parametrize("name", ["dct", "idct", "dst", "idst"])
@pytest.mark.parametrize("n", SIZES)
def test_cosine_and_sine(n, name):
    eye = torch.eye(n, dtype=torch.float64).numpy()
    for type, norm in itertools.product((1, 2, 3, 4), (None, "ortho", "forward")):
        if n == 1 and type == 1 and "dct" in name:
            with pytest.raises(ValueError, match="n must be at least 2"):
                getattr(kaleidoscopes, name)(n, type)
            continue
        K = getattr(kaleidoscopes, name)(n, type, norm, dtype=torch.complex128)
        check(K, getattr(scipy.fft, name)(eye, type=type, norm=norm, axis=0), 1, torch.complex128, 4.4)
        if n & (n - 1) == 0:
            assert K.expansion <= 4


@pytest.mark.parametrize(
    ("type", "dtype"),
    [(1, torch.complex64), (2, torch.complex64), (3, torch.complex128), (4, torch.complex64)],
    ids=str,
)
def test_cosine_and_sine_of_size_1024(type, dtype):
    eye = torch.eye(1024, dtype=torch.float64).numpy()
    for name in ("dct", "dst"):
        found = getattr(kaleidoscopes, name)(1024, type, dtype=dtype)
        check(found, getattr(scipy.fft, name)(eye, type=type, axis=0), 1, dtype, 4)


def test_arguments_of_transforms():
    with pytest.raises(ValueError, match="dtype must be complex"):
        kaleidoscopes.dct(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="norm must be one of"):
        kaleidoscopes.dft(8, "unitary")
    with pytest.raises(ValueError, match="type must be one of"):
        kaleidoscopes.dst(8, 5)
    with pytest.raises(TypeError, match="n must be an integer"):
        kaleidoscopes.dft(8.0)  # pyright: ignore
    with pytest.raises(ValueError, match="n must be a power of two"):
        kaleidoscopes.hadamard(12)


# -------------------------------------------------------------------- convolutions
@complex_dtypes
@pytest.mark.parametrize("n", [*SIZES, 1024])
def test_circulant_and_toeplitz(n, dtype):
    c, r = randn(n), randn(max(1, n - 3), seed=1)
    for kernel in (c, c + 1j * randn(n, seed=2)):
        C = kaleidoscopes.circulant(kernel, dtype=dtype)
        check(C, scipy.linalg.circulant(kernel.numpy()), 1, dtype, 2.2 if n in (11, 13, 97) else 1)
        T = kaleidoscopes.toeplitz(kernel, r, dtype=dtype)
        check(T, scipy.linalg.toeplitz(kernel.numpy(), r.numpy()), 1, dtype, 2.2)
        check(kaleidoscopes.toeplitz(kernel, dtype=dtype), scipy.linalg.toeplitz(kernel.numpy()), 1, dtype, 2.2)
    assert kaleidoscopes.circulant(c.float()).dtype == torch.complex64


@complex_dtypes
@pytest.mark.parametrize("n", [*SIZES, 1024])
def test_acdc(n, dtype):
    a, d = randn(n), randn(n, seed=1)
    C = torch.from_numpy(scipy.fft.dct(torch.eye(n).double().numpy(), norm="ortho", axis=0)).mT
    check(kaleidoscopes.acdc(a, d, dtype=dtype), C @ (d[:, None] * C.mT) * a, 1, dtype, 4.4)
    with pytest.raises(ValueError, match="d must have shape"):
        kaleidoscopes.acdc(a, randn(n + 1))


# -------------------------------------------------------------------- Hadamard and Fastfood
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 16, 1024])
def test_hadamard_and_fastfood(n, dtype):
    H = torch.from_numpy(scipy.linalg.hadamard(n)).to(dtype)
    K = kaleidoscopes.hadamard(n, dtype=dtype)
    assert torch.equal(K.to_dense(), H) and (K.width, K.expansion) == (1, 1.0)
    s, g, b = randn(3, n, dtype=dtype)
    perm = randperm(n)
    V = kaleidoscopes.fastfood(s, g, perm, b)
    H, s, g, b = (t.to(torch.complex128 if dtype.is_complex else torch.float64) for t in (H, s, g, b))
    check(V, s[:, None] * (H @ (g[:, None] * (H[perm] * b))), 2, dtype, 1)


def test_arguments_of_fastfood():
    one = torch.ones(4)
    with pytest.raises(ValueError, match=r"g must have shape \(4,\)"):
        kaleidoscopes.fastfood(one, torch.ones(3), [0, 1, 2, 3], one)
    with pytest.raises(ValueError, match=r"perm must have shape \(4,\)"):
        kaleidoscopes.fastfood(one, one, [0, 1], one)
    with pytest.raises(ValueError, match="power of two"):
        kaleidoscopes.fastfood(torch.ones(3), torch.ones(3), [0, 1, 2], torch.ones(3))


# -------------------------------------------------------------------- calculus
@pytest.mark.parametrize("make", ["circulant", "toeplitz", "acdc", "fastfood"])
def test_gradients_reach_the_arguments(make):
    tensors = [randn(4, seed=s).requires_grad_() for s in range(3)]

    def dense(*t):
        if make == "circulant":
            return kaleidoscopes.circulant(t[0]).to_dense().real
        if make == "fastfood":
            return kaleidoscopes.fastfood(t[0], t[1], [2, 0, 3, 1], t[2]).to_dense()
        return getattr(kaleidoscopes, make)(t[0], t[1]).to_dense().real

    used = tensors[: {"circulant": 1, "fastfood": 3}.get(make, 2)]
    assert torch.autograd.gradcheck(lambda *t: dense(*t), used)


def test_members_multiply_and_add_to_members():
    """Of one size: F^-1 diag F is a circulant matrix, of width 2; a permutation after it adds one more."""
    n, dtype = 12, torch.complex128
    c, perm = randn(n), randperm(n)
    F, C, P = (
        kaleidoscopes.dft(n, dtype=dtype),
        kaleidoscopes.circulant(c),
        kaleidoscopes.permutation(perm, dtype=dtype),
    )
    product = P @ (F.H @ F)
    assert isinstance(product, Kaleidoscope) and product.width == 3
    assert_close(product.to_dense(), n * torch.eye(n, dtype=dtype)[perm])
    total = Kaleidoscope.sum([C, P @ F, F])
    assert (total.width, total.expansion) == (2, 3.0)
    assert_close(dense_by_definition(total), C.to_dense() + P.to_dense() @ F.to_dense() + F.to_dense())
