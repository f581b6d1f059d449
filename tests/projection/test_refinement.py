"""Alternating least squares over the factors of a chain."""

import pytest
import torch

from structmat.chain import Chain
from structmat.projection.butterfly import project_butterfly
from structmat.projection.refine import refine


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16], ids=str)
def test_refinement_never_makes_it_worse(tools, name, dtype):
    chain = tools.chains[name]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for kind, W in tools.kinds(chain, wide, 4, seed=1):
        W = W.to(dtype)
        for start in (
            project_butterfly(W, chain)[0],
            tuple(f.to(dtype) for f in tools.random_factors(chain, (4,), wide, 3)),
        ):
            before = torch.linalg.matrix_norm(tools.dense([f.to(wide) for f in start]) - W.to(wide))
            previous = before
            for sweeps in (0, 1, 3):
                factors, error = refine(W, start, chain, sweeps)
                assert all(f.dtype == dtype and f.shape == s.shape for f, s in zip(factors, start, strict=True))
                actual = torch.linalg.matrix_norm(tools.dense([f.to(wide) for f in factors]) - W.to(wide))
                slack = 1e-13 * torch.linalg.matrix_norm(W.to(wide))
                torch.testing.assert_close(error, actual, rtol=1e-10, atol=slack.max().item())
                assert (error <= before + slack).all(), kind
                if dtype in (torch.float64, torch.complex128):
                    assert (error <= previous + slack).all(), kind
                previous = error


def test_refinement_ends_where_the_gradient_is_zero(tools):
    chain = Chain.dyadic(16)
    W = torch.randn(3, 16, 16, dtype=torch.float64, generator=tools.generator())
    start, lower, _ = project_butterfly(W, chain)
    factors, error = refine(W, start, chain, sweeps=500)
    assert (error < 0.995 * torch.linalg.matrix_norm(tools.dense(start) - W)).all()
    assert (lower <= error).all()
    leaves = [f.requires_grad_() for f in factors]
    gradients = torch.autograd.grad((tools.dense(leaves) - W).square().sum(), leaves)
    assert max(g.abs().max() for g in gradients) <= 1e-4
    _, low = refine(1e200 * W[0], [f[0] for f in start], chain, 20)
    torch.testing.assert_close(low / 1e200, refine(W[0], [f[0] for f in start], chain, 20)[1], rtol=1e-8, atol=0)


def test_one_pass_gives_the_least_squares_optimum(tools):
    """Where all but one factor are right, one pass finds that one."""
    chain = tools.chains["rank 2"]
    truth = tools.random_factors(chain)
    W = tools.dense(truth)
    for i, pattern in enumerate(chain):
        start = list(truth)
        start[i] = torch.randn(tuple(pattern), dtype=torch.float64, generator=tools.generator(9))
        assert refine(W, start, chain, 1)[1] <= 1e-12 * W.norm()
