"""Causal maps to test, and an oracle: products of polynomials in NumPy."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev

from structmat import CausalMonarch
from structmat.testing.causal import blocks as near_identity


def _make(scheme, n, radix, seed=0, shared=False, batch=(), dtype=torch.float64, size=3.0):
    """A map whose blocks are not near the identity, and its blocks."""
    torch.manual_seed(seed)
    bases = [near_identity(radix, scheme, batch, dtype=dtype) for _ in range(1 if shared else 3)]
    for basis in bases:
        for b in basis:
            eye = torch.eye(b.shape[-1], dtype=dtype)
            b.copy_(eye + size * (b - eye) / b.shape[-1] ** 0.5)
    return CausalMonarch.from_blocks(bases, n, scheme), bases * (3 if shared else 1)


@pytest.fixture(scope="session")
def make():
    return _make


def _polynomials(blocks, scheme, count=None):
    """Coefficients of every q_j, in powers of Z or in the T_i: one multiplication of polynomials after the other."""
    radix = [b.shape[-1] for b in blocks]
    N = math.prod(radix)
    multiply = np.convolve if scheme == "fourier" else chebyshev.chebmul
    rows = np.zeros((count or N, 2 * N), dtype=blocks[0].numpy().dtype)
    for j in range(N):
        q, lower, weight = np.array([1.0]), 0, 1
        for b in blocks:
            n = b.shape[-1]
            digit = j // weight % n
            factor = np.zeros((n - 1) * weight + 1, dtype=rows.dtype)
            for d in range(n):
                scale = 2 if scheme == "chebyshev" and d else 1  # tau_d
                factor[d * weight] = scale * b[lower, d, digit].numpy()
            q = multiply(q, factor)
            lower, weight = lower + digit * weight, weight * n
        rows[j, : len(q)] = q[: 2 * N]
    for j in range(N, len(rows)):
        rows[j, j] = 1  # the new values of the top digit: powers of Z whose coefficients nobody asks for
    return rows


@pytest.fixture(scope="session")
def polynomials():
    return _polynomials


def _oracle(bases, scheme, n, k, u):
    """y of one k and u: two combinations of basis polynomials, their product, its coefficients in the third basis."""
    N = math.prod(b.shape[-1] for b in bases[0])
    q0 = _polynomials(bases[0], scheme, 2 * N if scheme == "fourier" else N)
    q1, q2 = _polynomials(bases[1], scheme), _polynomials(bases[2], scheme)
    order = np.arange(n)[::-1] if scheme == "chebyshev" else np.arange(n)
    f, g = k.numpy() @ q1[order], u.numpy() @ q2[order]
    multiply = np.convolve if scheme == "fourier" else chebyshev.chebmul
    h = multiply(f, g)
    size = len(q0)
    assert np.abs(h[size:]).sum() == 0  # nothing beyond the nodes' number: the product has to wrap nowhere
    h = np.pad(h, (0, max(0, size - len(h))))[:size]
    y = np.linalg.solve(q0[:, :size].T, h)
    return torch.from_numpy(y[2 * n - 2 - np.arange(n)] if scheme == "chebyshev" else y[:n])


@pytest.fixture(scope="session")
def oracle():
    return _oracle


def _upper(map_, n):
    """Norms of the strict upper parts of the Jacobians in k and in u, relative to the Jacobians'."""
    k, u = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for J in torch.func.jacrev(map_, argnums=(0, 1))(k, u):
        found.append((J.triu(1).norm() / J.norm()).item())
    return max(found)


@pytest.fixture(scope="session")
def upper():
    return _upper
