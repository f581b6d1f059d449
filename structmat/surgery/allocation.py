"""How to share a budget of parameters among the linear layers of a model."""

from __future__ import annotations

import copy
import dataclasses
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from structmat._checks import check_int
from structmat.config import Config
from structmat.projection.moments import Moments
from structmat.surgery import rules
from structmat.surgery.costs import Cost, Costs
from structmat.surgery.fitting import check_moments, own_bias, own_biases
from structmat.surgery.plan import Allocation
from structmat.surgery.points import Budget, check_least, choose, probe_layers
from structmat.surgery.replace import check_values, report_of
from structmat.surgery.rules import WeightFn
from structmat.surgery.selection import Configs, FilterFn, Selection, Target, count_params, dense_shape, select

__all__ = ["Allocation", "allocate"]

Rule = Callable[[dict[str, tuple[int, int]], int], Mapping[str, int]]
Structures = Config | Sequence[Config]
_NAMES = ("equal", "proportional", "pixelfly", "error")


def allocate(
    model: nn.Module,
    ratio: float | None = None,
    config: Structures | Mapping[str, Structures] | None = None,
    rule: str | Rule | None = None,
    filter_fn: FilterFn | None = None,
    weight: WeightFn | Mapping[str, float] | None = None,
    levels: int = 8,
    cost: Cost = "params",
    rows: int = 1024,
    *,
    calibration: Mapping[str, Moments] | None = None,
    damping: float = 0.1,
    max_params: int | None = None,
    max_seconds: float | None = None,
    max_error: float | None = None,
    progress: bool | None = None,
) -> Allocation:
    """Choose a size, and a structure where there are several, for each linear layer; the model is not changed.

    The layers are those that :func:`compress_` would replace. Together they have m_1 n_1 + m_2 n_2 + ... parameters
    (biases apart); the budget B is ``ratio`` of that, rounded down, or ``max_params``, and is never exceeded. Of
    ``ratio``, ``max_params``, ``max_seconds`` and ``max_error`` exactly one is given. The rules:

    - "equal": every layer has the budget ``ratio * m * n``, rounded down. What a layer cannot use of it stays unused.
    - "proportional": every layer, and so every type of layers, has the share of B that it has of the dense cost, as in
      Pixelated Butterfly (Chen, Dao et al. 2021: if the MLP layers take 60 % of the time and attention
      40 %, so they do of the budget). ``weight`` gives each layer's cost, measured or computed, in any unit; by default
      it is the number of parameters. No layer gets more than its dense size: the others share the rest. What a layer
      cannot use passes to those that follow in the model's order.
    - "pixelfly", for :class:`structmat.PixelflyConfig`: shares as in "proportional", and in each of them the paper's
      division. The low rank takes a quarter to a third, with a rank that is a multiple of the block's smaller side
      (where no multiple does, one that comes nearest), and the rest sets the largest stride. What a layer cannot use
      passes on as above: beyond the largest stride of its size nothing grows.
    - "error": the choice of structures and sizes with the least sum of squared errors ``weight * |W - M|_F^2`` within
      B, which is counted in ``cost``. Every layer is projected at several budgets: a geometric ladder from the least
      that the structure can meet to the dense size, and ``ratio * m * n``, so that the sum is never above that of
      "equal" (if parameters are counted). To stay dense is one of the choices. Which is best is a multiple-choice
      knapsack, solved exactly by merging Pareto fronts (see ``gap`` of :class:`Allocation` for the exception).
    - a function of the layers' shapes ``{name: (out, in)}`` and B, which returns parameters by name. A layer that it
      leaves out stays dense, at its dense cost.

    With a ``calibration`` the errors are those of the layers' outputs, ``weight * E |T^(1/2) (W - M) x|^2``: for a
    layer with a bias of its own of the centred inputs, as :func:`compress_` projects it. So that errors of different
    layers can be compared, give as ``weight`` what :func:`sensitivity` measured; or calibrate with gradients, which
    bring each layer's T. Where neither is given, errors count relative to the layer's outputs: weight is then
    ``1 / E |W x|^2``. The points of low rank are those of all ranks (from one decomposition a layer); other
    structures are fitted on the ladder, but for sizes below 5 % other than the smallest, by a few sweeps, in single
    precision where weights are: errors in the report are then a few per cent above those that :func:`compress_`
    reaches, with the same calibration and damping.

    Args:
        model: any module that contains linear layers.
        ratio: in (0, 1].
        config: a config, or a sequence of configs (structures to choose from), or a mapping of patterns to these, as
            for :func:`compress_`. Budgets in it are replaced.
        rule: one of the above; None for "error" where there are several structures, a calibration, max_seconds or
            max_error, else "equal".
        filter_fn: called with name and module; layers for which it returns false do not take part.
        weight: called with name and module; returns a positive number; or a mapping of names to numbers. For
            "proportional", "pixelfly" and "error" (there 1 by default).
        levels: of the ladder, for "error"; so many projections of every layer and structure, or fewer.
        cost: for "error", what the budget counts: B is ``ratio`` of the cost of all dense layers. "params"; "time" for
            the seconds of a forward product, measured by :func:`measure_seconds` for every size on the weights'
            device; a function of a weight (out, in), a tensor or a structured matrix, that returns a positive number;
            or the ``costs`` of another allocation, which makes the result independent of new measurements.
        rows: how many inputs at a time, for "time".
        calibration: second moments of the layers' inputs by name, from :func:`calibrate`; for "error".
        damping: of the moments, for :func:`structmat.project`.
        max_params: the budget in parameters.
        max_seconds: for "error", the budget in seconds: ``cost`` is "time" by default, or what gives seconds.
        max_error: for "error", the least cost whose relative error ``sqrt(sum weight |W - M|^2 / sum weight |W|^2)``,
            in the norms above and over all layers, is at most this, in (0, 1].
        progress: whether to show a progress bar for "error"; None shows it on a terminal.

    Returns:
        Configs by name, with a report.

    Raises:
        structmat.BudgetError: if a layer cannot meet its budget, or, for "error", all layers together cannot meet B;
            or if a function spends more than B.
        TypeError: if an argument has the wrong type, or a config is no PixelflyConfig for "pixelfly".
        ValueError: if nothing is to be replaced, the rule is unknown, not exactly one budget is given, a number is out
            of range, a config fixes a size besides the budget, a cost or a weight is missing, a weight is on the meta
            device or not finite (for "error"), or the calibration lacks a layer or is of other sizes.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128)).requires_grad_(False)
        >>> _ = model[0].weight.copy_(torch.ones(64, 64) + torch.eye(64) / 64)
        >>> _ = model[1].weight.copy_(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
        >>> plan = surgery.allocate(model, 0.5, structmat.LowRankConfig(ratio=1), rule="error")
        >>> plan.budget, plan.unused, [(row.structure, row.params_after) for row in plan.report.rows]
        (6144, 128, [('lowrank 8', 1024), ('lowrank 26', 4992)])
        >>> surgery.compress_(model, plan).params_after
        6016
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128))
        >>> calibration = surgery.calibrate(model, [torch.randn(200, 64)])
        >>> structures = [structmat.LowRankConfig(ratio=1), structmat.MonarchConfig(nblocks=2)]
        >>> plan = surgery.allocate(model, config=structures, calibration=calibration, max_error=0.3)
        >>> 0 < plan.error <= 0.3
        True
    """
    patterns, structures = _structures(config)
    several = any(len(choice) > 1 for choice in structures.values())
    if rule is None:
        given = (calibration, max_seconds, max_error)
        rule = "error" if several or any(v is not None for v in given) else "equal"
    cost = "time" if max_seconds is not None and isinstance(cost, str) and cost == "params" else cost
    _check_budget(ratio, max_params, max_seconds, max_error, rule, cost)
    _check_rule(rule, weight, cost, calibration, several)
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number, 0 or above, got {damping!r}")
    costs = Costs(cost, rows)
    selection = select(model, patterns, filter_fn)
    targets = selection.targets
    layers = [[dataclasses.replace(t, config=c) for c in structures[id(t.config)]] for t in targets]
    if rule == "pixelfly":
        rules.check_pixelfly(targets)
    for target in (target for layer in layers for target in layer):
        rules.with_budget(target, 1)
    total = sum(math.prod(t.shape) for t in targets)
    if rule == "error":
        budget = Budget(ratio, max_params if max_seconds is None else max_seconds, max_error)
        hidden = None if progress is None else not progress
        return _least_error(model, selection, layers, budget, weight, levels, costs, calibration, damping, hidden)
    most = math.floor(ratio * total) if ratio is not None else int(max_params or 0)
    if rule == "equal":
        sizes = {t.name: math.prod(t.shape) for t in targets}
        shares = {k: math.floor(ratio * v) if ratio is not None else most * v // total for k, v in sizes.items()}
        chosen = rules.meet({k: min(v, sizes[k]) for k, v in shares.items()}, targets)
    elif isinstance(rule, str):
        share_of = rules.checked_weights(targets, weight or _size)
        fit = rules.low_rank_and_stride if rule == "pixelfly" else None
        chosen = rules.proportional(targets, most, share_of, fit)
    else:
        chosen = rules.by_function(rule, targets, most)
    return _allocation(model, selection, chosen, budget=most, spent=sum(o.cost for o in chosen), unit=costs.unit)


def _least_error(
    model: nn.Module,
    selection: Selection,
    layers: list[list[Target]],
    budget: Budget,
    weight: WeightFn | Mapping[str, float] | None,
    levels: int,
    costs: Costs,
    calibration: Mapping[str, Moments] | None,
    damping: float,
    hidden: bool | None,
) -> Allocation:
    check_values(selection)
    targets, moments = selection.targets, None
    if calibration is not None:
        check_moments(targets, calibration)
        own = own_biases(model)
        centred = {t.name for t in targets if own_bias(t, own) is not None}
        moments = {t.name: calibration[t.name].centred() if t.name in centred else calibration[t.name] for t in targets}
    given = None if weight is None else rules.checked_weights(targets, weight)
    total = sum(costs(t.weight) for t in targets)
    rung = budget.ratio
    if costs.cost == "params" and budget.error is None:
        most = math.floor((rung or 0) * total) if budget.cost is None else budget.cost
        rung = min(most / total, 1.0) if rung is None else rung
        _check_smallest(layers, most, costs)
    points = probe_layers(layers, rung, levels, costs, moments, damping, hidden)
    if given is None:
        # Without gradients the outputs of different layers are in different units.
        relative = moments is not None and any(m.outputs is None for m in moments.values())
        given = [1 / p.size if relative and p.size > 0 else 1.0 for p in points]
    found = choose(points, given, budget, costs, total)
    return _allocation(
        model,
        selection,
        found.options,
        budget=found.budget,
        gap=found.gap,
        spent=found.spent,
        unit=costs.unit if budget.error is None else "relative error",
        costs=dict(costs.known),
        error=found.error,
    )


def _check_smallest(layers: list[list[Target]], most: float, costs: Costs) -> None:
    """Raise if the smallest sizes exceed the budget: they are known before anything is projected."""
    least = 0
    for targets in layers:
        sizes = [rungs[0].num_params(*t.shape) for t in targets if (rungs := rules.ladder(t, None, 1))]
        least += min([math.prod(targets[0].shape), *sizes])
    check_least(least, most, costs)


# ---------------------------------------------------------------- arguments
def _structures(config: Any) -> tuple[Configs, dict[int, tuple[Config, ...]]]:
    """One config for each pattern, as :func:`select` takes them, and by its identity all there are to choose from."""
    patterns = dict(config) if isinstance(config, Mapping) else {"*": config}
    firsts: dict[str, Any] = {}
    choices: dict[int, tuple[Config, ...]] = {}
    for pattern, value in patterns.items():
        choice = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not choice or not all(isinstance(c, Config) for c in choice):
            where = f" for {pattern!r}" if isinstance(config, Mapping) else ""
            raise TypeError(
                "config must be a Config such as structmat.MonarchConfig(nblocks=4), a sequence of Configs, or a "
                f"mapping of name patterns to these, got {value!r}{where}"
            )
        firsts[pattern] = copy.copy(choice[0])  # of its own identity, though other patterns may have the same one
        choices[id(firsts[pattern])] = choice
    return firsts, choices


def _check_budget(ratio: Any, max_params: Any, max_seconds: Any, max_error: Any, rule: Any, cost: Any) -> None:
    given = {"ratio": ratio, "max_params": max_params, "max_seconds": max_seconds, "max_error": max_error}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"give exactly one of ratio, max_params, max_seconds and max_error, got {' and '.join(names) or 'none'}"
        )
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("ratio", "max_error") and value is not None and not (number and 0 < value <= 1):
            raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    if max_params is not None:
        check_int("max_params", max_params)
        if cost != "params":
            raise ValueError('max_params counts parameters: cost must be "params"')
    if max_seconds is not None:
        number = isinstance(max_seconds, (int, float)) and not isinstance(max_seconds, bool)
        if not (number and math.isfinite(max_seconds) and max_seconds > 0):
            raise ValueError(f"max_seconds must be a positive finite number, got {max_seconds!r}")
    if rule != "error" and names[0] in ("max_seconds", "max_error"):
        raise ValueError(f'{names[0]} is for the rule "error" only, got {rule!r}')


def _check_rule(rule: Any, weight: Any, cost: Any, calibration: Any, several: bool) -> None:
    if not callable(rule) and rule not in _NAMES:
        raise ValueError(f"rule must be {', '.join(map(repr, _NAMES))} or a function, got {rule!r}")
    if weight is not None and rule not in _NAMES[1:]:
        raise ValueError('weight is for the rules "proportional", "pixelfly" and "error" only')
    if rule == "error":
        return
    if cost != "params":
        raise ValueError(
            'cost is for the rule "error" only; the others divide parameters, by weight where they take it'
        )
    if calibration is not None or several:
        what = "calibration is" if calibration is not None else "several structures to choose from are"
        raise ValueError(f'{what} for the rule "error" only: the others look at no error')


def _size(name: str, module: nn.Module) -> float:
    return float(math.prod(dense_shape(module)))


def _allocation(model: nn.Module, selection: Selection, chosen: list[rules.Option], **values: Any) -> Allocation:
    # Names with brackets or stars, which the keys of an nn.ModuleDict may have, are no patterns.
    configs = {glob.escape(option.row.name): option.config for option in chosen if option.config is not None}
    report = report_of(selection, [option.row for option in chosen], count_params(model), dry_run=True)
    return Allocation(configs, report=report, **values)
