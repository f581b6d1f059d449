"""How to share a budget of parameters among the linear layers of a model."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from structmat.config import Config
from structmat.surgery import rules
from structmat.surgery.costs import Cost, Costs
from structmat.surgery.replace import _check_values, _report
from structmat.surgery.report import Report, share
from structmat.surgery.rules import WeightFn
from structmat.surgery.selection import Configs, FilterFn, Selection, count_params, dense_shape, select

Rule = Callable[[dict[str, tuple[int, int]], int], Mapping[str, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation(Mapping[str, Config]):
    """Configs by layer names, for ``compress_`` and ``replace_``; what stays dense is not among them.

    Attributes:
        configs: a config of fixed size or budget for every layer that is to be replaced, by pattern of its name.
        budget: in parameters, or in what the rule "error" was given as ``cost``, for all selected layers.
        report: sizes and costs of every layer, with errors where they were computed; printed and drawn by this class.
        gap: of the rule "error": by which share of itself the sum of squared errors can be above the least one, at
            most. 0 says that it is the least.
        spent: of the budget.
        unit: of budget and ``spent``: "parameters", "seconds", or "cost" for costs that were passed in.
        costs: what each size of each layer costs, by words, where that was measured or passed in. Given to
            :func:`allocate` as ``cost``, they give the same plan again.
    """

    configs: dict[str, Config]
    budget: float
    report: Report
    gap: float = 0.0
    spent: float = 0.0
    unit: str = "parameters"
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Config:
        return self.configs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def params(self) -> int:
        """Parameters of all selected layers."""
        return self.report.params_after

    @property
    def unused(self) -> float:
        """What is left of the budget."""
        return self.budget - self.spent

    def __str__(self) -> str:
        budget, unused = (f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for x in (self.budget, self.unused))
        left = f"{unused} unused ({share(self.unused, self.budget)})"
        doubt = f"\nthe sum of squared errors is within {self.gap:.1e} of the least" if self.gap else ""
        return f"{self.report.table()}\nbudget: {budget} {self.unit}, {left}{doubt}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw parameters before and after of every selected layer, and errors where they were computed.

        Args:
            path: an image file; its suffix gives the format.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        self.report.plot(path)


def allocate(
    model: nn.Module,
    ratio: float,
    config: Configs,
    rule: str | Rule = "equal",
    filter_fn: FilterFn | None = None,
    weight: WeightFn | None = None,
    levels: int = 8,
    cost: Cost = "params",
    rows: int = 1024,
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
    - "pixelfly", for :class:`structmat.PixelflyConfig`: shares as in "proportional", and in each of them the paper's
      division. The low rank takes a quarter to a third, with a rank that is a multiple of the block's smaller side
      (where no multiple does, one that comes nearest), and the rest sets the largest stride. What a layer cannot use
      passes on as above: beyond the largest stride of its size nothing grows.
    - "error": the choice of sizes with the least sum of squared errors ``weight * |W - M|_F^2`` (1 by default) within
      B, which is counted in ``cost``. Every layer is projected at several budgets: a geometric ladder from the least
      that the structure can meet to the dense size, and ``ratio * m * n``, so that the sum is never above that of
      "equal" (if parameters are counted). To stay dense is one of the choices. Which is best is a multiple-choice
      knapsack, solved exactly by merging Pareto fronts (see ``gap`` of :class:`Allocation` for the exception).
    - a function of the layers' shapes ``{name: (out, in)}`` and B, which returns parameters by name. A layer that it
      leaves out stays dense, at its dense cost.

    Args:
        model: any module that contains linear layers.
        ratio: in (0, 1].
        config: a config, or a mapping of patterns to configs, as for :func:`compress_`. Budgets in it are replaced.
        rule: one of the above.
        filter_fn: called with name and module; layers for which it returns false do not take part.
        weight: called with name and module; returns a positive number. For "proportional", "pixelfly" and "error".
        levels: of the ladder, for "error"; so many projections of every layer, or fewer.
        cost: for "error", what the budget counts: B is ``ratio`` of the cost of all dense layers. "params"; "time" for
            the seconds of a forward product, measured by :func:`measure_seconds` for every size on the weights'
            device; a function of a weight (out, in), a tensor or a structured matrix, that returns a positive number;
            or the ``costs`` of another allocation, which makes the result independent of new measurements.
        rows: how many inputs at a time, for "time".

    Returns:
        Configs by name, with a report.

    Raises:
        structmat.BudgetError: if a layer cannot meet its budget, or, for "error", all layers together cannot meet B;
            or if a function spends more than B.
        TypeError: if an argument has the wrong type, or a config is no PixelflyConfig for "pixelfly".
        ValueError: if nothing is to be replaced, the rule is unknown, a number is out of range, a config fixes a size
            besides the budget, a cost is missing, or a weight is on the meta device or not finite (for "error").

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
    names = ("equal", "proportional", "pixelfly", "error")
    if not callable(rule) and rule not in names:
        raise ValueError(f"rule must be {', '.join(map(repr, names))} or a function, got {rule!r}")
    if weight is not None and rule not in names[1:]:
        raise ValueError('weight is for the rules "proportional", "pixelfly" and "error" only')
    if cost != "params" and rule != "error":
        raise ValueError(
            'cost is for the rule "error" only; the others divide parameters, by weight where they take it'
        )
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    costs = Costs(cost, rows)
    selection = select(model, config, filter_fn)
    targets = selection.targets
    budget: float = math.floor(ratio * sum(math.prod(t.shape) for t in targets))
    gap = 0.0
    if rule == "pixelfly":
        rules.check_pixelfly(targets)
    for target in targets:
        rules.with_budget(target, 1)
    if rule == "equal":
        chosen = rules.meet({t.name: math.floor(ratio * math.prod(t.shape)) for t in targets}, targets)
    elif rule == "proportional":
        chosen = rules.proportional(targets, budget, rules.checked_weights(targets, weight or _size))
    elif rule == "pixelfly":
        share_of = rules.checked_weights(targets, weight or _size)
        chosen = rules.proportional(targets, budget, share_of, rules.low_rank_and_stride)
    elif rule == "error":
        _check_values(selection)
        worth = rules.checked_weights(targets, weight or (lambda *_: 1.0))
        chosen, budget, gap = rules.least_error(targets, ratio, worth, levels, costs)
    else:
        chosen = rules.by_function(rule, targets, budget)
    return _allocation(model, selection, chosen, budget, gap, costs)


def _size(name: str, module: nn.Module) -> float:
    return float(math.prod(dense_shape(module)))


def _allocation(
    model: nn.Module, selection: Selection, chosen: list[rules.Option], budget: float, gap: float, costs: Costs
) -> Allocation:
    # Names with brackets or stars, which the keys of an nn.ModuleDict may have, are no patterns.
    configs = {glob.escape(option.row.name): option.config for option in chosen if option.config is not None}
    report = _report(selection, [option.row for option in chosen], count_params(model), dry_run=True)
    return Allocation(configs, budget, report, gap, sum(o.cost for o in chosen), costs.unit, dict(costs.known))
