"""How to share a budget of parameters among the linear layers of a model."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from structmat.config import BudgetError, Config, project
from structmat.projection.truncated import work_dtype
from structmat.surgery.knapsack import knapsack
from structmat.surgery.replace import _check_values, _report, _row
from structmat.surgery.report import LayerRow, Report, share
from structmat.surgery.selection import Configs, FilterFn, Selection, Target, count_params, dense_shape, select

Rule = Callable[[dict[str, tuple[int, int]], int], Mapping[str, int]]
WeightFn = Callable[[str, nn.Module], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation(Mapping[str, Config]):
    """Configs by layer names, for ``compress_`` and ``replace_``; what stays dense is not among them.

    Attributes:
        configs: a config with ``max_params`` for every layer that is to be replaced, by pattern of its name.
        budget: in parameters, for all selected layers.
        report: sizes and costs of every layer, with errors where they were computed; printed and drawn by this class.
        gap: of the rule "error": by which share of itself the sum of squared errors can be above the least one, at
            most. 0 says that it is the least.
    """

    configs: dict[str, Config]
    budget: int
    report: Report
    gap: float = 0.0

    def __getitem__(self, name: str) -> Config:
        return self.configs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def params(self) -> int:
        """Parameters of all selected layers, at most ``budget``."""
        return self.report.params_after

    @property
    def unused(self) -> int:
        """What is left of the budget."""
        return self.budget - self.params

    def __str__(self) -> str:
        left = f"{self.unused:,} unused ({share(self.unused, self.budget)})"
        doubt = f"\nthe sum of squared errors is within {self.gap:.1e} of the least" if self.gap else ""
        return f"{self.report.table()}\nbudget: {self.budget:,} parameters, {left}{doubt}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw parameters before and after of every selected layer, and errors where they were computed.

        Args:
            path: an image file; its suffix gives the format.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        self.report.plot(path)


@dataclasses.dataclass(frozen=True)
class _Option:
    """One size of a layer: its config (None to stay dense), parameters, squared error, and the row of the report."""

    config: Config | None
    params: int
    loss: float
    row: LayerRow


def allocate(
    model: nn.Module,
    ratio: float,
    config: Configs,
    rule: str | Rule = "equal",
    filter_fn: FilterFn | None = None,
    weight: WeightFn | None = None,
    levels: int = 8,
) -> Allocation:
    """Share ``ratio`` of the parameters of the linear layers' weights among these layers; the model is not changed.

    The layers are those that :func:`compress_` would replace. Together they have m_1 n_1 + m_2 n_2 + ... parameters
    (biases apart); the budget B is ``ratio`` of that, rounded down, and is never exceeded. The rules:

    - "equal": every layer has the budget ``ratio * m * n``, rounded down. What a layer cannot use of it stays unused.
    - "proportional": every layer, and so every type of layers, has the share of B that it has of the dense cost, as in
      Pixelated Butterfly (Chen, Dao et al. 2021: if the MLP layers take 60 % of the time and attention
      40 %, so they do of the budget). ``weight`` gives each layer's cost, measured or computed, in any unit; by default
      it is the number of parameters. No layer gets more than its dense size: the others share the rest. What a layer
      cannot use passes to those that follow in the model's order.
    - "error": the choice of sizes with the least sum of squared errors ``weight * |W - M|_F^2`` (1 by default) within
      B. Every layer is projected at several budgets: a geometric ladder from the least that the structure can meet to
      the dense size, and ``ratio * m * n``, so that the sum is never above that of "equal". To stay dense is one of
      the choices. Which is best is a multiple-choice knapsack, solved exactly by merging
      Pareto fronts (see ``gap`` of :class:`Allocation` for the exception).
    - a function of the layers' shapes ``{name: (out, in)}`` and B, which returns parameters by name. A layer that it
      leaves out stays dense, at its dense cost.

    Args:
        model: any module that contains linear layers.
        ratio: in (0, 1].
        config: a config, or a mapping of patterns to configs, as for :func:`compress_`. Budgets in it are replaced.
        rule: one of the above.
        filter_fn: called with name and module; layers for which it returns false do not take part.
        weight: called with name and module; returns a positive number. Only for "proportional" and "error".
        levels: of the ladder, for "error"; so many projections of every layer, or fewer.

    Returns:
        Configs by name, with a report.

    Raises:
        structmat.BudgetError: if a layer cannot meet its budget, or, for "error", all layers together cannot meet B;
            or if a function spends more than B.
        TypeError: if an argument has the wrong type.
        ValueError: if nothing is to be replaced, the rule is unknown, a number is out of range, a config fixes a size
            besides the budget, or a weight is on the meta device or not finite (for "error").

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
    """
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a number in (0, 1], got {ratio!r}")
    if not callable(rule) and rule not in ("equal", "proportional", "error"):
        raise ValueError(f'rule must be "equal", "proportional", "error" or a function, got {rule!r}')
    if weight is not None and rule not in ("proportional", "error"):
        raise ValueError('weight is for the rules "proportional" and "error" only')
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    selection = select(model, config, filter_fn)
    targets = selection.targets
    budget = math.floor(ratio * sum(math.prod(t.shape) for t in targets))
    for target in targets:
        _with_budget(target, 1)
    gap = 0.0
    if rule == "equal":
        chosen = _meet({t.name: math.floor(ratio * math.prod(t.shape)) for t in targets}, targets)
    elif rule == "proportional":
        chosen = _proportional(targets, budget, _weights(targets, weight or _size))
    elif rule == "error":
        _check_values(selection)
        chosen, gap = _least_error(targets, budget, ratio, _weights(targets, weight or (lambda *_: 1.0)), levels)
    else:
        chosen = _by_function(rule, targets, budget)
    return _allocation(model, selection, chosen, budget, gap)


# ---------------------------------------------------------------- the rules
def _proportional(targets: list[Target], budget: int, cost: list[float]) -> list[_Option]:
    sizes, shares, free, rest = [math.prod(t.shape) for t in targets], {}, set(range(len(targets))), float(budget)
    while free:
        total = sum(cost[i] for i in free)
        full = {i for i in free if rest * cost[i] / total >= sizes[i]}
        shares |= {i: float(sizes[i]) for i in full} if full else {i: rest * cost[i] / total for i in free}
        rest, free = rest - sum(sizes[i] for i in full), free - full if full else set()
    chosen, due, spent = [], 0.0, 0
    for i, target in enumerate(targets):
        due += shares[i]
        most = min(math.floor(due + 1e-6), budget) - spent  # shares are rounded; the budget is not
        chosen.append(_dense(target) if most >= sizes[i] else _meet({target.name: most}, [target])[0])
        spent += chosen[-1].params
    return chosen


def _least_error(
    targets: list[Target], budget: int, ratio: float, weights: list[float], levels: int
) -> tuple[list[_Option], float]:
    # The smallest sizes are known before anything is projected.
    ladders = [_ladder(target, ratio, levels) for target in targets]
    least = sum(
        ladder[0].num_params(*t.shape) if ladder else math.prod(t.shape)
        for t, ladder in zip(targets, ladders, strict=True)
    )
    if least > budget:
        raise BudgetError(
            f"the selected layers need at least {least} parameters, the budget is {budget}; raise ratio, or exclude "
            "layers with filter_fn"
        )
    options: list[list[_Option]] = []
    for target, ladder, weight in zip(tqdm(targets, "allocating", disable=None), ladders, weights, strict=True):
        size, found = (
            float(torch.linalg.vector_norm(target.weight, dtype=work_dtype(target.weight)).real) ** 2,
            [_dense(target, error=0.0)],
        )
        for config in ladder:
            result = project(target.weight, config)
            row = _row(target, result.matrix, result)
            found.append(_Option(config, row.params_after, weight * result.error**2 * size, row))
        options.append(found)
    best, gap = knapsack(
        [[o.params for o in group] for group in options], [[o.loss for o in group] for group in options], budget
    )
    return [group[k] for group, k in zip(options, best, strict=True)], gap


def _by_function(rule: Any, targets: list[Target], budget: int) -> list[_Option]:
    sizes = dict(rule({t.name: t.shape for t in targets}, budget))
    if unknown := sorted(set(sizes) - {t.name for t in targets}):
        raise ValueError(f"rule returned names that are not among the selected layers: {', '.join(map(str, unknown))}")
    options = iter(_meet(sizes, [t for t in targets if t.name in sizes]))
    chosen = [next(options) if t.name in sizes else _dense(t) for t in targets]
    if (spent := sum(option.params for option in chosen)) > budget:
        raise BudgetError(f"rule spends {spent} parameters, the budget is {budget}")
    return chosen


# ---------------------------------------------------------------- sizes
def _with_budget(target: Target, params: int) -> Config:
    try:
        return dataclasses.replace(target.config, max_params=params, ratio=None)
    except ValueError as error:
        raise ValueError(f"the config of {target.name} must leave its size to allocate: {error}") from error


def _meet(budgets: Mapping[str, int], targets: list[Target]) -> list[_Option]:
    """The largest matrices within budgets; one error names all layers that cannot meet theirs."""
    chosen, problems = [], []
    for target in targets:
        try:
            params = budgets[target.name]
            if params < 1:
                raise BudgetError(f"its budget is {params}")
            config = _with_budget(target, params)
            sketch = config.random(target.shape, dtype=target.weight.dtype, device="meta")
            chosen.append(_Option(config, sketch.num_params, 0.0, _row(target, sketch)))
            if sketch.num_params > params:
                raise BudgetError(f"{config.structure} took {sketch.num_params} parameters, the budget is {params}")
        except ValueError as error:
            problems.append(f"  {target.name}: {error}")
    if problems:
        raise BudgetError(
            f"{len(problems)} of {len(targets)} layers cannot meet their budget. Raise ratio, exclude them with "
            'filter_fn, or use rule="error", which may keep layers dense:\n' + "\n".join(problems)
        )
    return chosen


def _dense(target: Target, error: float | None = None) -> _Option:
    size = math.prod(target.shape)
    row = LayerRow(target.name, "dense", target.shape, size, size, 2 * size, 2 * size, error, error)
    return _Option(None, size, 0.0, row)


def _ladder(target: Target, ratio: float, levels: int) -> list[Config]:
    """Configs of different sizes below the dense one, the smallest first; none if there are none."""
    m, n = target.shape
    dense = m * n

    def size(params: int) -> int | None:
        try:
            return _with_budget(target, params).num_params(m, n)
        except ValueError:
            return None

    low, high = 0, dense - 1
    if high < 1 or size(high) is None:
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) is None else (low, middle)
    rungs = [round(high * (dense / high) ** (i / levels)) for i in range(levels)] + [math.floor(ratio * dense)]
    found: dict[int, Config] = {}
    for rung in sorted(rungs):
        params = size(rung) if high <= rung < dense else None
        if params is not None and params < dense:
            found.setdefault(params, _with_budget(target, rung))
    return list(found.values())


def _size(name: str, module: nn.Module) -> float:
    return float(math.prod(dense_shape(module)))


def _weights(targets: list[Target], weight: WeightFn) -> list[float]:
    values = []
    for target in targets:
        value = float(weight(target.name, target.module))
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"weight must return a positive finite number, got {value} for {target.name}")
        values.append(value)
    return values


def _allocation(model: nn.Module, selection: Selection, chosen: list[_Option], budget: int, gap: float) -> Allocation:
    # Names with brackets or stars, which the keys of an nn.ModuleDict may have, are no patterns.
    configs = {glob.escape(option.row.name): option.config for option in chosen if option.config is not None}
    report = _report(selection, [option.row for option in chosen], count_params(model), dry_run=True)
    return Allocation(configs, budget, report, gap)
