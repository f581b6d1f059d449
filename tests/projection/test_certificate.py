"""The bounds of projections on chains: the discarded singular values, and what they bound."""

import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from structmat.chain import Chain
from structmat.projection import project_monarch
from structmat.projection.butterfly import project_butterfly
from structmat.projection.leading import leading, leading_bounds, leading_vectors
from structmat.projection.splitting import on_support, split_blocks
from structmat.projection.tails import split_error2


def discarded(tools, W, left, right):
    """What the best product of two factors misses, from the dense matrix and the patterns alone."""
    whole, rank, tails = left.merge(right), left.rank(right), []
    support = tools.kronecker_sparse(torch.ones(tuple(whole))) != 0
    tails.append(W[~support].abs().numpy())
    L, R = tools.kronecker_sparse(torch.ones(tuple(left))) != 0, tools.kronecker_sparse(torch.ones(tuple(right))) != 0
    groups = {}
    for k in range(L.shape[1]):  # inner indices of the same rows and columns are those of one block
        groups.setdefault((tuple(L[:, k].tolist()), tuple(R[k].tolist())), []).append(k)
    for (rows, cols), inner in groups.items():
        block = W[torch.tensor(rows)][:, torch.tensor(cols)].numpy()
        assert len(inner) == rank
        tails.append(scipy.linalg.svdvals(block)[rank:])
    return np.linalg.norm(np.concatenate(tails))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_bounds_are_the_discarded_singular_values(tools, name, dtype):
    chain = tools.chains[name]
    W = torch.randn(*chain.shape, dtype=dtype, generator=tools.generator())
    _, outside = on_support(W, chain.merged(0, len(chain)))
    errors = [discarded(tools, W, chain.merged(0, i), chain.merged(i, len(chain))) for i in range(1, len(chain))]
    _, lower, upper = project_butterfly(W, chain)
    for split, expected in enumerate(errors, 1):
        inside = split_error2(on_support(W, chain.merged(0, len(chain)))[0][None], chain, split)
        np.testing.assert_allclose(np.hypot(inside.sqrt().item(), outside.item()), expected, rtol=1e-11, atol=1e-13)
    total = sum(e**2 - outside.item() ** 2 for e in errors) + outside.item() ** 2
    np.testing.assert_allclose(lower.item(), max(errors, default=outside.item()), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(upper.item(), total**0.5, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_lower_is_at_most_the_error_is_at_most_upper(tools, name, dtype, order):
    """On 648 matrices of nine kinds, real and complex, in both orders; and the projection of the product is itself."""
    chain = tools.chains[name]
    for kind, W in tools.kinds(chain, dtype, 6, seed=len(name)):
        factors, lower, upper = project_butterfly(W, chain, order)
        product = tools.dense(factors)
        size = torch.linalg.matrix_norm(W)
        error = torch.linalg.matrix_norm(product - W)
        slack = 1e-13 * size
        assert (lower <= error * (1 + 1e-11) + slack).all(), kind
        assert (error <= upper * (1 + 1e-11) + slack).all(), kind
        again = tools.dense(project_butterfly(product, chain, order)[0])
        assert (torch.linalg.matrix_norm(again - product) <= 1e-12 * size).all(), f"{kind}: not idempotent"


@pytest.mark.parametrize("seed", range(4))
def test_no_search_passes_the_lower_bound(tools, seed):
    """Gradient descent from the projection: its error goes down, never below the bound."""
    chain = Chain.dyadic(8)
    W = torch.randn(8, 8, dtype=torch.float64, generator=tools.generator(seed))
    factors, lower, _ = project_butterfly(W, chain)
    leaves = [f.clone().requires_grad_() for f in factors]
    optimizer = torch.optim.LBFGS(leaves, max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (tools.dense(leaves) - W).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (tools.dense(leaves) - W).norm()
    assert lower * (1 - 1e-12) <= found <= (tools.dense(factors) - W).norm()


def test_two_factors_are_the_monarch_optimum(tools, order):
    for (m, n, k), rank in itertools.product([(16, 16, 4), (12, 20, 4), (30, 18, 6)], [1, 2]):
        W = torch.randn(m, n, dtype=torch.float64, generator=tools.generator())
        factors, lower, upper = project_butterfly(W, Chain.monarch(m, n, k, rank), order)
        *_, lost = project_monarch(W, l=k, s=m // k, r=k * rank, k=k, q=k * rank, p=n // k)
        error = (tools.dense(factors) - W).norm()
        for value in (lower, upper, error):
            torch.testing.assert_close(value, lost, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- large matrices
def splits_of(W, chain):
    """The exact squares of E_l, by decompositions of the blocks."""
    values = on_support(W, chain.merged(0, len(chain)))[0]
    errors = []
    for split in range(1, len(chain)):
        left, right = chain.merged(0, split), chain.merged(split, len(chain))
        singular = torch.linalg.svdvals(split_blocks(values, left, right))
        errors.append(singular[..., left.rank(right) :].square().flatten(1).sum(-1))
    return torch.stack(errors)


LARGE = {
    "dyadic": Chain.dyadic(256),
    "rank 2": Chain.dyadic(256, 2),
    "mixed": Chain.mixed_radix([(7, 3), 5, (2, 6), 4]),
}


@pytest.mark.parametrize("order", ["balanced", "left-to-right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", LARGE)
def test_bounds_of_large_matrices_are_bounds_and_near(tools, kind, dtype, order):
    chain = LARGE[kind]
    W = torch.cat([w[:1] for _, w in tools.kinds(chain, dtype, 1, seed=3)])
    W = torch.cat((W, torch.zeros_like(W[:1]), 1e-90 * W[:1]))
    factors, lower, upper = project_butterfly(W, chain, order)
    exact2, size = splits_of(W, chain), torch.linalg.matrix_norm(W)
    least, most = exact2.amax(0).sqrt(), exact2.sum(0).sqrt()
    near = least > 1e-12 * size  # of exact ones the bounds are what brackets them
    slack = 1e-13 * size
    assert (lower <= least * (1 + 1e-11) + slack).all() and (upper >= most * (1 - 1e-11) - slack)[near].all()
    assert (lower >= 0.999 * least)[near].all() and (upper <= 1.001 * most)[near].all()
    error = torch.linalg.matrix_norm(tools.dense(factors) - W)
    assert (lower <= error * (1 + 1e-11) + slack).all() and (error <= upper * (1 + 1e-11) + slack).all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_leading_eigenvalues_are_proved(tools, precision):
    """What is claimed to be proved is true: of flat, close, degenerate and zero spectra too, at any precision set."""
    g = tools.generator(7)
    for k, dtype in itertools.product((5, 16, 48), (torch.float64, torch.complex128)):
        Q = torch.linalg.qr(torch.randn(40, k, k, dtype=dtype, generator=g))[0]
        spectrum = torch.rand(40, k, dtype=torch.float64, generator=g)
        spectrum[5] = 1.0  # flat
        spectrum[6], spectrum[7, 1:] = 0.0, 0.0
        spectrum[8, :2] = 2.0  # a pair
        spectrum[9, :3] = 2.0
        for i in range(10, 20):
            spectrum[i, :2] = torch.tensor([2.0, 2.0 - 10.0 ** (5 - i)])
        spectrum[20:30] **= 20
        gram = (Q * spectrum.unsqueeze(-2)) @ Q.mH
        gram = (gram + gram.mH) / 2 * torch.logspace(-200, 200, 40, dtype=torch.float64)[:, None, None]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            x, tail, proved = leading(gram)
            held = leading_bounds(gram)
        finally:
            torch.set_float32_matmul_precision(before)
        values = torch.linalg.eigvalsh(gram)
        total, top = values.sum(-1), values[:, -1]
        assert proved[[6, 7, *range(20, 30)]].all() and not proved[[5, 9]].any()
        off = tail - values[:, :-1].sum(-1)
        assert (off[proved].abs() <= (2e-12 * tail + 1e-14 * total)[proved]).all()
        quotient = (x.unsqueeze(-2).conj() @ gram @ x.unsqueeze(-1)).real.flatten()
        assert (top - quotient <= 2e-12 * tail + 1e-14 * total)[proved].all()
        assert (held[0] <= top * (1 + 1e-13)).all() and (held[1] >= top * (1 - 1e-13)).all()
        torch.testing.assert_close(leading_vectors(gram)[1] / total, values[:, :-1].sum(-1) / total, equal_nan=True)
