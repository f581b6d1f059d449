"""Chains, fast transforms and random members that the tests of projections share."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from structmat.chain import Chain, Pattern
from structmat.projection import permutation_candidates
from structmat.projection.splitting import from_support, merge_all


def chain_of(*patterns):
    return Chain(tuple(Pattern(*p) for p in patterns))


CHAINS = {
    "dyadic": Chain.dyadic(16),
    "rank 2": Chain.dyadic(32, rank=2),
    "mixed radix": Chain.mixed_radix([2, 3, 2]),
    "rectangular": Chain.mixed_radix([(3, 2), (4, 5), (2, 2)]),
    "monarch": Chain.monarch(12, 20, 4, rank=2),
    "two": Chain.mixed_radix([(3, 4), (5, 2)]),
    "one": chain_of((1, 6, 5, 1)),
    "inside a support": chain_of((2, 2, 4, 6), (4, 4, 2, 3)),
    "diagonal blocks": chain_of((3, 2, 2, 4), (6, 2, 2, 2), (12, 2, 2, 1)),
    "ranks beyond the blocks": chain_of((1, 2, 12, 8), (4, 6, 6, 4), (8, 6, 4, 2), (16, 4, 2, 1)),
    "ranks beyond two factors": chain_of((1, 2, 6, 8), (2, 6, 10, 4), (4, 10, 6, 2), (8, 6, 2, 1)),
    "one row": Chain.mixed_radix([(1, 3), (1, 4), (1, 2)]),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_factors(chain, batch=(), dtype=torch.float64, seed=0):
    g = generator(seed)
    return tuple(torch.randn(*batch, *p, dtype=dtype, generator=g) / (p.b * p.c) ** 0.25 for p in chain)


def kronecker_sparse(values):
    """The dense matrix by the definition, an entry at a time."""
    a, b, c, d = values.shape
    W = torch.zeros(a * b * d, a * c * d, dtype=values.dtype)
    for A, o, i, D in itertools.product(range(a), range(b), range(c), range(d)):
        W[(A * b + o) * d + D, (A * c + i) * d + D] = values[A, o, i, D]
    return W


def dense(factors):
    return from_support(merge_all(factors))


def relative(factors, W):
    return ((dense(factors) - W).norm() / W.norm()).item()


def bit_reversal(n):
    return permutation_candidates(n, [2] * (n.bit_length() - 1))["digit reversal"]


def dft(n):
    return torch.fft.fft(torch.eye(n, dtype=torch.complex128))[:, bit_reversal(n)]


def dct(n):
    W = torch.from_numpy(scipy.fft.dct(np.eye(n), axis=0, norm="ortho"))
    return W[:, torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)))][:, bit_reversal(n)]


def hadamard(n):
    return torch.from_numpy(scipy.linalg.hadamard(n).astype(np.float64))


def kinds(chain, dtype, count, seed):
    """Random, graded, noisy, exact, structured and low-rank matrices: a batch of each."""
    g, (m, n) = generator(seed), chain.shape
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    noise = torch.randn(count, m, n, dtype=dtype, generator=g)
    exact = dense(random_factors(chain, (count,), dtype, seed))
    scales = torch.logspace(0, -8, count, dtype=torch.float64)[:, None, None]
    yield "random", noise
    yield "graded rows", noise * torch.exp(-i * torch.rand(count, 1, 1, generator=g, dtype=torch.float64))
    yield (
        "graded spectrum",
        torch.linalg.qr(noise)[0] @ (2.0 ** -torch.arange(min(m, n)).to(dtype)[:, None] * noise[:, : min(m, n)]),
    )
    yield "noisy", exact + scales * noise * exact.norm() / noise.norm()
    yield "exact", exact
    yield "cosines", torch.cos(torch.rand(count, 1, 1, generator=g, dtype=torch.float64) * i * j).to(dtype)
    yield "Cauchy", (1 / (i + j + torch.rand(count, 1, 1, generator=g, dtype=torch.float64))).to(dtype)
    yield "sparse", noise * (torch.rand(count, m, n, generator=g) < 0.2)
    yield "ones", torch.ones(count, m, n, dtype=dtype)


@pytest.fixture(params=CHAINS)
def name(request):
    return request.param


@pytest.fixture(params=["balanced", "left-to-right"])
def order(request):
    return request.param


@pytest.fixture(scope="session")
def tools():
    """The helpers above: tests do not import each other."""
    functions = (chain_of, generator, random_factors, kronecker_sparse, dense, relative, bit_reversal, dft, dct)
    return SimpleNamespace(chains=CHAINS, hadamard=hadamard, kinds=kinds, **{f.__name__: f for f in functions})
