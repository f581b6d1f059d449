"""Fourier, cosine, sine, Hartley, Hadamard and Chebyshev transforms against SciPy, NumPy and their definitions."""

import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.signal
import torch
from numpy.polynomial import chebyshev

from structmat import Kronecker, Permutation, Product
from structmat import transforms as tf
from structmat.matrices.butterfly import Butterfly
from structmat.testing import assert_close

F32, F64 = torch.float32, torch.float64
SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 16, 30, 97, 100, 128, 131, 1000, 1024]
NORMS = [None, "backward", "ortho", "forward"]
BOUND = {F64: 1e-12, torch.complex128: 1e-12, F32: 5e-7, torch.complex64: 5e-7}


def check(A, expected):
    """The whole matrix within the bound of its dtype; a real transform stays real."""
    assert_close(A.to_dense(), torch.as_tensor(np.ascontiguousarray(expected)), BOUND[A.dtype], repr(A)[:80])


def norms(n, salt):
    return NORMS if n <= 16 else [NORMS[salt % 4]]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_dft_and_hartley_equal_scipys(n, dtype):
    eye = np.eye(n)
    for norm in norms(n, n + 2):
        F = scipy.fft.fft(eye, axis=0, norm=norm)
        check(tf.dft(n, norm, dtype=dtype.to_complex()), F)
        check(tf.idft(n, norm, dtype=dtype.to_complex()), scipy.fft.ifft(eye, axis=0, norm=norm))
        check(tf.hartley(n, norm, dtype=dtype), F.real - F.imag)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_cosine_and_sine_transforms_equal_scipys(n, dtype):
    names = list(itertools.product(("dct", "idct", "dst", "idst"), (1, 2, 3, 4)))
    # Of the large sizes half of the sixteen in one precision, the other half in the other.
    names = names if n < 200 else names[dtype == F32 :: 2]
    for salt, (name, kind) in enumerate(names):
        if n == 1 and kind == 1 and "dct" in name:
            continue
        for norm in norms(n, salt + salt // 4):
            A = getattr(tf, name)(n, kind, norm, dtype=dtype)
            assert A.dtype == dtype
            check(A, getattr(scipy.fft, name)(np.eye(n), axis=0, type=kind, norm=norm))


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["dct", "dst"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_every_type_at_1024(name, kind, dtype):
    check(getattr(tf, name)(1024, kind, dtype=dtype), getattr(scipy.fft, name)(np.eye(1024), axis=0, type=kind))


@pytest.mark.parametrize("n", [262, 1021, 2038])
def test_large_primes_cost_n_log_n(n):
    x = np.random.default_rng(0).standard_normal((n, 2))
    for A, expected in [
        (tf.dft(n, dtype=torch.complex128), scipy.fft.fft(x, axis=0)),
        (tf.dct(n, dtype=F64), scipy.fft.dct(x, axis=0)),
        (tf.dst(n, 4, dtype=F64), scipy.fft.dst(x, axis=0, type=4)),
    ]:
        assert_close(A @ torch.from_numpy(x).to(A.dtype), torch.from_numpy(expected))
        assert A.num_params <= 2 * 8 * (8 / 3 * n) * np.log2(8 / 3 * n)


def test_classes_and_cost():
    F = tf.dft(1000)
    assert isinstance(F, Product)
    assert [type(f) for f in F.factors] == [Butterfly, Permutation]
    assert F.num_params == 1000 * (2 + 2 + 2 + 5 + 5 + 5)
    assert isinstance(tf.dft(97), Butterfly)
    C = tf.dct(1024)
    assert [type(f) for f in C.factors] == [Butterfly, Permutation]
    # The real part of a chain of rank 1 is a chain of rank 2; its two end factors are merged with their neighbours.
    assert set(C.factors[0].chain.ranks) == {2}
    assert C.num_params == 1024 * 2 * (8 * 4 + 2 * 2)
    assert isinstance(tf.hadamard(1024), Butterfly)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (8, 6), (2, 3, 4)], ids=str)
