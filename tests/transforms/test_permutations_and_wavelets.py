"""Permutations, exactly; wavelets against their filters."""

import math

import numpy as np
import pytest
import torch

from structmat import Permutation
from structmat import transforms as tf
from structmat.testing import assert_close

F64 = torch.float64


@pytest.mark.parametrize("n", [1, 2, 8, 1024])
def test_bit_reversal(n):
    P = tf.bit_reversal(n)
    bits = n.bit_length() - 1
    assert isinstance(P, Permutation)
    assert P.perm.tolist() == [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(n)]
    assert torch.equal(P.mT.perm, P.perm)
    assert torch.equal(tf.digit_reversal([2] * bits or [1]).perm, P.perm)


def test_digit_reversal():
    radices = [2, 3, 5]
    perm = tf.digit_reversal(radices).perm.tolist()
    for i1 in range(2):
        for i2 in range(3):
            for i3 in range(5):
                assert perm[(i1 * 3 + i2) * 5 + i3] == i1 + 2 * (i2 + 3 * i3)
    assert torch.equal(tf.digit_reversal(radices[::-1]).perm, tf.digit_reversal(radices).mT.perm)


def test_the_others():
    x = torch.arange(12.0)
    assert torch.equal(tf.stride_permutation(12, 3) @ x, x.view(4, 3).T.flatten())
    assert torch.equal(tf.stride_permutation(12, 4) @ (tf.stride_permutation(12, 3) @ x), x)
    assert torch.equal(tf.reversal(12) @ x, x.flip(0))
    for n in (1, 2, 5, 8):
        x = list(range(n))
        assert tf.even_odd(n).perm.tolist() == x[::2] + x[1::2]
        assert tf.even_odd(n, reverse_odd=True).perm.tolist() == x[::2] + x[1::2][::-1]
    assert tf.reversal(3, dtype=torch.complex64).dtype == torch.complex64
    assert tf.reversal(3, device="meta").device.type == "meta"


def test_selection():
    index = torch.tensor([4, 1, 5, 0, 5])
    S = tf.Selection(index, 5, F64)
    D = torch.cat([torch.eye(5, dtype=F64), torch.zeros(1, 5, dtype=F64)])[index]
    x = torch.arange(15, dtype=F64).view(3, 5)
    assert torch.equal(S.to_dense(), D)
    assert torch.equal(S.linear(x), x @ D.mT)
    assert torch.equal(S.mT.linear(x), x @ D)
    assert torch.equal(S.mT.mT.index, index)
    assert S.to(torch.complex64).dtype == torch.complex64


def filter_bank(n, order, levels):
    """The transform by its definition, one level after the other."""
    h = tf.daubechies_filter(order)
    g = h[::-1] * (-1.0) ** np.arange(2 * order)
    whole, m = np.eye(n), n
    for _ in range(levels):
        step = np.zeros((m, m))
        for k in range(m // 2):
            for t in range(2 * order):
                step[k, (2 * k + t) % m] += h[t]
                step[m // 2 + k, (2 * k + t) % m] += g[t]
        whole[:m] = step @ whole[:m]
        m //= 2
    return torch.from_numpy(whole)


@pytest.mark.parametrize(
    ("n", "order", "levels"),
    [
        (1, 1, 0),
        (7, 2, 0),
        (2, 1, 1),
        (2, 3, 1),
        (4, 2, 2),
        (12, 3, 2),
        (64, 4, 6),
        (96, 10, 3),
        (128, 20, 2),
        (1000, 2, 3),
    ],
)
def test_daubechies_is_its_filter_bank(n, order, levels):
    expected = filter_bank(n, order, levels)
    A = tf.daubechies(n, order, levels, dtype=F64).to_dense()
    assert_close(A, expected, 1e-12)
    assert_close(tf.daubechies(n, order, levels).to_dense(), expected, 5e-7)
    assert_close(A @ A.mT, torch.eye(n), 1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 16, 1024])
def test_haar(n):
    levels = (n & -n).bit_length() - 1
    A = tf.haar(n, dtype=F64)
    assert_close(A.to_dense(), filter_bank(n, 1, levels), 1e-12)
    assert_close(tf.haar(n).to_dense(), A.to_dense(), 5e-7)


def test_wavelets_at_1024():
    x = torch.randn(1024, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = filter_bank(1024, 4, 10) @ x
    assert_close(tf.daubechies(1024, 4, dtype=F64) @ x, expected, 1e-12)
    assert_close(tf.daubechies(1024, 4) @ x.float(), expected, 5e-7)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 10, 20])
def test_filters_are_orthonormal_with_vanishing_moments(order):
    h = tf.daubechies_filter(order)
    overlaps = [np.dot(h[: len(h) - 2 * k], h[2 * k :]) for k in range(order)]
    assert np.abs(np.array(overlaps) - np.eye(order)[0]).max() <= 1e-14
    # In powers of a centred, scaled variable: the moments themselves are sums of huge terms.
    t = (np.arange(2 * order) - order) / order
    g = h[::-1] * (-1.0) ** np.arange(2 * order)
    assert max(abs(np.dot(g, t**k)) for k in range(order)) <= 1e-14
    assert np.abs(h[: order // 2]).sum() > np.abs(h[-(order // 2) :]).sum() or order == 1  # extremal phase


def test_known_filters():
    r = math.sqrt(3)
    known = np.array([1 + r, 3 + r, 3 - r, 1 - r]) / (4 * math.sqrt(2))
    assert np.abs(tf.daubechies_filter(2) - known).max() <= 1e-15  # a few roundings of either


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tf.bit_reversal(6), "n must be a power of two, got 6"),
        (lambda: tf.digit_reversal([]), "radices must hold"),
        (lambda: tf.digit_reversal([2, 0]), "a radix must be at least 1"),
        (lambda: tf.stride_permutation(6, 4), "s must divide n = 6, got 4"),
        (lambda: tf.reversal(0), "n must be at least 1"),
        (lambda: tf.even_odd(3, dtype=torch.int64), "dtype must be floating"),
        (lambda: tf.haar(12, 3), "levels must be at most 2 for n = 12"),
        (lambda: tf.daubechies(8, 21), "order must be at most 20"),
        (lambda: tf.daubechies(8, 0), "order must be at least 1"),
        (lambda: tf.Selection(torch.tensor([0, 0]), 2), "at most once"),
        (lambda: tf.Selection(torch.tensor([3]), 2), "index must hold"),
        (lambda: tf.Selection(torch.tensor([[0]]), 2), r"index must have shape \(m,\)"),
    ],
)
def test_errors_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()
