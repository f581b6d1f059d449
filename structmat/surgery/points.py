"""The rule "error" of :func:`structmat.surgery.allocate`: what each size of each layer loses, and the best choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from structmat.calibrated import metric_of
from structmat.config import BudgetError, Config, LowRankConfig
from structmat.projecting import project
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.projection.weighted import low_rank_losses
from structmat.surgery.costs import Costs
from structmat.surgery.knapsack import knapsack
from structmat.surgery.replace import row_of
from structmat.surgery.rules import Option, dense, ladder, with_budget
from structmat.surgery.selection import Target

# Into how many parts a quantity that is no integer is divided for the knapsack: of a cost, finer than any measurement
# resolves; of an error, as fine as rounding.
_PARTS, _ERROR_PARTS = 1 << 40, 1 << 50
# Sweeps of a probe: on MiniLM's layers two come within 6 % of the error that the whole descent reaches.
_SWEEPS = 2
# Below this share of the dense size only the smallest matrix of a ladder is fitted.
_LOW = 0.05


@dataclasses.dataclass(frozen=True)
class Points:
    """The options of a layer that no other beats, cheapest first, and the squared norm of its weight."""

    options: list[Option]
    size: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """Exactly one of: a share of the dense cost, a cost, and the largest relative error."""

    ratio: float | None = None
    cost: float | None = None
    error: float | None = None


# ---------------------------------------------------------------- what each size loses
def probe_layers(
    layers: list[list[Target]],
    ratio: float | None,
    levels: int,
    costs: Costs,
    moments: Mapping[str, Moments] | None,
    damping: float,
    hidden: bool | None,
) -> list[Points]:
    """The points of every layer; its targets differ in their configs.

    Args:
        layers: each with its structures.
        ratio: of which every layer gets a point too, or None.
        levels: of the ladder of each structure.
        costs: what points cost.
        moments: of the layers by name, centred where biases take up the mean; None to count entries.
        damping: of the moments.
        hidden: of the progress bar, as for tqdm.
    """
    found = []
    for targets in tqdm(layers, "allocating", disable=hidden):
        W = targets[0].weight
        whole = dataclasses.replace(dense(targets[0], error=0.0), cost=costs(W))
        if moments is None:
            size = float(torch.linalg.vector_norm(W, dtype=work_dtype(W)).real) ** 2
            probed = [option for target in targets for option in _plain(target, ratio, levels, costs, size)]
        else:
            own = moments[targets[0].name]
            size = metric_of(own, W).squared(W.to(work_dtype(W)))
            whole = dataclasses.replace(whole, row=dataclasses.replace(whole.row, calibrated_error=0.0))
            probed = []
            for target in targets:
                method = _low_rank if isinstance(target.config, LowRankConfig) else _calibrated
                probed += method(target, ratio, levels, costs, own, damping)
        found.append(Points(_undominated([whole, *probed]), size))
    return found


def _plain(target: Target, ratio: float | None, levels: int, costs: Costs, size: float) -> Iterator[Option]:
    for config in ladder(target, ratio, levels):
        result = project(target.weight, config)
        row = row_of(target, result.matrix, result)
        yield Option(config, row.params_after, result.error**2 * size, row, costs(result.matrix))


def _calibrated(
    target: Target, ratio: float | None, levels: int, costs: Costs, moments: Moments, damping: float
) -> Iterator[Option]:
    """Points of any structure, after a few sweeps from the plain projection."""
    double = target.weight.to(work_dtype(target.weight))
    metric = metric_of(moments, double)
    size, plain_size = metric.squared(double) or 1.0, double.abs().square().sum().item() or 1.0
    configs = ladder(target, ratio, levels)
    low, shared = _LOW * target.weight.numel(), {}
    for config in [c for i, c in enumerate(configs) if i == 0 or (c.max_params or 0) >= low]:
        matrix = config._sketch(target.weight, moments, damping, _SWEEPS, shared)
        # What another search finds in the end is to have no more parameters.
        if type(config)._sketch is not Config._sketch and matrix.num_params < (config.max_params or 0):
            config = dataclasses.replace(config, max_params=matrix.num_params)
        missed = double - matrix.to(double.dtype).to_dense()
        loss, plain = metric.squared(missed), missed.abs().square().sum().item()
        errors = {"error": math.sqrt(plain / plain_size), "calibrated_error": math.sqrt(loss / size)}
        row = dataclasses.replace(row_of(target, matrix), **errors)
        yield Option(config, row.params_after, loss, row, costs(matrix))


def _low_rank(
    target: Target, ratio: float | None, levels: int, costs: Costs, moments: Moments, damping: float
) -> Iterator[Option]:
    """Points of all ranks, or of those on the ladder where each would have to be measured."""
    W, (m, n) = target.weight, target.shape
    assert isinstance(target.config, LowRankConfig)
    double = W.to(work_dtype(W))
    found = low_rank_losses(double, metric_of(moments, W), damping)
    losses, plain = (values.tolist() for values in found)
    if costs.cost == "params":
        sizes = (target.config.params_of(m, n, rank) for rank in range(1, min(m, n)))
        configs = [with_budget(target, size) for size in sizes if size < m * n]
    else:
        configs = ladder(target, ratio, levels)
    for config in configs:
        rank = config.resolve(m, n)["rank"]
        device = "meta" if costs.cost == "params" else W.device
        value = config.random(target.shape, dtype=W.dtype, device=device)
        errors = {"error": _share(plain, rank), "calibrated_error": _share(losses, rank)}
        row = dataclasses.replace(row_of(target, value), **errors)
        yield Option(config, row.params_after, losses[rank], row, costs(value))


def _share(losses: list[float], rank: int) -> float:
    return math.sqrt(losses[rank] / (losses[0] or 1.0))


def _undominated(options: list[Option]) -> list[Option]:
    """Those that lose less than all that cost no more, in order of cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


