"""The config of sums: budgets, JSON, projections, and its way through surgery."""

import json

import pytest
import torch

import structmat as sm
from structmat import surgery
from structmat.testing import relative_error

M, L = sm.MonarchConfig(nblocks=4), sm.LowRankConfig(ratio=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(m, n, dtype=torch.float64, seed=0):
    return torch.randn(m, n, generator=generator(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (37, 61)], ids=str)
@pytest.mark.parametrize("shares", [None, (3, 1), (0.6, 0.4)], ids=str)
def test_budget_is_met_and_exact(shape, shares):
    config = sm.SumConfig((M, L), shares=shares, ratio=0.5)
    count = config.num_params(*shape)
    budget = shape[0] * shape[1] // 2
    assert budget - sum(shape) < count <= budget  # the low rank comes last: less than one of its ranks is left
    value = config.random(shape, generator=generator())
    assert value.num_params == count
    assert sm.project(matrix(*shape), config).matrix.num_params == count
    if shares == (3, 1):
        assert value.terms[0].num_params <= 0.75 * budget


def test_fixed_terms_keep_their_sizes():
    config = sm.SumConfig((sm.MonarchConfig(rank=2), sm.LowRankConfig(rank=3), sm.BlockDiagonalConfig(nblocks=8)))
    assert config.num_params(64, 64) == 16 * 2 * 32 + 3 * 128 + 8 * 64
    assert config.resolve(64, 64)["terms"] == config.terms


@pytest.mark.parametrize(
    "config",
    [
        sm.SumConfig((M, L), shares=(3, 1), ratio=0.5),
        sm.SumConfig([sm.MonarchConfig(nblocks=(2, 4), rank=1), sm.ButterflyConfig(radices=(2, (3, 1)))]),
        sm.SumConfig((sm.SumConfig((M, L), ratio=1), sm.LDRConfig(ratio=1)), max_params=900),
    ],
    ids=["shares", "fixed", "nested"],
)
def test_json_round_trip_and_hash(config):
    again = sm.config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: sm.SumConfig((M,), ratio=0.5), ValueError, "two configs"),
        (lambda: sm.SumConfig((M, "lowrank"), ratio=0.5), TypeError, "Configs"),
        (lambda: sm.SumConfig((M, L), shares=(1, 2)), ValueError, "budget"),
        (lambda: sm.SumConfig((M, L), shares=(1,), ratio=0.5), ValueError, "must be 2"),
        (lambda: sm.SumConfig((M, L), shares=(1, -1), ratio=0.5), ValueError, "positive"),
        (lambda: sm.SumConfig((M, sm.LowRankConfig(rank=3)), ratio=0.5), ValueError, "lowrank must leave its size"),
        (lambda: sm.SumConfig((M, L), ratio=0.1).resolve(16, 16), sm.BudgetError, r"terms\[0\]"),
        (lambda: sm.SumConfig((M, L), shares=(99, 1), ratio=0.5).resolve(16, 16), sm.BudgetError, "at least 128"),
        (lambda: sm.config_from_dict({"structure": "sum", "terms": [{"structure": "x"}, {}]}), ValueError, "unknown"),
    ],
)
def test_errors_name_what_is_wrong(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16])
def test_members_are_found(dtype):
    """Two ranks of slices and one rank overall overlap in a closed set: the fit comes down to rounding."""
    config = sm.SumConfig((sm.BlockSparseConfig(block=8, pattern="banded", density=0.3), sm.LowRankConfig(rank=1)))
    work = dtype if dtype.itemsize >= 8 else torch.float64
    W = config.random((40, 40), generator=generator(), dtype=work).to_dense().to(dtype)
    result = sm.project(W, config)
    limit = {torch.float32: 1e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-3)
    assert result.error <= limit
    assert result.matrix.dtype == dtype
    assert result.bound is None


