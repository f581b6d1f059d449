"""Butterflies from dense matrices by their class, by a config, and by surgery."""

import json

import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import nn

import structmat
from structmat import BudgetError, Butterfly, ButterflyConfig, Chain, Permutation, Product, config_from_dict, project
from structmat.testing import relative_error

N = 64
TRANSFORMS = {
    "dft": torch.fft.fft(torch.eye(N, dtype=torch.complex128)),
    "hadamard": torch.from_numpy(scipy.linalg.hadamard(N)).double(),
    "dct": torch.from_numpy(scipy.fft.dct(torch.eye(N).double().numpy(), axis=0, norm="ortho")),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_recovered_with_its_permutation(name):
    W, rank = TRANSFORMS[name], 2 if name == "dct" else 1
    found = project(W, ButterflyConfig(rank=rank, permutation="search"))
    assert found.error <= 1e-13 and found.bound <= found.error + 1e-15 and found.guarantee <= 1e-12
    assert found.matrix.dtype == W.dtype
    assert found.matrix.num_params == Chain.dyadic(N, rank).num_params
    assert relative_error(found.matrix.to_dense(), W) <= 1e-13
    same = Butterfly.from_dense(W, Chain.dyadic(N, rank), permutation="search", order="left-to-right")
    assert relative_error(same.to_dense(), W) <= 1e-13


@pytest.mark.parametrize("kind", [2, 4])
@pytest.mark.parametrize("transform", [scipy.fft.dct, scipy.fft.dst])
def test_the_search_finds_what_its_page_says(transform, kind):
    """Cosine and sine transforms of types 2 and 4; of type 3, the transpose of type 2, only the transpose."""
    config = ButterflyConfig(rank=2, permutation="search")
    W = torch.from_numpy(transform(torch.eye(N).double().numpy(), type=kind, axis=0, norm="ortho"))
    assert project(W, config).error <= 1e-13
    third = torch.from_numpy(transform(torch.eye(N).double().numpy(), type=3, axis=0, norm="ortho"))
    assert project(third, config).bound > 0.1 and project(third.mT.contiguous(), config).error <= 1e-13


def test_a_permutation_of_columns_is_applied_first():
    W = TRANSFORMS["dft"]
    perm = torch.arange(N).view(2, 2, 2, 2, 2, 2).permute(5, 4, 3, 2, 1, 0).reshape(-1)
    A = Butterfly.from_dense(W, permutation=perm)
    assert isinstance(A, Product) and isinstance(A.factors[1], Permutation)
    assert relative_error(A.to_dense(), W) <= 1e-13
    assert relative_error(Butterfly.from_dense(W).to_dense(), W) > 0.5
    with pytest.raises(ValueError, match="perm must hold every index"):
        Butterfly.from_dense(W, permutation=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match='permutation must be None, a tensor of indices or "search"'):
        Butterfly.from_dense(W, permutation="bits")


def test_the_certificate():
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 12), (24, 10), (3, 8, 8)):
        W = torch.randn(shape, dtype=torch.float64, generator=generator)
        plain, refined = (project(W, ButterflyConfig(sweeps=s)) for s in (0, 4))
        for found in (plain, refined):
            assert 0 < found.bound <= found.error <= found.guarantee * (1 + 1e-12)
            assert abs(found.error - relative_error(found.matrix.to_dense(), W)) < 1e-12
        assert refined.error <= plain.error and refined.bound == plain.bound
    monarch = project(W, structmat.MonarchConfig(nblocks=2))
    assert monarch.guarantee is None


def test_a_config_is_a_small_json_value():
    for config in (
        ButterflyConfig(),
        ButterflyConfig(radices=(2, (3, 2), 2), order="left-to-right", sweeps=2),
        ButterflyConfig(ratio=0.5, permutation="search"),
    ):
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        ButterflyConfig(radices=(2, (3, 2), 2)).random((12, 8)).patterns == Chain.mixed_radix([2, (3, 2), 2]).patterns
    )
    with pytest.raises(ValueError, match='permutation must be None or "search"'):
        ButterflyConfig(permutation="all")
    with pytest.raises(ValueError, match='order must be "balanced" or "left-to-right", got \'middle\''):
        ButterflyConfig(order="middle")
    with pytest.raises(ValueError, match="a rank or a budget"):
        ButterflyConfig(rank=2, ratio=0.5)
    with pytest.raises(ValueError, match="needs a square matrix without radices"):
        ButterflyConfig(rank=2).random((12, 8))


def test_a_budget_buys_rank():
    for budget, rank in ((2 * 6 * 64, 1), (Chain.dyadic(64, 2).num_params, 2), (10**9, 4)):
        config = ButterflyConfig(max_params=budget)
        assert config.resolve(64, 64)["rank"] == rank
        assert config.num_params(64, 64) <= budget
    with pytest.raises(BudgetError, match="butterfly needs at least 768 parameters"):
        ButterflyConfig(max_params=767).resolve(64, 64)


def test_layers_of_a_model_become_butterflies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 4))
    x = torch.randn(5, 12)
    report = structmat.surgery.compress_(model, ButterflyConfig())
    assert isinstance(model[0].weight(), Butterfly) and model(x).shape == (5, 4)
    assert len(report.rows) == 2
    structmat.surgery.replace_(fresh := nn.Sequential(nn.Linear(12, 12)), ButterflyConfig(radices=(3, 4)))
    assert [tuple(p) for p in fresh[0].weight().patterns] == [(1, 3, 3, 4), (3, 4, 4, 1)]
