"""The rules of :func:`structmat.surgery.allocate`: which size each layer gets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from structmat.config import BudgetError, Config
from structmat.config_block_sparse import strides
from structmat.config_pixelfly import PixelflyConfig
from structmat.surgery.replace import row_of
from structmat.surgery.report import LayerRow
from structmat.surgery.selection import Target

WeightFn = Callable[[str, nn.Module], float]
Fit = Callable[[Target, int], Config]


@dataclasses.dataclass(frozen=True)
class Option:
    """One size of a layer: its config (None to stay dense), parameters, squared error, the row of the report, and cost.

    The cost is the number of parameters, but where the rule "error" spends something else.
    """

    config: Config | None
    params: int
    loss: float
    row: LayerRow
    cost: float


def proportional(targets: list[Target], budget: float, cost: list[float], fit: Fit | None = None) -> list[Option]:
    """Shares of the budget by the cost of the dense layers; what a layer does not use passes to the next.

    Args:
        targets: the layers.
        budget: in parameters.
        cost: of each dense layer.
        fit: the config of a layer for a budget; by default the one with that budget.
    """
    sizes, shares, free, rest = [math.prod(t.shape) for t in targets], {}, set(range(len(targets))), float(budget)
    while free:
        total = sum(cost[i] for i in free)
        full = {i for i in free if rest * cost[i] / total >= sizes[i]}
        shares |= {i: float(sizes[i]) for i in full} if full else {i: rest * cost[i] / total for i in free}
        rest, free = rest - sum(sizes[i] for i in full), free - full if full else set()
    chosen, due, spent = [], 0.0, 0
    for i, target in enumerate(targets):
        due += shares[i]
        most = int(min(math.floor(due + 1e-6), budget)) - spent  # shares are rounded; the budget is not
        chosen.append(dense(target) if most >= sizes[i] else meet({target.name: most}, [target], fit)[0])
        spent += chosen[-1].params
    return chosen


def low_rank_and_stride(target: Target, params: int) -> Config:
    """The rule of Pixelated Butterfly for one layer: low rank from a quarter to a third, the rest sets the stride.

    The rank is a multiple of the block's smaller side. Of ranks and strides that fit, those count whose low rank has a
    share of the budget in or next to these bounds, and of them the one that spends most.

    Raises:
        structmat.BudgetError: if the smallest stride and rank exceed the budget.
    """
    config, (m, n) = target.config, target.shape
    assert isinstance(config, PixelflyConfig)
    step, smallest, best = None, 0, None
    for stride, layout in strides(m, n, config.block):
        step = step or min(layout.block)
        smallest = smallest or layout.num_params + step * (m + n) + 1
        left = params - 1 - layout.num_params
        for rank in range(step, min(left // (m + n), m, n) + 1, step):
            low = rank * (m + n)
            key = max(0.25 - low / params, low / params - 1 / 3, 0.0), -(low + layout.num_params)
            if best is None or key < best[0]:
                best = key, stride, rank
    if best is None:
        raise BudgetError(
            f"the rule needs at least {smallest} parameters for a {m} x {n} matrix, the diagonal blocks and a rank of "
            f"{step}; the budget is {params}. Take smaller blocks"
        )
    return dataclasses.replace(config, max_params=None, ratio=None, max_stride=best[1], rank=best[2])


def check_pixelfly(targets: list[Target]) -> None:
    """Raise unless all configs leave the rule "pixelfly" stride and rank to choose."""
    for target in targets:
        config = target.config
        if not isinstance(config, PixelflyConfig):
            raise TypeError(f'rule="pixelfly" needs a PixelflyConfig, got {type(config).__name__} for {target.name}')
        if config.max_stride is not None or config.rank is not None or config.pattern != "flat_butterfly":
            raise ValueError(
                f'rule="pixelfly" chooses max_stride and rank of flat butterflies: the config of {target.name} must '
                f"leave them, got {config}"
            )


def by_function(rule: Any, targets: list[Target], budget: float) -> list[Option]:
    """What a function of shapes and budget says; the others stay dense."""
    sizes = dict(rule({t.name: t.shape for t in targets}, budget))
    if unknown := sorted(set(sizes) - {t.name for t in targets}):
        raise ValueError(f"rule returned names that are not among the selected layers: {', '.join(map(str, unknown))}")
    options = iter(meet(sizes, [t for t in targets if t.name in sizes]))
    chosen = [next(options) if t.name in sizes else dense(t) for t in targets]
    if (spent := sum(option.params for option in chosen)) > budget:
        raise BudgetError(f"rule spends {spent} parameters, the budget is {budget}")
    return chosen


# ---------------------------------------------------------------- sizes
def with_budget(target: Target, params: int) -> Config:
    """The config of a layer with this budget; raise if it fixes a size besides."""
    try:
        return dataclasses.replace(target.config, max_params=params, ratio=None)
    except ValueError as error:
        raise ValueError(f"the config of {target.name} must leave its size to allocate: {error}") from error


def meet(budgets: Mapping[str, int], targets: list[Target], fit: Fit | None = None) -> list[Option]:
    """The largest matrices within budgets; one error names all layers that cannot meet theirs."""
    chosen, problems = [], []
    for target in targets:
        try:
            params = budgets[target.name]
            if params < 1:
                raise BudgetError(f"its budget is {params}")
            config = (fit or with_budget)(target, params)
            sketch = config.random(target.shape, dtype=target.weight.dtype, device="meta")
            chosen.append(Option(config, sketch.num_params, 0.0, row_of(target, sketch), sketch.num_params))
            if sketch.num_params > params:
                raise BudgetError(f"{config.structure} took {sketch.num_params} parameters, the budget is {params}")
        except ValueError as error:
            problems.append(f"  {target.name}: {error}")
    if problems:
        raise BudgetError(
            f"{len(problems)} of {len(targets)} layers cannot meet their budget. Raise it, exclude them with "
            'filter_fn, or use rule="error", which may keep layers dense:\n' + "\n".join(problems)
        )
    return chosen


def dense(target: Target, error: float | None = None) -> Option:
    """A layer as it is."""
    size = math.prod(target.shape)
    row = LayerRow(target.name, "dense", target.shape, size, size, 2 * size, 2 * size, error, error)
    return Option(None, size, 0.0, row, size)


def ladder(target: Target, ratio: float | None, levels: int) -> list[Config]:
    """Configs of different sizes below the dense one, the smallest first; none if there are none."""
    m, n = target.shape
    whole = m * n

    def size(params: int) -> int | None:
        try:
            return with_budget(target, params).num_params(m, n)
        except ValueError:
            return None

    low, high = 0, whole - 1
    if high < 1 or size(high) is None:
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) is None else (low, middle)
    rungs = [round(high * (whole / high) ** (i / levels)) for i in range(levels)]
    rungs += [] if ratio is None else [math.floor(ratio * whole)]
    found: dict[int, Config] = {}
    for rung in sorted(rungs):
        params = size(rung) if high <= rung < whole else None
        if params is not None and params < whole:
            found.setdefault(params, with_budget(target, rung))
    return list(found.values())


def checked_weights(targets: list[Target], weight: WeightFn | Mapping[str, float]) -> list[float]:
    """The function's or the mapping's values for all layers; raise unless they are positive."""
    if isinstance(weight, Mapping) and (missing := [t.name for t in targets if t.name not in weight]):
        raise ValueError(f"weight has no {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}")
    values = []
    for target in targets:
        value = float(weight[target.name] if isinstance(weight, Mapping) else weight(target.name, target.module))
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"weight must be a positive finite number, got {value} for {target.name}")
        values.append(value)
    return values