# ---------------------------------------------------------------- the choice
@dataclasses.dataclass(frozen=True)
class Choice:
    """An option of every layer, the budget, what of it is spent, the knapsack's gap, and the relative error."""

    options: list[Option]
    budget: float
    spent: float
    gap: float
    error: float


def choose(points: list[Points], weights: list[float], budget: Budget, costs: Costs, total: float) -> Choice:
    """The options of least weighted loss within a cost, or of least cost within an error.

    Args:
        points: of every layer.
        weights: of their losses.
        budget: what bounds the choice.
        costs: in which unit the points' costs are.
        total: the cost of all dense layers.

    Raises:
        structmat.BudgetError: if even the cheapest options cost more than the budget.
    """
    groups = [p.options for p in points]
    losses = [[w * o.loss for o in group] for w, group in zip(weights, groups, strict=True)]
    size = math.fsum(w * p.size for w, p in zip(weights, points, strict=True)) or 1.0
    if budget.error is not None:
        best, gap = _cheapest(groups, losses, budget.error**2 * size)
    else:
        most = budget.cost if budget.cost is not None else (budget.ratio or 0.0) * total
        most = math.floor(most) if costs.cost == "params" else most
        best, gap = _nearest(groups, losses, most, costs, total)
    options = [group[k] for group, k in zip(groups, best, strict=True)]
    error = math.sqrt(math.fsum(group[k] for group, k in zip(losses, best, strict=True)) / size)
    if budget.error is not None:
        return Choice(options, budget.error, error, gap, error)
    return Choice(options, most, sum(o.cost for o in options), gap, error)


def _nearest(groups: list[list[Option]], losses: Any, most: float, costs: Costs, total: float) -> tuple[Any, float]:
    check_least(sum(min(o.cost for o in group) for group in groups), most, costs)
    part = 1 if costs.cost == "params" else total / _PARTS
    integers = [[round(o.cost / part) for o in group] for group in groups]
    whole = most if part == 1 else max(math.floor(most / part), sum(map(min, integers)))
    return knapsack(integers, losses, int(whole))


def _cheapest(groups: list[list[Option]], losses: list[list[float]], most: float) -> tuple[list[int], float]:
    """The same knapsack with the roles exchanged. Rounded up, parts of the error add to no more than it holds."""
    most *= 1 + 1e-12  # an error that another allocation reported is met again
    possible = [[k for k, loss in enumerate(group) if loss <= most] for group in losses]  # dense is always
    part = most / _ERROR_PARTS or 1.0
    integers = [[math.ceil(group[k] / part) for k in ks] for group, ks in zip(losses, possible, strict=True)]
    prices = [[float(group[k].cost) for k in ks] for group, ks in zip(groups, possible, strict=True)]
    best, gap = knapsack(integers, prices, _ERROR_PARTS + len(groups))
    return [ks[k] for ks, k in zip(possible, best, strict=True)], gap


def check_least(least: float, budget: float, costs: Costs) -> None:
    """Raise unless what the smallest sizes cost is within the budget."""
    if least > budget:
        raise BudgetError(
            f"the selected layers need at least {least:.6g} {costs.unit}, the budget is {budget:.6g}; raise it, or "
            "exclude layers with filter_fn"
        )
