"""allocate: budgets that are never exceeded, shares that are as documented, and the exact choice of sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import structmat
from structmat import surgery
from structmat.surgery.knapsack import knapsack

FAMILIES = [
    structmat.MonarchConfig(nblocks=2),
    structmat.LowRankConfig(ratio=1),
    structmat.BlockDiagonalConfig(),
    structmat.ButterflyConfig(),
]
RULES = ["equal", "proportional", "error"]


def model(*sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m, dtype=dtype) for n, m in itertools.pairwise(sizes)))


def dense_size(net):
    return sum(layer.weight.numel() for layer in net)


def squared_error(net, plan, weight=lambda name: 1.0):
    total = 0.0
    for row, layer in zip(plan.report.rows, net, strict=True):
        config = plan.get(row.name)
        if config is not None:
            W = layer.weight.detach().double()
            total += weight(row.name) * (structmat.project(layer.weight, config).error * W.norm().item()) ** 2
    return total


# ---------------------------------------------------------------- the knapsack
OPTIONS = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10)), min_size=1, max_size=5)


@settings(max_examples=200)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 120))
def test_knapsack_agrees_with_brute_force(items, budget):
    costs, errors = [[c for c, _ in item] for item in items], [[e for _, e in item] for item in items]
    choices = itertools.product(*(range(len(item)) for item in items))
    sums = [
        (sum(c[k] for c, k in zip(costs, ks, strict=True)), sum(e[k] for e, k in zip(errors, ks, strict=True)))
        for ks in choices
    ]
    feasible = [error for cost, error in sums if cost <= budget]
    if not feasible:
        with pytest.raises(ValueError, match=f"the budget is {budget}"):
            knapsack(costs, errors, budget)
        return
    chosen, gap = knapsack(costs, errors, budget)
    assert gap == 0
    assert sum(c[k] for c, k in zip(costs, chosen, strict=True)) <= budget
    assert sum(e[k] for e, k in zip(errors, chosen, strict=True)) == pytest.approx(min(feasible), rel=1e-12, abs=1e-11)


def test_knapsack_of_many_layers_agrees_with_a_table_of_all_budgets():
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(1, 40, (60, 8), generator=generator).tolist()
    errors = torch.rand(60, 8, generator=generator, dtype=torch.float64).tolist()
    budget = 600
    least = [0.0] * (budget + 1)
    for c, e in zip(costs, errors, strict=True):
        least = [
            min((least[b - ck] + ek for ck, ek in zip(c, e, strict=True) if ck <= b), default=math.inf)
            for b in range(budget + 1)
        ]
    chosen, gap = knapsack(costs, errors, budget)
    assert gap == 0
    assert sum(c[k] for c, k in zip(costs, chosen, strict=True)) <= budget
    assert sum(e[k] for e, k in zip(errors, chosen, strict=True)) == pytest.approx(least[budget], rel=1e-12)


def test_knapsack_with_costs_like_a_models_is_small_enough_to_be_exact():
    # 150 layers, sizes of 10^6 parameters: a table over the budget would have 10^8 columns.
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(500_000, 4_000_000, (150, 1), generator=generator)
    parts = torch.linspace(0.05, 1, 9, dtype=torch.float64)
    costs = (sizes * parts).long()
    errors = torch.rand(150, 1, generator=generator, dtype=torch.float64) * sizes * (1 - parts) ** 1.5
    budget = int(sizes.sum()) // 3
    chosen, gap = knapsack(costs.tolist(), errors.tolist(), budget)
    assert gap == 0
    spent = sum(int(costs[i, k]) for i, k in enumerate(chosen))
    assert 0.999 * budget < spent <= budget


def test_knapsack_tells_what_it_could_not_prove():
    # Errors that are the same linear function of cost everywhere: a subset-sum problem, which no bound prunes.
    generator = torch.Generator().manual_seed(2)
    costs = torch.randint(10_000, 4_000_000, (24, 5), generator=generator)
    errors = 4e6 - costs.double()
    budget = int(costs.double().mean(1).sum())
    chosen, gap = knapsack(costs.tolist(), errors.tolist(), budget)
    spent = sum(int(costs[i, k]) for i, k in enumerate(chosen))
    least = 24 * 4e6 - budget  # no choice within the budget has less
    assert spent <= budget and 24 * 4e6 - spent <= least / (1 - gap) * (1 + 1e-12) and 0 < gap < 1e-4


# ---------------------------------------------------------------- the rules
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.structure)
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_the_budget_holds_and_compress_does_what_the_report_says(rule, config, ratio):
    net = model(64, 64, 48, 20)
    plan = surgery.allocate(net, ratio, config, rule)
    assert plan.budget == math.floor(ratio * dense_size(net))
    assert plan.params <= plan.budget and plan.unused == plan.budget - plan.params
    assert all(type(layer) is nn.Linear for layer in net)
    report = surgery.compress_(net, plan)
    promised = {row.name: row for row in plan.report.rows}
    for row in report.compressed:
        assert (row.structure, row.params_after) == (promised[row.name].structure, promised[row.name].params_after)
        if rule == "error":
            assert row.error == pytest.approx(promised[row.name].error, rel=1e-9)
    stored = sum(
        sum(p.numel() for p in m.weight.parameters())
        if isinstance(m, structmat.nn.StructuredLinear)
        else m.weight.numel()
        for m in net
    )
    assert stored == plan.params <= plan.budget


@pytest.mark.parametrize("config", FAMILIES[:3], ids=lambda c: c.structure)
def test_equal_gives_every_layer_its_ratio(config):
    plan = surgery.allocate(model(64, 40, 30), 0.4, config)
    assert [c.max_params for c in plan.values()] == [math.floor(0.4 * 64 * 40), math.floor(0.4 * 40 * 30)]
    assert all(row.params_after <= 0.4 * row.params_before for row in plan.report.rows)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.structure)
@pytest.mark.parametrize("ratio", [0.45, 0.7])
def test_error_rule_is_at_least_as_good_as_equal(config, ratio):
    net = model(64, 64, 64, 32)
    net[1].weight.data *= 5
    equal = squared_error(net, surgery.allocate(net, ratio, config, "equal"))
    assert squared_error(net, surgery.allocate(net, ratio, config, "error")) <= equal * (1 + 1e-9)


def test_error_rule_is_optimal_among_its_sizes():
    net, config, budget = model(24, 24, 16, 30), structmat.LowRankConfig(ratio=1), 0.5
    net[0].weight.data *= 3
    plan = surgery.allocate(net, budget, config, "error", levels=60)  # all ranks
    tables = []
    for layer in net:
        W = layer.weight.detach().double()
        m, n = W.shape
        tail = torch.linalg.svdvals(W).square().flip(0).cumsum(0).flip(0).tolist()
        tables.append([(m * n, 0.0)] + [(r * (m + n), tail[r]) for r in range(1, min(m, n)) if r * (m + n) < m * n])
    best = min(
        sum(e for _, e in choice) for choice in itertools.product(*tables) if sum(c for c, _ in choice) <= plan.budget
    )
    assert squared_error(net, plan) == pytest.approx(best, rel=1e-5)


def test_weights_move_the_error_rules_budget():
    net = model(64, 64, 64)
    plans = [
        surgery.allocate(net, 0.5, FAMILIES[1], "error", weight=lambda name, _, k=k: 100.0 if name == k else 1.0)
        for k in "01"
    ]
    first, second = ([row.params_after for row in plan.report.rows] for plan in plans)
    assert first[0] > first[1] and second[0] < second[1]


def test_proportional_follows_the_cost_and_passes_on_what_is_left():
    net = model(64, 64, 64, 64)
    cost = {"0": 1.0, "1": 2.0, "2": 1.0}
    plan = surgery.allocate(net, 0.5, FAMILIES[1], "proportional", weight=lambda name, _: cost[name])
    assert [row.structure for row in plan.report.rows] == ["lowrank 12", "lowrank 24", "lowrank 12"]
    assert plan.budget == 6144 and plan.unused == 0
    # 0.52 * 4096 = 2129.92 is 16 ranks and 81.92 over: two layers later there is enough for one more.
    plan = surgery.allocate(net, 0.52, FAMILIES[1], "proportional")
    assert [row.structure for row in plan.report.rows] == ["lowrank 16", "lowrank 17", "lowrank 16"]
    # A share above the dense size is cut there, and the others have the rest.
    plan = surgery.allocate(net, 0.5, FAMILIES[1], "proportional", weight=lambda name, _: 100.0 if name == "0" else 1.0)
    assert [row.structure for row in plan.report.rows] == ["dense", "lowrank 8", "lowrank 8"]
    assert list(plan) == ["1", "2"]


# ---------------------------------------------------------------- the rule of Pixelated Butterfly
def test_pixelfly_rule_divides_between_low_rank_and_stride():
    net = model(256, 256, 512, 128)
    plan = surgery.allocate(net, 0.4, structmat.PixelflyConfig(block=16), "pixelfly")
    assert plan.params == plan.spent <= plan.budget == int(0.4 * dense_size(net)) and set(plan) == {"0", "1", "2"}
    due = 0
    for config, layer in zip(plan.values(), net, strict=True):
        m, n = layer.weight.shape
        due += 0.4 * m * n
        assert config.rank % 16 == 0 and config.max_params is config.ratio is None
        # No other multiple is nearer to a quarter to a third; the next stride, if there is one, would not have fitted.
        outside = {r: max(0.25 - r * (m + n) / due, r * (m + n) / due - 1 / 3, 0) for r in range(16, 129, 16)}
        assert outside[config.rank] == min(outside.values())
        matrix = structmat.Pixelfly.random((m, n), **config.resolve(m, n))
        due -= matrix.num_params
        if 2 * config.max_stride <= min(m, n) // 16:
            wider = structmat.layouts.flat_butterfly((m, n), 16, 2 * config.max_stride)
            assert 0 <= due < wider.num_params - matrix.layout.num_params
    report = surgery.compress_(net, plan)
    assert report.params_after == plan.params
    assert net[0].weight().layout == structmat.layouts.flat_butterfly((256, 256), 16, plan["0"].max_stride)


def test_pixelfly_rule_takes_shares_by_cost_and_the_nearest_rank():
    config = structmat.PixelflyConfig(block=32)
    net = model(512, 512, 512)
    more = surgery.allocate(net, 0.5, config, "pixelfly", weight=lambda name, _: 3.0 if name == "0" else 1.0)
    first, second = (row.params_after for row in more.report.rows)
    even, _ = (row.params_after for row in surgery.allocate(net, 0.5, config, "pixelfly").report.rows)
    assert first > even > 0 and first > second and more.params <= more.budget
    # 2 * 64 parameters a rank: a rank of 32 is all of a quarter of 64 x 64 budgets; the nearest that fits is taken.
    small = surgery.allocate(model(64, 64), 0.8, structmat.PixelflyConfig(block=16), "pixelfly")
    assert small["0"].rank == 16 and small["0"].max_stride == 1
    with pytest.raises(structmat.BudgetError, match=r"diagonal blocks and a rank of 32; the budget is 1228"):
        surgery.allocate(model(64, 64), 0.3, config, "pixelfly")
    with pytest.raises(TypeError, match="needs a PixelflyConfig, got MonarchConfig for 0"):
        surgery.allocate(net, 0.3, FAMILIES[0], "pixelfly")
    for fixed in ({"max_stride": 2}, {"rank": 32}, {"pattern": "top_k", "ratio": 0.5}):
        with pytest.raises(ValueError, match="must leave them"):
            surgery.allocate(net, 0.3, structmat.PixelflyConfig(**fixed), "pixelfly")


@settings(max_examples=40)
@given(st.lists(st.integers(16, 150), min_size=2, max_size=4), st.sampled_from([4, 8, (8, 4)]), st.floats(0.45, 1))
def test_pixelfly_rule_never_exceeds_the_budget(sizes, block, ratio):
    net = model(*sizes)
    try:
        plan = surgery.allocate(net, ratio, structmat.PixelflyConfig(block=block), "pixelfly")
    except structmat.BudgetError as error:
        assert "the rule needs at least" in str(error)
        return
    assert plan.params <= plan.budget and plan.spent == plan.params
    for name, config in plan.items():
        m, n = net[int(name)].weight.shape
        assert structmat.Pixelfly.random((m, n), **config.resolve(m, n), device="meta").num_params == next(
            row.params_after for row in plan.report.rows if row.name == name
        )


# ---------------------------------------------------------------- what the error rule spends
def flops(weight):
    return 2.0 * weight.numel() if isinstance(weight, torch.Tensor) else float(weight.flops)


@pytest.mark.parametrize("config", FAMILIES[:3], ids=lambda c: c.structure)
def test_costs_in_place_of_parameters(config):
    net = model(64, 64, 48, 64)
    calls = []
    plan = surgery.allocate(net, 0.6, config, "error", cost=lambda w: calls.append(w) or flops(w))
    assert plan.unit == "cost" and plan.budget == pytest.approx(0.6 * 2 * dense_size(net))
    assert plan.spent == pytest.approx(sum(row.flops_after for row in plan.report.rows))
    assert plan.spent <= plan.budget * (1 + 1e-9) and plan.unused == plan.budget - plan.spent
    assert len(calls) == len(plan.costs)  # one call for equal shapes and structures
    assert "cost, " in str(plan) and f"budget: {plan.budget:.4g} cost" in str(plan)
    again = surgery.allocate(net, 0.6, config, "error", cost=plan.costs)
    assert again.configs == plan.configs and again.spent == plan.spent
    report = surgery.compress_(net, plan)
    assert sum(row.flops_after for row in report.compressed) <= plan.budget


def test_the_choice_is_optimal_in_costs():
    net, config = model(24, 24, 16, 30), structmat.LowRankConfig(ratio=1)
    cost = lambda w: 7.0 if isinstance(w, torch.Tensor) else w.rank**1.5 / 3  # noqa: E731
    plan = surgery.allocate(net, 0.5, config, "error", levels=60, cost=cost)
    tables = []
    for layer in net:
        m, n = layer.weight.shape
        tail = torch.linalg.svdvals(layer.weight.detach().double()).square().flip(0).cumsum(0).flip(0).tolist()
        ranks = [r for r in range(1, min(m, n)) if r * (m + n) < m * n]
        tables.append([(7.0, 0.0)] + [(r**1.5 / 3, tail[r]) for r in ranks])
    best = min(
        sum(e for _, e in choice) for choice in itertools.product(*tables) if sum(c for c, _ in choice) <= plan.budget
    )
    assert squared_error(net, plan) == pytest.approx(best, rel=1e-5)


def test_a_structure_that_costs_more_than_dense_is_not_taken():
    net = model(32, 32, 32)
    plan = surgery.allocate(net, 1.0, FAMILIES[1], "error", cost=lambda w: 1.0 if isinstance(w, torch.Tensor) else 2.0)
    assert not plan and plan.params == dense_size(net) and plan.spent == plan.budget == 2.0
    with pytest.raises(structmat.BudgetError, match="need at least 2 cost, the budget is 1"):
        surgery.allocate(net, 0.5, FAMILIES[1], "error", cost=lambda w: 1.0 if isinstance(w, torch.Tensor) else 2.0)


def test_measured_time():
    net = model(256, 256, 256)
    try:
        plan = surgery.allocate(net, 0.9, FAMILIES[1], "error", levels=2, cost="time", rows=64)
    except structmat.BudgetError as error:  # of a machine on which no rank is faster
        assert "seconds" in str(error)
        return
    assert plan.unit == "seconds" and 0 < plan.spent <= plan.budget < 1
    assert "256x256 float32 dense" in plan.costs and all(0 < value < 1 for value in plan.costs.values())
    again = [surgery.allocate(net, 0.9, FAMILIES[1], "error", levels=2, cost=plan.costs) for _ in range(2)]
    assert again[0].configs == again[1].configs == plan.configs
    with pytest.raises(ValueError, match="cost has no entry '256x256 float32 lowrank"):
        surgery.allocate(net, 0.9, FAMILIES[1], "error", levels=5, cost=plan.costs)


def test_a_function_as_rule():
    net = model(64, 64, 64)
    plan = surgery.allocate(net, 0.75, FAMILIES[1], lambda shapes, budget: {"1": budget - math.prod(shapes["0"])})
    assert [row.structure for row in plan.report.rows] == ["dense", "lowrank 16"] and plan.unused == 0
    with pytest.raises(structmat.BudgetError, match="rule spends 8192 parameters, the budget is 6144"):
        surgery.allocate(net, 0.75, FAMILIES[1], lambda shapes, budget: {})
    with pytest.raises(ValueError, match="not among the selected layers: 7"):
        surgery.allocate(net, 0.75, FAMILIES[1], lambda shapes, budget: {"7": 100})


def test_one_config_for_each_kind_of_layer():
    configs = {"0": FAMILIES[0], "[12]": FAMILIES[1]}
    net = model(64, 64, 64, 64, 10)
    plan = surgery.allocate(net, 0.5, configs, "error")
    assert set(plan) <= {"0", "1", "2"} and plan.budget == 3 * 4096 // 2
    assert all(plan[k].structure == ("monarch" if k == "0" else "lowrank") for k in plan)
    assert plan.report.skipped[0].skipped == "no pattern matches its name"


def test_what_has_no_smaller_form_stays_dense_under_the_error_rule():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 7), nn.Linear(7, 64), nn.Linear(64, 64))
    plan = surgery.allocate(net, 0.6, FAMILIES[1], "error")
    assert [row.structure for row in plan.report.rows[:2]] == ["dense", "dense"] and plan.params <= plan.budget
    with pytest.raises(structmat.BudgetError, match="layers cannot meet their budget"):
        surgery.allocate(net, 0.6, FAMILIES[1], "equal")
    with pytest.raises(structmat.BudgetError, match=r"need at least \d+ parameters, the budget is"):
        surgery.allocate(net, 0.01, FAMILIES[1], "error")


def test_tied_and_refused_layers_do_not_take_part():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40)
            self.head.weight = self.embed.weight
            self.rest = nn.ModuleDict({"a[0]": nn.Linear(32, 64)})  # a name with a bracket is no pattern

    plan = surgery.allocate(Tied(), 0.5, FAMILIES[1])
    assert plan.budget == (1024 + 2048) // 2
    assert "tied to embed.weight" in plan.report.skipped[0].skipped
    assert len(surgery.compress_(Tied(), plan).compressed) == 2
    plan = surgery.allocate(Tied(), 0.5, FAMILIES[1], filter_fn=lambda name, _: name == "fc")
    assert list(plan) == ["fc"] and plan.budget == 512


def test_it_serves_replace_and_prints_and_draws(tmp_path):
    net = model(64, 64, 32)
    plan = surgery.allocate(net, 0.5, FAMILIES[0], "error")
    text = str(plan)
    assert f"budget: 3,072 parameters, {plan.unused} unused" in text and "monarch" in text
    plan.plot(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").stat().st_size > 1000
    assert surgery.replace_(net, surgery.allocate(net, 0.5, FAMILIES[0])).params_after <= 3072
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(64, 64))
    assert surgery.allocate(fresh, 0.5, FAMILIES[0]).params <= 2048


def test_errors_name_what_is_wrong():
    net, config = model(16, 16), FAMILIES[1]
    for ratio in (0, 1.5, -1, "half", True, float("nan")):
        with pytest.raises(ValueError, match="ratio must be a number in"):
            surgery.allocate(net, ratio, config)
    with pytest.raises(ValueError, match="rule must be"):
        surgery.allocate(net, 0.5, config, "fair")
    with pytest.raises(ValueError, match="weight is for the rules"):
        surgery.allocate(net, 0.5, config, weight=lambda *_: 1.0)
    with pytest.raises(ValueError, match=r"positive finite number, got -1.0 for 0"):
        surgery.allocate(net, 0.5, config, "error", weight=lambda *_: -1.0)
    with pytest.raises(ValueError, match="cost is for the rule"):
        surgery.allocate(net, 0.5, config, "equal", cost="time")
    with pytest.raises(ValueError, match='cost must be "params", "time", a function'):
        surgery.allocate(net, 0.5, config, "error", cost="memory")
    with pytest.raises(ValueError, match=r"positive finite number, got 0\.0 for '16x16 float32 dense'"):
        surgery.allocate(net, 0.5, config, "error", cost=lambda _: 0)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        surgery.allocate(net, 0.5, config, "error", cost="time", rows=0)
    with pytest.raises(ValueError, match="meta device"):
        surgery.measure_seconds(torch.ones(2, 2, device="meta"))
    with pytest.raises(ValueError, match="must leave its size to allocate"):
        surgery.allocate(net, 0.5, structmat.MonarchConfig(rank=2))
    with pytest.raises(ValueError, match="levels must be at least 1"):
        surgery.allocate(net, 0.5, config, "error", levels=0)
    with pytest.raises(ValueError, match="meta device"):
        surgery.allocate(nn.Sequential(nn.Linear(16, 16, device="meta")), 0.5, config, "error")
    with pytest.raises(TypeError, match="model must be"):
        surgery.allocate("net", 0.5, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("rule", RULES)
def test_dtypes(dtype, rule):
    plan = surgery.allocate(model(32, 32, 16, dtype=dtype), 0.6, FAMILIES[1], rule)
    assert 0 < plan.params <= plan.budget
