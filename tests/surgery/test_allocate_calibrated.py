"""allocate with a calibration, a choice of structures, and every kind of budget."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.calibrated import metric_of
from structmat.projection.weighted import low_rank_losses

LOW, MONARCH, DIAGONAL = (
    structmat.LowRankConfig(ratio=1),
    structmat.MonarchConfig(nblocks=2),
    structmat.BlockDiagonalConfig(),
)


def model(*sizes, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m, bias=bias) for n, m in itertools.pairwise(sizes)))


def calibrated(net, seed=0, **kwargs):
    torch.manual_seed(seed)
    x = torch.randn(300, net[0].in_features) * torch.linspace(0.1, 3, net[0].in_features) + 1
    return surgery.calibrate(net, [x], progress=False, **kwargs)


def size_of(layer, moments):
    W = layer.weight.detach().double()
    return metric_of(moments, W).squared(W)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 7)])
def test_losses_of_all_ranks_are_those_of_the_projections(shape, outputs):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(*shape, generator=g, dtype=torch.float64)
    x = torch.randn(99, shape[1], generator=g, dtype=torch.float64) * torch.linspace(0.1, 5, shape[1])
    moments = structmat.Moments.of(x, torch.randn(99, shape[0], generator=g).double() if outputs else None)
    metric = metric_of(moments, W)
    losses, plain = low_rank_losses(W, metric, 0.1)
    assert len(losses) == min(shape) + 1 and losses[-1] == plain[-1] == 0
    assert losses[0].item() == pytest.approx(metric.squared(W)) and plain[0].item() == pytest.approx(W.norm() ** 2)
    for rank in range(1, min(shape)):
        found = structmat.project(W, structmat.LowRankConfig(rank=rank), moments, 0.1)
        assert math.sqrt(losses[rank] / losses[0]) == pytest.approx(found.calibrated_error, rel=1e-8)
        assert math.sqrt(plain[rank] / plain[0]) == pytest.approx(found.error, rel=1e-8)


def test_the_choice_is_that_of_brute_force():
    net = model(10, 12, 9, bias=False)
    calibration, weight = calibrated(net), {"0": 3.0, "1": 0.5}
    plan = surgery.allocate(net, 0.55, LOW, calibration=calibration, weight=weight)
    tables = []
    for name, layer in zip("01", net, strict=True):
        (m, n), size = layer.weight.shape, size_of(layer, calibration[name])
        table = [(m * n, 0.0)]
        for rank in range(1, -(-m * n // (m + n))):
            found = structmat.project(layer.weight, structmat.LowRankConfig(rank=rank), calibration[name], 0.1)
            table.append((rank * (m + n), weight[name] * found.calibrated_error**2 * size))
        tables.append(table)
    choices = list(itertools.product(*tables))
    best = min(sum(e for _, e in c) for c in choices if sum(p for p, _ in c) <= plan.budget)
    total = sum(weight[k] * size_of(layer, calibration[k]) for k, layer in zip("01", net, strict=True))
    assert plan.error == pytest.approx(math.sqrt(best / total), rel=1e-5)
    # The other way round: the fewest parameters within an error, and no fewer would do.
    for most in (plan.error, 0.05, 0.3, 0.9):
        small = surgery.allocate(net, config=LOW, calibration=calibration, weight=weight, max_error=most)
        allowed = [sum(p for p, _ in c) for c in choices if sum(e for _, e in c) <= most**2 * total * (1 + 1e-6)]
        assert small.params == min(allowed) and small.error <= most * (1 + 1e-9)
        assert small.unit == "relative error" and small.budget == most and small.spent == small.error
        least = [sum(e for _, e in c) for c in choices if sum(p for p, _ in c) < small.params]
        assert not least or min(least) > most**2 * total


def test_every_structure_is_taken_where_it_fits():
    net = model(32, 32, 32, 32, bias=False)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net[0].weight.copy_(structmat.LowRank.random((32, 32), rank=4, generator=g).to_dense())
        net[1].weight.copy_(structmat.Monarch.random((32, 32), nblocks=2, rank=3, generator=g).to_dense())
        net[2].weight.copy_(structmat.BlockDiagonal.random((32, 32), nblocks=4, generator=g).to_dense())
    for calibration in (None, calibrated(net)):
        # 4 x 64 + 3 x 4 x 32 + 4 x 64 parameters are enough.
        plan = surgery.allocate(
            net, max_params=256 + 384 + 256, config=[LOW, MONARCH, DIAGONAL], levels=40, calibration=calibration
        )
        assert [row.structure for row in plan.report.rows] == ["lowrank 4", "monarch 2x2 rank 3", "blockdiagonal 4"]
        assert plan.error < 1e-5 and plan.unused == 0 and plan.budget == 896
    mixed = surgery.allocate(net, 0.5, {"0": LOW, "*": (MONARCH, DIAGONAL)}, calibration=calibrated(net))
    assert mixed["0"].structure == "lowrank" and mixed["2"].structure in ("monarch", "blockdiagonal")


def test_compress_keeps_what_the_plan_promises():
    net = model(48, 64, 32)
    calibration = calibrated(net)
    plan = surgery.allocate(net, 0.5, [LOW, MONARCH], calibration=calibration)
    promised = {row.name: row for row in plan.report.compressed}
    report = surgery.compress_(net, plan, calibration=calibration)
    assert report.params_after <= plan.budget and len(report.compressed) == len(plan)
    for row in report.compressed:
        same = promised[row.name]
        assert (row.structure, row.params_after) == (same.structure, same.params_after)
        assert row.calibrated_error <= 1.02 * same.calibrated_error
        if row.structure.startswith("lowrank"):
            assert row.calibrated_error == pytest.approx(same.calibrated_error, rel=1e-4)
            assert row.error == pytest.approx(same.error, rel=1e-4)


def test_moments_are_centred_for_a_bias_of_its_own():
    nets = model(24, 24, bias=True), model(24, 24, bias=False)
    for net in nets:
        net.append(nn.Linear(24, 24))
        calibration = calibrated(net)
        plan = surgery.allocate(net, 0.5, LOW, rule="error", calibration=calibration, weight={"0": 1.0, "1": 1.0})
        own = calibration["0"].centred() if net[0].bias is not None else calibration["0"]
        if "0" in plan:
            found = structmat.project(net[0].weight, plan["0"], own)
            assert plan.report.rows[0].calibrated_error == pytest.approx(found.calibrated_error, rel=1e-5)
    assert calibration["0"].mean.norm() > 1


def test_what_counts_more_gets_more():
    net = model(32, 32, 32, 32)
    calibration = calibrated(net)
    sizes = []
    for name in "012":
        plan = surgery.allocate(
            net, 0.4, LOW, calibration=calibration, weight={k: 1e4 if k == name else 1.0 for k in "012"}
        )
        sizes.append([row.params_after for row in plan.report.rows])
    assert all(sizes[i][i] == max(s[i] for s in sizes) > min(s[i] for s in sizes) for i in range(3))


def test_an_outlier_input_takes_parameters_where_absolute_errors_count():
    net = model(32, 32, bias=False)
    net.append(nn.Linear(32, 32, bias=False))
    torch.manual_seed(0)
    x = torch.randn(400, 32) * 0.1

    def sized(scale):
        seen = [structmat.Moments.of(x * s) for s in scale]
        plan = surgery.allocate(net, 0.5, LOW, calibration=dict(zip("01", seen, strict=True)), weight=lambda *_: 1.0)
        return [row.params_after for row in plan.report.rows]

    assert sized((30.0, 1.0))[0] > sized((1.0, 1.0))[0] > sized((1.0, 30.0))[0]
    # Without weights and gradients errors are relative: the scale of the inputs changes nothing.
    plans = [
        surgery.allocate(net, 0.5, LOW, calibration={"0": structmat.Moments.of(s * x), "1": structmat.Moments.of(x)})
        for s in (1.0, 30.0)
    ]
    assert plans[0].configs == plans[1].configs


def test_gradients_decide_without_weights():
    net = model(24, 24, 24, bias=False)
    x, g = torch.randn(200, 24), torch.randn(200, 24)

    def sized(*scale):
        seen = {k: structmat.Moments.of(x, g * s) for k, s in zip("01", scale, strict=True)}
        return [row.params_after for row in surgery.allocate(net, 0.5, [LOW, MONARCH], calibration=seen).report.rows]

    assert sized(20.0, 1.0)[0] > sized(1.0, 20.0)[0]


def test_budgets_in_seconds_and_costs():
    net = model(32, 32, 32)
    calibration = calibrated(net)
    price = lambda w: 1.0 if isinstance(w, torch.Tensor) else w.num_params / 1024  # noqa: E731
    plan = surgery.allocate(net, config=[LOW, MONARCH], calibration=calibration, cost=price, max_seconds=1.1, levels=5)
    assert plan.unit == "cost" and plan.budget == 1.1 and 0.5 < plan.spent <= 1.1
    again = surgery.allocate(
        net, config=[LOW, MONARCH], calibration=calibration, cost=plan.costs, max_seconds=1.1, levels=5
    )
    assert again.configs == plan.configs and again.error == plan.error
    near = surgery.allocate(net, config=LOW, calibration=calibration, cost=price, max_error=0.4, levels=5)
    assert near.error <= 0.4 and sum(price(m.weight) for m in net) > 1
    try:
        timed = surgery.allocate(net, config=LOW, rule="error", max_seconds=1.0, levels=1, rows=8)
    except structmat.BudgetError as error:  # of a machine on which this takes a second
        assert "seconds" in str(error)
        return
    assert timed.unit == "seconds" and timed.spent <= 1.0 and timed.costs


def test_max_params_for_the_other_rules():
    net = model(64, 64, 32)
    for rule in ("equal", "proportional", "error"):
        plan = surgery.allocate(net, max_params=3000, config=LOW, rule=rule)
        assert plan.budget == 3000 and plan.params <= 3000
    assert surgery.allocate(net, max_params=10**9, config=LOW, rule="error").params == 64 * 64 + 64 * 32
    assert surgery.allocate(net, max_params=10**9, config=LOW, rule="equal").params <= 64 * 64 + 64 * 32


def test_it_is_deterministic_and_leaves_the_model():
    net = model(32, 48, 32)
    before, calibration = {k: v.clone() for k, v in net.state_dict().items()}, calibrated(net)
    plans = [surgery.allocate(net, 0.5, [LOW, MONARCH, DIAGONAL], calibration=calibration) for _ in range(2)]
    assert plans[0].configs == plans[1].configs and plans[0].error == plans[1].error
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_errors_name_what_is_wrong():
    net = model(16, 16, 16)
    calibration = calibrated(net)
    with pytest.raises(ValueError, match="exactly one of ratio, max_params, max_seconds and max_error, got none"):
        surgery.allocate(net, config=LOW)
    with pytest.raises(ValueError, match="got ratio and max_error"):
        surgery.allocate(net, 0.5, LOW, max_error=0.1)
    for bad in (0, -0.1, 1.5, True, float("nan")):
        with pytest.raises(ValueError, match="max_error must be a number in"):
            surgery.allocate(net, config=LOW, max_error=bad)
    for bad in (0.0, math.inf, "1"):
        with pytest.raises(ValueError, match="max_seconds must be a positive finite number"):
            surgery.allocate(net, config=LOW, max_seconds=bad)
    with pytest.raises(ValueError, match="max_params must be at least 1"):
        surgery.allocate(net, config=LOW, max_params=0)
    with pytest.raises(ValueError, match='cost must be "params"'):
        surgery.allocate(net, config=LOW, max_params=10, cost="time", rule="error")
    with pytest.raises(ValueError, match='max_error is for the rule "error" only'):
        surgery.allocate(net, config=LOW, max_error=0.1, rule="equal")
    with pytest.raises(ValueError, match='calibration is for the rule "error" only'):
        surgery.allocate(net, 0.5, LOW, "equal", calibration=calibration)
    with pytest.raises(ValueError, match="several structures"):
        surgery.allocate(net, 0.5, [LOW, MONARCH], "proportional")
    for bad in (None, [], [LOW, 3], "monarch", {"*": []}):
        with pytest.raises(TypeError, match="config must be a Config"):
            surgery.allocate(net, 0.5, bad)
    with pytest.raises(ValueError, match="weight has no 1"):
        surgery.allocate(net, 0.5, LOW, calibration=calibration, weight={"0": 1.0})
    with pytest.raises(ValueError, match="damping must be"):
        surgery.allocate(net, 0.5, LOW, calibration=calibration, damping=-1)
    with pytest.raises(ValueError, match="no moments of 1"):
        surgery.allocate(net, 0.5, LOW, calibration={"0": calibration["0"]})
    with pytest.raises(structmat.BudgetError, match="need at least"):
        surgery.allocate(net, max_params=3, config=[LOW, MONARCH], calibration=calibration)
