"""Projection onto matrices of low displacement rank."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat
from structmat import (
    LDR,
    CauchyLike,
    HankelLike,
    LDRConfig,
    Toeplitz,
    ToeplitzLike,
    VandermondeLike,
    config_from_dict,
)
from structmat.projection import fit_cauchy_like


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gauss(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def error(M, W):
    return (torch.linalg.matrix_norm(M.to_dense() - W) / torch.linalg.matrix_norm(W)).max().item()


CASES = {
    "toeplitz": lambda W, r, sweeps=30: ToeplitzLike.from_dense(W, r, sweeps=sweeps),
    "hankel": lambda W, r, sweeps=30: HankelLike.from_dense(W, r, sweeps=sweeps),
    "vandermonde": lambda W, r, sweeps=30: VandermondeLike.from_dense(W, r, nodes(W, W.shape[-2]), sweeps=sweeps),
    "cauchy": lambda W, r, sweeps=30: CauchyLike.from_dense(
        W, r, nodes(W, W.shape[-2]), nodes(W, W.shape[-1]) + 2.5, sweeps=sweeps
    ),
}


def nodes(W, count):
    i = torch.arange(count, dtype=torch.float64)
    if W.is_complex():
        return torch.polar(torch.ones_like(i), 2 * math.pi * (i + 0.5) / count + 0.01).to(W.dtype)
    return 0.9 * torch.cos(math.pi * (i + 0.5) / count).to(W.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(9, 9), (6, 11), (2, 7, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_members_are_found_exactly(name, shape, dtype):
    member = CASES[name](gauss(*shape, dtype=dtype), 2)
    dense = member.to_dense()
    found = CASES[name](dense, 2)
    assert type(found) is type(member)
    assert found.dtype == dtype
    assert found.displacement_rank == 2
    assert error(found, dense) < 1e-10


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(24, 24), (17, 30), (30, 16)])
def test_more_sweeps_and_ranks_never_hurt_and_zero_is_a_bound(name, shape):
    W = gauss(*shape, seed=3)
    by_sweeps = [error(CASES[name](W, 3, sweeps), W) for sweeps in (0, 1, 3, 10, 40)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(by_sweeps))
    assert by_sweeps[0] <= 1 + 1e-12
    assert by_sweeps[-1] < 0.98
    assert error(CASES[name](W, 8), W) < by_sweeps[-1]


def test_truncation_alone_is_worse_than_nothing_and_least_squares_are_not():
    W = gauss(128, 128)
    A, B = (structmat.Shift(128, f, dtype=torch.float64) for f in (1.0, -1.0))
    displacement = A.matmul(W) - B.mT.matmul(W.mT).mT
    u, s, vh = torch.linalg.svd(displacement)
    truncated = ToeplitzLike(u[:, :8] * s[:8], vh[:8].mT)
    assert error(truncated, W) > 2
    assert error(ToeplitzLike.from_dense(W, 8), W) < 0.92


def test_near_members_it_is_as_good_as_the_noise():
    member = ToeplitzLike.random((40, 40), 2, generator=seeded(), dtype=torch.float64)
    noise = gauss(40, 40, seed=1)
    noise *= 0.05 * torch.linalg.matrix_norm(member.to_dense()) / torch.linalg.matrix_norm(noise)
    assert error(ToeplitzLike.from_dense(member.to_dense() + noise, 2), member.to_dense() + noise) < 0.05


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from(sorted(CASES)))
def test_any_size_and_full_rank(m, n, seed, name):
    W = gauss(m, n, seed=seed)
    assert error(CASES[name](W, 1), W) <= 1 + 1e-12
    assert error(CASES[name](W, min(m, n)), W) < 1e-9


def test_half_precision_and_gradients_are_not_carried():
    W = gauss(12, 12).to(torch.bfloat16).requires_grad_()
    found = ToeplitzLike.from_dense(W, 3)
    assert found.dtype == torch.bfloat16
    assert not found.left.requires_grad
    T = Toeplitz(torch.randn(12, generator=seeded()), torch.randn(12, generator=seeded(1)))
    assert error(ToeplitzLike.from_dense(T.to_dense(), 2), T.to_dense()) < 1e-5


def test_an_empty_batch():
    assert ToeplitzLike.from_dense(torch.zeros(0, 4, 5), 2).shape == (0, 4, 5)


def test_fit_of_a_zero_matrix_and_of_zero_starts():
    zero = torch.zeros(5, 4, dtype=torch.float64)
    assert not ToeplitzLike.from_dense(zero, 2).to_dense().any()
    G, H, norm = fit_cauchy_like(zero, torch.ones_like(zero), [(gauss(5, 1), gauss(4, 1))], 0)
    assert norm == 0
    assert not (G @ H.mT).any()


def test_errors():
    W = gauss(5, 6)
    with pytest.raises(ValueError, match="at most min"):
        ToeplitzLike.from_dense(W, 6)
    with pytest.raises(ValueError, match="modulus 1"):
        ToeplitzLike.from_dense(W, 2, e=2.0, f=-1.0)
    with pytest.raises(ValueError, match="NaN"):
        ToeplitzLike.from_dense(W * torch.nan, 2)
    with pytest.raises(ValueError, match="s must have 5 entries"):
        CauchyLike.from_dense(W, 2, torch.arange(4.0).double(), torch.arange(6.0).double())
    with pytest.raises(TypeError, match="nodes has dtype"):
        VandermondeLike.from_dense(W, 2, torch.arange(5.0))


@pytest.mark.parametrize("kind", ["toeplitz", "hankel", "best"])
def test_config_compresses_a_model_and_its_file_comes_back(kind, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(24, 30), torch.nn.ReLU(), torch.nn.Linear(30, 8))
    reference = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    config = LDRConfig(kind=kind, ratio=0.5)
    assert config_from_dict(config.to_dict()) == config
    report = structmat.surgery.compress_(model, config)
    assert [row.params_after for row in report.compressed] == [6 * 54, 3 * 38]
    for layer, W in zip((model[0], model[2]), reference, strict=True):
        found = layer.weight()
        assert isinstance(found, LDR)
        assert error(found, W) < 1
        assert error(found, W) == pytest.approx(structmat.project(W, config).error, rel=1e-4)
    x = torch.randn(5, 24, generator=seeded())
    structmat.surgery.save_file(model, tmp_path / "m.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Linear(24, 30), torch.nn.ReLU(), torch.nn.Linear(30, 8))
    structmat.surgery.load_file(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh(x), model(x))
    before = model(x)
    structmat.surgery.densify_(model)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_best_takes_the_better_of_both():
    T = Toeplitz(torch.randn(20, generator=seeded()), torch.randn(20, generator=seeded(1))).to_dense()
    for W, cls in ((T, ToeplitzLike), (T.flip(-1), HankelLike)):
        found = structmat.project(W, LDRConfig(kind="best", rank=2))
        assert type(found.matrix) is cls
        assert found.error < 1e-5


def test_config_errors():
    with pytest.raises(ValueError, match="exactly one"):
        LDRConfig()
    with pytest.raises(ValueError, match="kind must be"):
        LDRConfig(kind="cauchy", rank=2)
    with pytest.raises(structmat.BudgetError, match="at least 11 parameters"):
        structmat.project(gauss(5, 6), LDRConfig(max_params=10))
    with pytest.raises(ValueError, match="at most min"):
        structmat.project(gauss(5, 6), LDRConfig(rank=6))
