"""Sums of products on a chain: greedy, with sweeps, within budgets, and with bounds that hold."""

import pytest
import torch

import structmat
from structmat import BudgetError, ButterflyConfig, Chain, project
from structmat.lazy import Sum
from structmat.projection import project_butterfly, project_butterfly_sum
from structmat.testing import relative_error


def dense(tools, terms, dtype=torch.float64):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    parts = [(tools.dense([f.to(wide) for f in factors]), perm) for factors, perm in terms]
    return sum(part if perm is None else part[..., perm.argsort()] for part, perm in parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_every_term_makes_it_better_and_the_bounds_hold(tools, name, dtype, order):
    chain = tools.chains[name]
    for kind, W in tools.kinds(chain, dtype, 2, seed=2):
        size, errors = torch.linalg.matrix_norm(W), []
        for terms in (1, 2, 3):
            found, lower, upper = project_butterfly_sum(W, chain, terms, order=order)
            error = torch.linalg.matrix_norm(dense(tools, found, dtype) - W)
            assert len(found) == terms and lower.shape == upper.shape == W.shape[:1]
            assert (lower <= error * (1 + 1e-11) + 1e-13 * size).all(), kind
            assert (error <= upper * (1 + 1e-11) + 1e-13 * size).all(), kind
            errors.append(error)
        assert (errors[1] <= errors[0] + 1e-13 * size).all() and (errors[2] <= errors[1] + 1e-13 * size).all(), kind
        *_, swept = project_butterfly_sum(W, chain, 3, order=order, sweeps=1)
        assert (swept <= errors[2] + 1e-13 * size).all(), kind


def test_one_term_is_the_projection(tools):
    chain = tools.chains["rectangular"]
    W = torch.randn(2, *chain.shape, dtype=torch.float64, generator=tools.generator())
    ((factors, perm),), lower, upper = project_butterfly_sum(W, chain, 1)
    expected, low, high = project_butterfly(W, chain)
    assert perm is None
    torch.testing.assert_close(factors, expected)
    torch.testing.assert_close(lower, low, rtol=1e-12, atol=0)
    assert (upper <= high).all()


@pytest.mark.parametrize("rank", [1, 2])
def test_greedy_is_optimal_for_two_factors(tools, rank):
    """The error is that of truncation to the rank of all terms, and a sum of as many products is recovered."""
    chain = Chain.monarch(24, 20, 4, rank=rank)
    W = torch.randn(3, 24, 20, dtype=torch.complex128, generator=tools.generator())
    for terms in (1, 2):
        found, lower, _ = project_butterfly_sum(W, chain, terms)
        torch.testing.assert_close(
            torch.linalg.matrix_norm(dense(tools, found, W.dtype) - W), lower, rtol=1e-10, atol=1e-13
        )
        parts = [tools.dense(tools.random_factors(chain, seed=seed)) for seed in range(terms)]
        found, lower, _ = project_butterfly_sum(sum(parts), chain, terms)
        assert relative_error(dense(tools, found), sum(parts)) <= 1e-13 and lower == 0


def test_terms_with_orthogonal_blocks_are_recovered(tools):
    """Products on disjoint halves of the rows and columns: the whole is no product, the parts are found one by one."""
    chain, half = Chain.dyadic(32), Chain.dyadic(16)
    corners = torch.zeros(2, 32, 32, dtype=torch.float64)
    corners[0, :16, :16] = 10 * tools.dense(tools.random_factors(half, seed=1))
    corners[1, 16:, 16:] = tools.dense(tools.random_factors(half, seed=2))
    for corner in corners:
        assert project_butterfly(corner, chain)[2] <= 1e-13 * corner.norm()
    found, *_ = project_butterfly_sum(corners.sum(0), chain, 2)
    assert relative_error(dense(tools, found), corners.sum(0)) <= 1e-12


def test_sweeps_and_permutations(tools):
    W = tools.hadamard(32) + 0.5 * tools.dct(32) + 0.1 * tools.dft(32).real
    W = W[:, torch.randperm(32, generator=tools.generator())]
    before = torch.inf
    for sweeps in (0, 1, 2, 4):
        found, lower, upper = project_butterfly_sum(W, Chain.dyadic(32), 3, "search", sweeps=sweeps)
        assert lower is None and all(perm is not None for _, perm in found)
        error = relative_error(dense(tools, found), W)
        assert error <= before + 1e-13 and error * W.norm() <= upper * (1 + 1e-12)
        before = error
    scaled, *_, high = project_butterfly_sum(1e200 * W, Chain.dyadic(32), 3, "search", sweeps=4)
    torch.testing.assert_close(dense(tools, scaled) / 1e200, dense(tools, found), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(high / 1e200, upper, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_low_precision(tools, dtype):
    W = torch.randn(2, 16, 16, dtype=torch.complex64 if dtype.is_complex else None, generator=tools.generator())
    found, _, upper = project_butterfly_sum(W.to(dtype), Chain.dyadic(16), 3, sweeps=1)
    assert all(f.dtype == dtype for factors, _ in found for f in factors)
    wide = W.to(dtype).to(torch.complex128 if dtype.is_complex else torch.float64)
    assert (torch.linalg.matrix_norm(dense(tools, found, dtype) - wide) <= upper + 1e-2 * W.norm()).all()


def test_a_config_of_several_terms():
    W = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for terms in (1, 2, 4):
        found = project(W, ButterflyConfig(terms=terms))
        assert found.bound <= found.error <= found.guarantee * (1 + 1e-12)
        assert found.matrix.num_params == terms * 768 == ButterflyConfig(terms=terms).num_params(64, 64)
        assert abs(found.error - relative_error(found.matrix.to_dense(), W)) < 1e-12
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True) and isinstance(found.matrix, Sum)
    searched = project(W, ButterflyConfig(terms=2, permutation="search", sweeps=1))
    assert searched.bound is None and searched.error <= searched.guarantee * (1 + 1e-12)
    random = ButterflyConfig(terms=3).random((512, 512), generator=torch.Generator().manual_seed(0))
    assert isinstance(random, Sum)
    assert abs(random.to_dense().std() * (3 * 512) ** 0.5 - 1) < 0.1  # nn.Linear's variance


def test_a_budget_is_for_all_terms():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for budget in (2 * 768, 5000, 10_000):
        found = project(W, ButterflyConfig(terms=2, max_params=budget))
        assert found.matrix.num_params <= budget
    assert ButterflyConfig(terms=2, max_params=2 * Chain.dyadic(64, 2).num_params).resolve(64, 64)["rank"] == 2
    with pytest.raises(BudgetError, match="at least 1536 parameters"):
        ButterflyConfig(terms=2, max_params=1535).resolve(64, 64)
    config = ButterflyConfig(terms=2, ratio=0.5)
    assert structmat.config_from_dict(config.to_dict()) == config


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="terms must be"):
        ButterflyConfig(terms=0)
    with pytest.raises(ValueError, match="terms must be"):
        project_butterfly_sum(torch.ones(4, 4), Chain.dyadic(4), 0)
    with pytest.raises(ValueError, match="permutation must be"):
        project_butterfly_sum(torch.ones(4, 4), Chain.dyadic(4), 2, "bits")


def test_layers_become_sums():
    model = torch.nn.Sequential(torch.nn.Linear(12, 18), torch.nn.ReLU(), torch.nn.Linear(18, 4))
    structmat.surgery.compress_(model, ButterflyConfig(terms=2))
    assert isinstance(model[0].weight(), Sum)
    model(torch.randn(5, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
