"""Circulant, Toeplitz, Hankel and convolution matrices against SciPy, NumPy and torch."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from structmat import transforms as tf
from structmat.matrices.butterfly import Butterfly
from structmat.testing import assert_close

F64 = torch.float64
PAIRS = [(1, 1), (1, 4), (3, 1), (2, 3), (5, 5), (7, 30), (97, 16), (131, 97), (1024, 1024)]


def vector(n, is_complex, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n) + 1j * rng.standard_normal(n) if is_complex else rng.standard_normal(n)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(("m", "n"), PAIRS, ids=str)
def test_circulant_toeplitz_hankel_equal_scipys(m, n, is_complex):
    c, r = vector(m, is_complex, 0), vector(n, is_complex, 1)
    for low, tol in ((False, 1e-12), (True, 5e-7)):
        dtype = None if not low else torch.complex64 if is_complex else torch.float32
        for A, expected in [
            (tf.circulant(c, dtype=dtype), scipy.linalg.circulant(c)),
            (tf.toeplitz(c, r, dtype=dtype), scipy.linalg.toeplitz(c, r)),
            (tf.toeplitz(c, dtype=dtype), scipy.linalg.toeplitz(c)),
            (tf.hankel(c, r, dtype=dtype), scipy.linalg.hankel(c, r)),
            (tf.hankel(c, dtype=dtype), scipy.linalg.hankel(c)),
        ]:
            assert isinstance(A, Butterfly)
            assert A.dtype.is_complex == is_complex
            if m < 200:
                assert_close(A.to_dense(), torch.from_numpy(expected), tol)
                continue
            # A random matrix of few columns has the relative error of the whole one.
            x = torch.from_numpy(np.random.default_rng(2).standard_normal((A.shape[1], 16))).to(A.dtype)
            assert_close(A @ x, torch.from_numpy(expected) @ x.to(torch.from_numpy(expected).dtype), tol)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4), (4, 1), (5, 3), (5, 4), (8, 8), (6, 13), (50, 7)], ids=str)
def test_convolution_equals_numpys(n, k):
    kernel = vector(k, False, 0)
    for mode in ("full", "same", "valid"):
        expected = np.stack([np.convolve(e, kernel, mode) for e in np.eye(n)], 1)
        assert_close(tf.convolution(n, kernel, mode).to_dense(), torch.from_numpy(expected), 1e-12, mode)
    wrapped = np.zeros(n)
    np.add.at(wrapped, np.arange(k) % n, kernel)
    expected = torch.from_numpy(scipy.linalg.circulant(wrapped))
    assert_close(tf.convolution(n, kernel, "circular").to_dense(), expected, 1e-12)


def reference(shape, kernel, padding_mode="zeros", **options):
    """Torch's convolution of the identity."""
    weight = kernel if kernel.ndim == 4 else kernel[None, None]
    eye = torch.eye(weight.shape[1] * shape[0] * shape[1], dtype=F64).view(-1, weight.shape[1], *shape)
    if padding_mode == "circular":
        # The shift that padding asks for, whatever the kernel's size: images repeated on all sides.
        reps = 5
        p = options["padding"]
        big = eye.repeat(1, 1, reps, reps)
        out = F.conv2d(big, weight, dilation=options.get("dilation", 1))
        top, left = 2 * shape[0] - p, 2 * shape[1] - p
        return out[:, :, top : top + shape[0], left : left + shape[1]].flatten(1).mT
    return F.conv2d(eye, weight, **options).flatten(1).mT


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 1), (1, 1), {}),
        ((5, 7), (3, 3), {}),
        ((5, 7), (3, 3), {"padding": "same"}),
        ((8, 4), (2, 3, 3, 3), {"padding": 1}),
        ((6, 6), (3, 1, 2, 4), {"padding": (3, 0)}),
        ((6, 7), (3, 2, 3, 3), {"dilation": (2, 1), "padding": 5}),
        ((4, 5), (4, 4), {"padding": 4}),
        ((3, 3), (7, 7), {"padding": "same"}),
        ((6, 8), (3, 3), {"padding": 1, "padding_mode": "circular"}),
        ((4, 5), (2, 3, 3, 2), {"padding": 0, "padding_mode": "circular"}),
        ((3, 4), (5, 6), {"padding": 2, "padding_mode": "circular"}),
        ((2, 131), (3, 3), {"padding": 1, "padding_mode": "circular"}),
    ],
    ids=str,
)
def test_conv2d_equals_torchs(shape, kernel, options):
    kernel = torch.randn(kernel, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = reference(shape, kernel, **options)
    A = tf.conv2d(shape, kernel, **options)
    assert A.dtype == F64
    assert_close(A.to_dense(), expected, 1e-12)
    assert_close(tf.conv2d(shape, kernel, dtype=torch.float32, **options).to_dense(), expected, 5e-7)
    assert_close(tf.conv2d(shape, (1 + 2j) * kernel, **options).to_dense(), (1 + 2j) * expected, 1e-12)


def test_conv2d_at_1024_pixels():
    """A same-size convolution of 32 x 32 images, 2 channels to 3."""
    generator = torch.Generator().manual_seed(0)
    kernel, x = torch.randn(3, 2, 5, 5, dtype=F64, generator=generator), torch.randn(4, 2, 32, 32, dtype=F64)
    expected = F.conv2d(x, kernel, padding=2).flatten(1)
    for dtype, tol in ((F64, 1e-12), (torch.float32, 5e-7)):
        A = tf.conv2d((32, 32), kernel, padding="same", dtype=dtype)
        assert_close(A.linear(x.flatten(1).to(dtype)), expected, tol)


def test_gradients_reach_what_a_matrix_is_made_of():
    for make, size in (
        (tf.circulant, (6,)),
        (lambda c: tf.toeplitz(c, 2 * c), (5,)),
        (lambda c: tf.hankel(c, c), (5,)),
        (lambda k: tf.convolution(6, k, "same"), (3,)),
        (lambda k: tf.conv2d((3, 4), k, padding=1), (2, 2, 3, 3)),
    ):
        values = torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = torch.ones(make(values).shape[-1], dtype=F64)
        assert torch.autograd.gradcheck(lambda v, make=make, x=x: make(v) @ x, values)


def test_integers_and_mixed_dtypes():
    assert tf.circulant([1, 2, 3]).dtype == torch.get_default_dtype()
    assert tf.toeplitz(np.ones(3, np.float32), np.ones(2)).dtype == F64
    assert tf.hankel(torch.ones(3), torch.ones(2, dtype=torch.complex64)).dtype == torch.complex64


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tf.circulant(np.ones((2, 2))), r"c must be a non-empty 1-D array, got shape \(2, 2\)"),
        (lambda: tf.toeplitz(np.ones(2), []), "r must be a non-empty"),
        (lambda: tf.hankel(np.ones(2) * 1j, dtype=F64), "dtype must be complex for a complex c"),
        (lambda: tf.convolution(4, [1.0], "wrap"), "mode must be one of"),
        (lambda: tf.convolution(0, [1.0]), "n must be at least 1"),
        (lambda: tf.conv2d((4, 4), torch.ones(3, 3, 3)), "kernel must be a non-empty 2-D or 4-D"),
        (lambda: tf.conv2d((2, 2), torch.ones(3, 3)), "kernel must fit"),
        (lambda: tf.conv2d((2, 2, 2), torch.ones(3, 3)), "shape must be one integer or two"),
        (lambda: tf.conv2d((4, 4), torch.ones(3, 3), padding="full"), "padding must be one of"),
        (lambda: tf.conv2d((4, 4), torch.ones(3, 3), padding_mode="reflect"), "padding_mode must be one of"),
    ],
)
def test_errors_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()
