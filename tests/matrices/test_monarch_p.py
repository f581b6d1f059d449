"""Monarch matrices of any order against loops over digits, and the Fourier transform against torch.fft."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat
from structmat import Butterfly, MonarchFFT, MonarchP
from structmat.matrices.monarch_p import balanced_radix
from structmat.testing import assert_close, check_all, market

ENTRIES = market("monarchp")


def digits(index, radix):
    """Of a number, digit 0 the least significant."""
    found = []
    for n in radix:
        found.append(index % n)
        index //= n
    return found


def by_definition(factors, radix):
    """F_0 ... F_{p-1}, every stage filled in entry by entry: digit a changes by block number D + A w_a."""
    N = math.prod(radix)
    product = torch.eye(N, dtype=factors[0].dtype)
    for a, blocks in enumerate(factors):
        stage = torch.zeros(N, N, dtype=blocks.dtype)
        low = math.prod(radix[:a])
        for i, j in itertools.product(range(N), range(N)):
            o, d = digits(i, radix), digits(j, radix)
            if o[:a] == d[:a] and o[a + 1 :] == d[a + 1 :]:
                block = j % low + low * (j // (low * radix[a]))
                stage[i, j] = blocks[block, o[a], d[a]]
        product = product @ stage
    return product


@pytest.mark.parametrize("radix", [(5,), (1,), (2, 3), (4, 1, 3), (2, 3, 2), (2, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_product_transpose_and_inverse(radix, dtype):
    torch.manual_seed(0)
    N = math.prod(radix)
    factors = [torch.eye(n, dtype=dtype) + torch.randn(N // n, n, n, dtype=dtype) / 4 for n in radix]
    M, dense = MonarchP(factors, radix), by_definition(factors, radix)
    x = torch.randn(3, N, dtype=dtype)
    assert_close(M.to_dense(), dense)
    assert_close(M.linear(x), x @ dense.mT)
    assert_close(M.mT.linear(x), x @ dense)
    assert_close(M.inverse().to_dense(), torch.linalg.inv(dense))
    # Closed: transposes and inverses are butterflies of the same blocks' sizes, which mix digit 0 first.
    reverse = tuple(p.mT for p in reversed(M.patterns))
    assert isinstance(M.mT, Butterfly) and M.mT.patterns == reverse
    assert isinstance(M.inverse(), Butterfly) and M.inverse().patterns == reverse


def test_batches_and_rectangular_blocks():
    torch.manual_seed(0)
    radix = ((2, 3), (4, 2))
    factors = [torch.randn(5, 4, 2, 3).double(), torch.randn(5, 3, 4, 2).double()]
    M = MonarchP(factors, radix, nrows=7)
    assert M.shape == (5, 7, 6)
    dense = torch.zeros(5, 8, 6).double()
    for o0, o1, i0, i1 in itertools.product(range(2), range(4), range(3), range(2)):
        dense[:, o0 + 2 * o1, i0 + 3 * i1] = factors[0][:, o1, o0, i0] * factors[1][:, i0, o1, i1]
    assert_close(M.to_dense(), dense[:, :7])
    assert M.patterns == Butterfly.random((6, 8), radices=[(2, 4), (3, 2)]).mT.patterns


def test_order_two_is_monarch():
    torch.manual_seed(0)
    left, right = torch.randn(4, 3, 3).double(), torch.randn(3, 4, 4).double()
    A = structmat.Monarch(left, right)
    assert_close(MonarchP([right.mT, left.mT], (4, 3)).mT.to_dense(), A.to_dense())


@pytest.mark.parametrize("radix", [(32, 32), (3, 5, 7), (2, 2, 3, 5), (16, 4), (1, 6), (13,), (1,)])
def test_fourier_transform(radix):
    torch.manual_seed(0)
    n = math.prod(radix)
    x = torch.randn(4, n, dtype=torch.complex128)
    F = MonarchFFT(n, radix, dtype=torch.complex128)
    assert_close(F.linear(x), torch.fft.fft(x), 1e-12)
    assert_close(F.mT.linear(x), torch.fft.fft(x), 1e-12)
    assert_close(MonarchFFT(n, radix, inverse=True, dtype=torch.complex128).linear(x), torch.fft.ifft(x), 1e-12)
    assert_close(F.solve(x.mT).mT, torch.fft.ifft(x), 1e-12)
    assert F.num_params == n * sum(radix)


@given(n=st.integers(4, 300), order=st.integers(1, 4))
def test_every_composite_size(n, order):
    primes = sum(1 for p in range(2, n + 1) for e in range(1, 9) if n % p**e == 0 and all(p % q for q in range(2, p)))
    if primes < order:
        with pytest.raises(ValueError, match="number of prime factors"):
            MonarchFFT(n, order=order)
        return
    radix = balanced_radix(n, order)
    assert len(radix) == order and math.prod(radix) == n
    x = torch.randn(n, dtype=torch.complex128, generator=torch.Generator().manual_seed(n))
    assert_close(MonarchFFT(n, order=order, dtype=torch.complex128) @ x, torch.fft.fft(x), 1e-12)


def test_fourier_defaults():
    F = MonarchFFT(1024)
    assert F.dtype == torch.complex64 and F.num_params == 64 * 1024
    x = torch.randn(1024, dtype=torch.complex64)
    assert_close(F @ x, torch.fft.fft(x.to(torch.complex128)))


def test_errors():
    ok = torch.ones(3, 2, 2)
    with pytest.raises(TypeError, match="factors must be a non-empty sequence"):
        MonarchP(ok)
    with pytest.raises(ValueError, match=r"factors\[1\] must have 2 blocks"):
        MonarchP([ok, torch.ones(3, 3, 3)])
    with pytest.raises(ValueError, match="radix must be that of the blocks"):
        MonarchP([ok, torch.ones(2, 3, 3)], (3, 2))
    with pytest.raises(TypeError, match="floating point or complex"):
        MonarchP([torch.ones(1, 2, 2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="product n = 12"):
        MonarchFFT(12, (3, 5))
    with pytest.raises(ValueError, match="must be complex"):
        MonarchFFT(12, dtype=torch.float32)
    with pytest.raises(ValueError, match="number of prime factors"):
        MonarchFFT(13)


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_market(entry):
    assert len(ENTRIES) == 2
    assert "products" in check_all(entry, only=["products", "adjoint", "structure"])
