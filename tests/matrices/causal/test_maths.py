"""Causal Monarch maps against products of polynomials in NumPy, and mutants that the checks must see."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev
from torch import nn

from structmat import CausalMonarch, CausalToeplitz
from structmat.matrices.causal import CausalBasis
from structmat.matrices.causal._echo import echo
from structmat.matrices.causal._evaluation import evaluation
from structmat.testing import assert_close
from structmat.testing.causal import blocks as near_identity

TOL = 1e-12
CASES = [
    *[("fourier", n, r) for n, r in ((1, (1,)), (1, (1, 1)), (2, (2,)), (3, (2, 2)), (7, (7,)), (12, (3, 4)))],
    *[
        ("fourier", n, r)
        for n, r in ((13, (4, 4)), (12, (2, 3, 2)), (11, (3, 2, 2)), (24, (2, 3, 2, 2)), (17, (2,) * 5))
    ],
    *[("chebyshev", n, r) for n, r in ((1, (1,)), (1, (1, 2)), (2, (3,)), (3, (2, 3)), (7, (13,)), (8, (3, 5)))],
    *[("chebyshev", n, r) for n, r in ((12, (4, 6)), (7, (2, 3, 3)), (13, (5, 5)), (9, (2, 3, 2, 2)), (8, (2,) * 4))],
]
IDS = [f"{s}-{n}-{'x'.join(map(str, r))}" for s, n, r in CASES]


@pytest.mark.parametrize(("scheme", "n", "radix"), CASES, ids=IDS)
def test_values_and_causality(scheme, n, radix, make, oracle, upper):
    C, bases = make(scheme, n, radix)
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = oracle(bases, scheme, n, k, u)
    for conv in (C.conv, C.conv_by_evaluation):
        assert_close(conv(k, u), expected, TOL)
        assert upper(conv, n) <= TOL
    T = C.toeplitz(k)
    assert_close(T @ u, expected, TOL)
    assert T.to_dense().triu(1).norm() <= TOL * T.to_dense().norm()


@pytest.mark.parametrize(("scheme", "n", "radix"), CASES, ids=IDS)
def test_evaluation_factors(scheme, n, radix, make, polynomials):
    """The p block-diagonal stages are the dense matrix of the values at the nodes, which are all different."""
    C, bases = make(scheme, n, radix)
    M, rows = C.kernel.evaluation(), polynomials(bases[1], scheme)
    N, count = M.shape[-1], len(rows)
    assert len(M.factors) == len(radix)
    if scheme == "fourier":
        # Rows are numbered by the digits e_0 + e_1 n_0 + ... of a node, of which the top one is its least significant.
        sizes = (*radix[:-1], 2 * radix[-1])
        node = torch.arange(N).view(sizes).permute(*reversed(range(len(sizes)))).flatten()
        Z = np.exp(-2j * np.pi * node.numpy() / N)
        expected = Z[:, None] ** np.arange(rows.shape[1]) @ rows.T
        assert_close(M.to_dense()[:, :count], torch.from_numpy(expected), TOL)
        return
    plain = CausalBasis.identity(radix, scheme, dtype=torch.float64).evaluation().to_dense()
    Z = plain[:, 1].numpy() / 2 if N > 1 else np.zeros(1)  # column 1 is tau_1 = 2 Z
    nodes = np.cos(np.pi * (2 * np.arange(N) + 1) / (2 * N))  # the roots of T_N
    np.testing.assert_allclose(np.sort(Z), np.sort(nodes), atol=1e-14)
    assert_close(M.to_dense(), torch.from_numpy(chebyshev.chebval(Z, rows.T).T), TOL)


def mutant(blocks, scheme, n, inputs, outputs):
    """``M_0^-1 [(M_1 k) * (M_2 u)]`` for any blocks of any size and any places of the entries."""
    M_0, M_1, M_2 = (evaluation(b, scheme).to_dense() for b in blocks)

    def conv(k, u):
        f, g = (torch.zeros(M.shape[0], dtype=k.dtype).index_copy(0, inputs, v) for M, v in ((M_1, k), (M_2, u)))
        values = (M_1 @ f.to(M_1.dtype)) * (M_2 @ g.to(M_2.dtype))
        return torch.linalg.solve(M_0, values).real[outputs]

    return conv


def test_checks_see_the_degree_bound(make, upper):
    """Of scheme "fourier" the top digit has degrees below h, and h is at most half of its values."""
    n, t = 12, torch.arange(12)
    _, bases = make("fourier", n, (3, 4))
    doubled = [[b[0], torch.block_diag(*[torch.eye(8).double()]).repeat(3, 1, 1)] for b in bases]
    for d, b in zip(doubled, bases, strict=True):
        d[1][:, :4, :4] = b[1]
    assert upper(mutant(doubled, "fourier", n, t, t), n) <= TOL
    for d in doubled:
        d[1][:, 4:, :4] = 0.3 * torch.randn(3, 4, 4).double()  # still lower triangular: only the degrees are too high
    assert upper(mutant(doubled, "fourier", n, t, t), n) > 1e-2
    assert upper(mutant(bases, "fourier", n, t, t), n) > 1e-2  # too few nodes: N = n


def test_checks_see_the_reversal(make, upper):
    n, t = 12, torch.arange(12)
    C, bases = make("chebyshev", n, (4, 6))
    good = mutant(bases, "chebyshev", n, n - 1 - t, 2 * n - 2 - t)
    assert upper(good, n) <= TOL
    k, u = torch.randn(2, n, dtype=torch.float64)
    assert_close(good(k, u), C.conv(k, u), TOL)
    assert upper(mutant(bases, "chebyshev", n, t, t), n) > 1e-2


def test_checks_see_too_few_chebyshev_nodes(make, oracle):
    n, t = 8, torch.arange(8)
    _, whole = make("chebyshev", n, (2, 8))
    bases = [[first, second[:, :7, :7]] for first, second in whole]  # N = 14 < 15
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = oracle(whole, "chebyshev", n, k, u)
    few = mutant(bases, "chebyshev", n, n - 1 - t, (2 * n - 2 - t).clamp(max=13))
    enough = mutant(whole, "chebyshev", n, n - 1 - t, 2 * n - 2 - t)
    assert_close(enough(k, u), expected, TOL)
    assert (few(k, u) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize(("scheme", "radix"), [("fourier", (5,)), ("fourier", (3, 2, 2)), ("chebyshev", (21,))])
def test_identity_is_the_plain_convolution(scheme, radix):
    C = CausalMonarch.identity(5 if radix == (5,) else 11, radix, scheme=scheme, dtype=torch.float64)
    k, u = torch.randn(3, C.n, dtype=torch.float64), torch.randn(4, 1, C.n, dtype=torch.float64)
    assert_close(C.conv(k, u), CausalToeplitz(k).matvec(u), TOL)


def test_chebyshev_identity_adds_delayed_terms_only():
    C = CausalMonarch.identity(12, (4, 6), scheme="chebyshev", dtype=torch.float64)
    for r, s in itertools.product(range(12), range(12)):
        k, u = torch.eye(12, dtype=torch.float64)[r], torch.eye(12, dtype=torch.float64)[s]
        y = C.conv(k, u)
        assert y[: r + s].abs().sum() <= TOL
        assert r + s > 11 or abs(y[r + s] - 1) <= TOL


def test_a_smaller_map_is_a_part_of_a_larger_one(make):
    C, bases = make("fourier", 12, (3, 4))
    for n in (1, 2, 7, 11):
        small = CausalMonarch.from_blocks(bases, n)
        k, u = torch.randn(2, n, dtype=torch.float64)
        extended = [nn.functional.pad(v, (0, 12 - n), value=7.0) for v in (k, u)]
        assert_close(small.conv(k, u), C.conv(*extended)[:n], TOL)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
@pytest.mark.parametrize("transposed", [False, True])
def test_basis_products_and_solves(scheme, transposed, make):
    C, _ = make(scheme, 6, (2, 3, 2))
    for L in (C.output, C.kernel):
        D = L.to_dense()
        assert D.triu(1).norm() <= TOL and (D.diagonal() != 0).all()
        L, D = (L.mT, D.mT) if transposed else (L, D)
        b = torch.randn(4, 6, 2, dtype=torch.float64)
        assert_close(L.matmul(b), D @ b, TOL)
        assert_close(L.solve(b), torch.linalg.solve(D, b), TOL)
        assert_close(L.logdet(), torch.logdet(D), TOL)
        assert_close(L.diagonal(), D.diagonal(), TOL)


@pytest.mark.parametrize("radix", [(4,), (3, 4), (2, 3, 5)])
def test_echo_inverts_and_transposes(radix):
    N = math.prod(radix)
    eye = torch.eye(N, dtype=torch.float64)
    K = echo(eye, radix).mT
    assert_close(echo(eye, radix, transposed=True).mT, K.mT, 1e-15)
    assert_close(echo(eye, radix, inverse=True).mT @ K, eye, 1e-13)
    assert_close(echo(eye, radix, transposed=True, inverse=True).mT @ K.mT, eye, 1e-13)
    assert torch.linalg.matrix_norm(K, 2) <= 2 ** (len(radix) - 1)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_complex_blocks(scheme, make, oracle):
    C, bases = make(scheme, 5, (3, 4), dtype=torch.complex128)
    k, u = torch.randn(2, 5, dtype=torch.complex128)
    expected = oracle(bases, scheme, 5, k, u)
    assert_close(C.conv(k, u), expected, TOL)
    assert_close(C.conv_by_evaluation(k, u), expected, TOL)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_bases_of_different_radices(scheme, oracle, upper):
    """Their nodes are not in one order: conv needs none, the definition refuses."""
    torch.manual_seed(0)
    bases = [near_identity(r, scheme, dtype=torch.float64) for r in ((3, 4), (2, 6), (2, 2, 3))]
    C = CausalMonarch.from_blocks(bases, 6, scheme)
    k, u = torch.randn(2, 6, dtype=torch.float64)
    assert_close(C.conv(k, u), oracle(bases, scheme, 6, k, u), TOL)
    assert upper(C.conv, 6) <= TOL
    with pytest.raises(ValueError, match="same radices"):
        C.conv_by_evaluation(k, u)


@pytest.mark.parametrize(("scheme", "n"), [("fourier", 7), ("chebyshev", 7), ("chebyshev", 3)])
def test_blocks_that_are_not_read(scheme, n, make):
    """Rows and columns of the top digit's values that no index has may hold anything, as may the other triangle."""
    C, bases = make(scheme, n, (3, 6))
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = C.conv(k, u)
    spoilt = []
    for L, (low, top) in zip((C.output, C.kernel, C.input), bases, strict=True):
        first, last = L.offset // 3, (L.offset + n - 1) // 3 + 1
        assert (first, last) == L.places
        other = torch.full_like(top, torch.nan)
        other[:, first:last, first:last] = top[:, first:last, first:last]
        spoilt.append([low + (low == 0) * 7.0, other])
    D = CausalMonarch.from_blocks(spoilt, n, scheme)
    assert torch.equal(D.conv(k, u), expected)
    assert torch.equal(D.toeplitz(k) @ u, C.toeplitz(k) @ u)