def test_dft2(shape):
    n = int(np.prod(shape))
    eye, axes = np.eye(n).reshape(n, *shape), tuple(range(1, len(shape) + 1))
    for norm in NORMS:
        A = tf.dft2(shape, norm, dtype=torch.complex128)
        assert isinstance(A, Kronecker)
        check(A, scipy.fft.fftn(eye, axes=axes, norm=norm).reshape(n, n).T)
        B = tf.idft2(shape, norm, dtype=torch.complex128)
        check(B, scipy.fft.ifftn(eye, axes=axes, norm=norm).reshape(n, n).T)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 1024])
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_hadamard_is_exact(n, dtype):
    expected = torch.from_numpy(scipy.linalg.hadamard(n).astype(float))
    assert torch.equal(tf.hadamard(n, dtype=dtype).to_dense().double(), expected)
    for order in ("dyadic", "sequency"):
        H = tf.hadamard(n, order=order, dtype=dtype).to_dense().double()
        assert torch.equal(H, H.mT)
        assert torch.equal(H @ H.mT, n * torch.eye(n, dtype=F64))
    assert torch.equal((H.diff(dim=1) != 0).sum(1), torch.arange(n))  # sign changes
    if dtype != torch.bfloat16:
        check(tf.hadamard(n, "ortho", dtype=dtype), expected.numpy() / n**0.5)
        check(tf.hadamard(n, "forward", dtype=dtype), expected.numpy() / n)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 97, 131, 1024])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_chebyshev(n, dtype):
    for kind, points in ((1, chebyshev.chebpts1), (2, chebyshev.chebpts2)):
        if n < kind:
            continue
        # NumPy's points and recurrence lose digits: T_m(cos t) = cos(m t) with the angles as integers.
        k, m = np.arange(n)[:, None], np.arange(n)
        turns, period = ((2 * n - 1 - 2 * k) * m, 4 * n) if kind == 1 else ((n - 1 - k) * m, 2 * n - 2)
        expected = np.cos(2 * np.pi * (turns % period) / period)
        V = tf.chebyshev_values(n, kind, dtype=dtype)
        check(V, expected)
        if n < 20:
            assert_close(torch.from_numpy(chebyshev.chebvander(points(n), n - 1)), torch.from_numpy(expected), 1e-13)
        C = tf.chebyshev_coefficients(n, kind, dtype=dtype)
        assert_close((C @ V).to_dense(), torch.eye(n), 2 * BOUND[dtype])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (7, 3), (16, 16), (20, 31), (100, 131)])
def test_czt(n, m):
    x = np.random.default_rng(0).standard_normal((n, 3))
    operand = torch.from_numpy(x).to(torch.complex128)
    for w, a in ((None, 1), (None, 0.9j), (np.exp(-0.03j), np.exp(0.3j)), (0.999 * np.exp(-0.02j), 1.01)):
        A = tf.czt(n, m, w, a, dtype=torch.complex128)
        ratio = np.exp(-2j * np.pi / m) if w is None else w
        j, k = np.arange(n), np.arange(m)[:, None]
        assert A.shape == (m, n)
        check(A, a ** (-1.0 * j) * ratio ** (k * j))
        assert_close(A @ operand, torch.from_numpy(scipy.signal.czt(x, m, w, a, axis=0)), 1e-11)  # SciPy's own error


def test_czt_and_fractional_dft_at_1024():
    n = 1024
    F = scipy.fft.fft(np.eye(n), axis=0)
    for dtype in (torch.complex128, torch.complex64):
        check(tf.czt(n, dtype=dtype), F)
        check(tf.fractional_dft(n, 1 / n, dtype=dtype), F)
        check(tf.czt(n, w=1j, dtype=dtype), 1j ** (np.outer(np.arange(n), np.arange(n)) % 4))
    # Phases of any alpha, from exact fractions.
    num, den = (0.123).as_integer_ratio()
    angles = [[float(k * m * num % den / den) for m in range(60)] for k in range(60)]
    check(tf.fractional_dft(60, 0.123, dtype=torch.complex128), np.exp(-2j * np.pi * np.array(angles)))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: tf.dft(0), ValueError, "n must be at least 1"),
        (lambda: tf.dft(2.0), TypeError, "n must be an integer"),
        (lambda: tf.dft(4, "orthonormal"), ValueError, "norm must be one of"),
        (lambda: tf.dft(4, dtype=F32), ValueError, "dtype must be complex"),
        (lambda: tf.dft2(4), TypeError, "shape must be"),
        (lambda: tf.dct(1, 1), ValueError, "n must be at least 2"),
        (lambda: tf.dct(4, 5), ValueError, "type must be one of 1, 2, 3, 4, got 5"),
        (lambda: tf.dst(4, 2, "unit"), ValueError, "norm must be one of"),
        (lambda: tf.dct(4, dtype=torch.int64), ValueError, "dtype must be floating"),
        (lambda: tf.hadamard(12), ValueError, "power of two, got 12"),
        (lambda: tf.hadamard(8, order="gray"), ValueError, "order must be one of"),
        (lambda: tf.chebyshev_values(1, 2), ValueError, "n must be at least 2"),
        (lambda: tf.chebyshev_coefficients(4, 3), ValueError, "kind must be one of"),
        (lambda: tf.czt(4, w=0), ValueError, "w must be a finite"),
        (lambda: tf.fractional_dft(4, float("inf")), ValueError, "alpha must be a finite"),
    ],
)
def test_errors_say_what_is_wrong(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
