"""Configs: budgets, JSON, errors."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch

import structmat as sm
from structmat.config import CONFIGS

SHAPES = [(384, 384), (1536, 384), (384, 1536), (97, 31), (7, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("structure", ["monarch", "lowrank", "blockdiagonal"])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.25])
def test_budget_is_met_and_used(shape, structure, ratio):
    config = CONFIGS[structure](ratio=ratio)
    m, n = shape
    try:
        count = config.num_params(m, n)
    except sm.BudgetError as error:
        assert "at least" in str(error)
        return
    assert count <= ratio * m * n
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert sm.project(W, config).matrix.num_params == count
    if structure != "blockdiagonal":
        kwargs = config.resolve(m, n) | {}
        if kwargs["rank"] < min(-(-m // 4), -(-n // 4)):  # the next rank would be over the budget
            kwargs["rank"] += 1
            assert config.matrix_class.random(shape, **kwargs, device="meta").num_params > ratio * m * n


def test_max_params_equals_ratio():
    assert sm.MonarchConfig(max_params=73728).resolve(384, 384) == sm.MonarchConfig(ratio=0.5).resolve(384, 384)


@pytest.mark.parametrize(
    "config",
    [
        sm.MonarchConfig(),
        sm.MonarchConfig(nblocks=(2, 8), rank=3),
        sm.MonarchConfig(nblocks=8, ratio=0.25),
        sm.LowRankConfig(rank=7),
        sm.LowRankConfig(max_params=1000),
        sm.BlockDiagonalConfig(),
        sm.BlockDiagonalConfig(nblocks=3),
    ],
    ids=repr,
)
def test_json_round_trip(config):
    assert sm.config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: sm.MonarchConfig(ratio=0), ValueError, "ratio"),
        (lambda: sm.MonarchConfig(ratio=1.5), ValueError, "ratio"),
        (lambda: sm.MonarchConfig(rank=2, ratio=0.5), ValueError, "not both"),
        (lambda: sm.MonarchConfig(max_params=5, ratio=0.5), ValueError, "not both"),
        (lambda: sm.LowRankConfig(), ValueError, "exactly one"),
        (lambda: sm.LowRankConfig(rank=2, max_params=5), ValueError, "exactly one"),
        (lambda: sm.LowRankConfig(rank=0), ValueError, "at least 1"),
        (lambda: sm.LowRankConfig(rank=2.5), TypeError, "integer"),
        (lambda: sm.BlockDiagonalConfig(nblocks=2, ratio=0.5), ValueError, "not both"),
        (lambda: sm.config_from_dict({"structure": "circulant"}), ValueError, "known are"),
        (lambda: sm.config_from_dict({"structure": "monarch", "blocks": 4}), TypeError, "nblocks"),
        (lambda: sm.MonarchConfig(nblocks=4, ratio=0.01).resolve(16, 16), sm.BudgetError, "at least 128"),
        (lambda: sm.LowRankConfig(ratio=0.01).resolve(16, 16), sm.BudgetError, "at least 32"),
        (lambda: sm.BlockDiagonalConfig(max_params=3).resolve(16, 16), sm.BudgetError, "at least 16"),
        (lambda: sm.MonarchConfig(nblocks=8).resolve(4, 100), ValueError, "must not exceed"),
        (lambda: sm.MonarchConfig(nblocks=(1, 2, 3)).resolve(4, 100), ValueError, "(k, l)"),
        (lambda: sm.MonarchConfig(nblocks=2, rank=9).resolve(16, 16), ValueError, "at most"),
        (lambda: sm.project(torch.ones(4, 4), "monarch"), TypeError, "MonarchConfig"),
        (lambda: sm.project(torch.ones(4, 4, dtype=torch.int64), sm.MonarchConfig()), TypeError, "floating"),
        (lambda: sm.project(torch.full((4, 4), torch.nan), sm.MonarchConfig()), ValueError, "NaN"),
        (lambda: sm.project(torch.ones(4), sm.MonarchConfig()), ValueError, "at least 2"),
    ],
)
def test_errors_name_what_is_wrong(make, kind, text):
    with pytest.raises(kind, match=text.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_error_is_that_of_the_returned_factors():
    """In float32 and bfloat16 the error is measured on the rounded factors."""
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
        result = sm.project(W, sm.MonarchConfig(nblocks=4, ratio=0.5))
        dense = result.matrix.to(torch.float64).to_dense()
        expected = (W.double() - dense).norm() / W.double().norm()
        assert abs(result.error - expected.item()) <= 1e-12


def test_a_users_own_config_is_projected_and_read_back():
    @dataclasses.dataclass(frozen=True)
    class DiagonalConfig(sm.Config):
        structure: ClassVar[str] = "test-diagonal"
        matrix_class: ClassVar[type[sm.StructuredMatrix]] = sm.Diagonal

        def resolve(self, m, n):
            return {}

    try:
        W = torch.arange(9.0, dtype=torch.float64).view(3, 3)
        result = sm.project(W, sm.config_from_dict({"structure": "test-diagonal"}))
        assert torch.equal(result.matrix.diag, W.diagonal())
        assert abs(result.error - (W - W.diagonal().diag()).norm() / W.norm()) <= 1e-15
        assert result.bound is None
        model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        report = sm.surgery.compress_(model, DiagonalConfig())
        assert report.rows[0].bound is None
        assert isinstance(model[0].weight(), sm.Diagonal)
    finally:
        del CONFIGS["test-diagonal"]