@pytest.mark.parametrize("shape", [(48, 48), (33, 70), (3, 50, 20)], ids=str)
def test_at_least_as_near_as_greedy_in_either_order(shape):
    W = torch.randn(*shape, generator=generator(), dtype=torch.float64)
    terms = sm.MonarchConfig(rank=1), sm.LowRankConfig(rank=3)
    error = sm.project(W, sm.SumConfig(terms)).error
    for first, second in (terms, terms[::-1]):
        one = sm.project(W, first)
        rest = W - one.matrix.to_dense()
        greedy = (rest - sm.project(rest, second).matrix.to_dense()).norm() / W.norm()
        assert error <= greedy + 1e-12 < one.error
    achieved = relative_error(sm.project(W, sm.SumConfig(terms)).matrix.to_dense(), W)
    assert abs(achieved - error) <= 1e-12


@pytest.mark.parametrize("last", [sm.ButterflyConfig(), sm.LDRConfig(rank=1)], ids=["butterfly", "ldr"])
def test_terms_that_are_no_sums_of_blocks(last):
    W, terms = matrix(16, 16), (sm.LowRankConfig(rank=2), last)
    x = torch.randn(60, 16, generator=generator(1), dtype=torch.float64) * torch.arange(1, 17)
    result = sm.project(W, sm.SumConfig(terms), sm.Moments.of(x))
    assert result.calibrated_error <= result.plain_calibrated_error
    assert sm.project(W, sm.SumConfig(terms)).error < sm.project(W, terms[0]).error


def test_moments_fit_all_terms_together():
    W = matrix(48, 40)
    x = torch.randn(300, 40, generator=generator(1), dtype=torch.float64) @ matrix(40, 40, seed=2)
    config, moments = sm.SumConfig((M, L), ratio=0.5), sm.Moments.of(x)
    result = sm.project(W, config, moments)
    assert result.calibrated_error < 0.9 * result.plain_calibrated_error
    alone = [
        sm.project(W, c, moments).calibrated_error for c in (sm.MonarchConfig(ratio=0.25), L.__class__(ratio=0.25))
    ]
    assert result.calibrated_error < min(alone)


def test_random_sums_have_the_variance_of_a_linear_layer():
    config = sm.SumConfig((M, sm.BlockDiagonalConfig(), L), ratio=0.9)
    x = torch.randn(2000, 256, generator=generator(1))
    y = config.random((256, 256), generator=generator()).linear(x)
    assert abs(y.std().item() * 3**0.5 - 1) < 0.05


def test_surgery(tmp_path):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))

    config = sm.SumConfig((M, L), shares=(3, 1), ratio=0.5)
    dense, x = model(), torch.randn(50, 32, generator=generator())
    calibration = surgery.calibrate(dense, [x])
    compressed = model()
    report = surgery.compress_(compressed, config, calibration=calibration)
    assert report.params_after <= 2048
    assert report.rows[0].structure.startswith("Sum(monarch 4x4")
    surgery.save_file(compressed, tmp_path / "model.safetensors")
    for fresh in (model(), model()):
        surgery.load_file(fresh, tmp_path / "model.safetensors")
        assert torch.equal(fresh(x), compressed(x))
    replaced = model()
    assert surgery.replace_(replaced, config).params_after == report.params_after
    assert isinstance(replaced[0].weight(), sm.Sum)
    plan = surgery.allocate(model(), 0.5, config=config, rule="error", levels=3)
    assert plan.params <= 2048
    assert all(isinstance(c, sm.SumConfig) for c in plan.values())
    surgery.compress_(model(), plan)


def test_the_command_says_that_a_sum_cannot_be_named_by_flags(tmp_path, capsys):
    from safetensors.torch import save_file

    from structmat.cli import main

    save_file({"fc.weight": torch.ones(8, 8)}, tmp_path / "a.safetensors")
    try:
        code = main(["compress", str(tmp_path / "a.safetensors"), "--structure", "sum", "--ratio", "0.5", "--dry-run"])
    except SystemExit as stop:  # where the command does not offer it
        code = stop.code
    assert code == 2
    assert "sum" in capsys.readouterr().err
