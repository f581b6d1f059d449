"""The multiple-choice knapsack: one option for every item, least error within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Items = list[tuple[NDArray[np.int64], NDArray[np.float64]]]


# How many partial choices to go on with: more only where fewer leave a larger doubt than this share of the sum.
_CAPS, _DOUBT = (20_000, 100_000), 1e-5


def knapsack(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> tuple[list[int], float]:
    """Choose one option of every item so that the sum of errors is least and the sum of costs within the budget.

    Items are added one by one. Of the partial choices only those remain that no other beats in both cost and error,
    and that could still beat the best known complete choice: what the other items add at least is bounded from below
    by the Lagrangian relaxation. Neither rule loses the least sum, up to rounding in float64. The remaining choices are
    few, unless error is nearly the same linear function of cost in all items (weights without any structure); if they
    are more than 100,000, some are dropped, and the smallest bound of these tells how far
    from the least sum the result can be.

    Args:
        costs: of every option of every item, integers.
        errors: as ``costs``, finite and not negative.
        budget: what the costs may sum up to.

    Returns:
        The index of the option of each item, and by which share of itself the sum can be above the least one, at most:
        0 if nothing was dropped.

    Raises:
        ValueError: if the cheapest options exceed the budget.

    Example:
        >>> knapsack([[1, 4], [2, 3]], [[9.0, 0.0], [5.0, 1.0]], budget=6)
        ([1, 0], 0.0)
    """
    items = [
        (np.asarray(c, dtype=np.int64), np.asarray(e, dtype=np.float64)) for c, e in zip(costs, errors, strict=True)
    ]
    cheapest = sum(int(c.min()) for c, _ in items)
    if cheapest > budget:
        raise ValueError(f"the cheapest options cost {cheapest} together, the budget is {budget}")
    best, price = _relaxed(items, budget)
    gap = 0.0
    for cap in _CAPS:
        found, dropped = _search(items, budget, price, _total(items, best), cap)
        if found is not None:
            best = min(best, _fill(items, found, budget), key=lambda choice: _total(items, choice))
        least = _total(items, best)
        gap = max(0.0, 1 - dropped / least) if least > 0 else 0.0
        if gap <= _DOUBT:
            break
    return best, gap


def _total(items: Items, choice: list[int]) -> float:
    return sum(float(e[k]) for (_, e), k in zip(items, choice, strict=True))


def _search(items: Items, budget: int, price: float, most: float, cap: int) -> tuple[list[int] | None, float]:
    """A choice that is the best if there is one below ``most``, and the smallest bound of what was dropped."""
    # What the items from i on cost and lose at least: cheapest options, and the relaxation's minimum at this price.
    rest_cost = np.cumsum([0, *(int(c.min()) for c, _ in reversed(items))])[::-1]
    rest_value = np.cumsum([0.0, *(float((e + price * c).min()) for c, e in reversed(items))])[::-1]
    cost, error, dropped = np.zeros(1, dtype=np.int64), np.zeros(1), math.inf
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for i, (c, e) in enumerate(items):
        costs, errors = (cost[:, None] + c).ravel(), (error[:, None] + e).ravel()
        bound = errors + rest_value[i + 1] - price * (budget - costs)
        alive = np.flatnonzero((costs + rest_cost[i + 1] <= budget) & (bound < most))
        if not alive.size:
            return None, dropped
        alive = alive[np.lexsort((errors[alive], costs[alive]))]
        best = np.minimum.accumulate(errors[alive])
        alive = alive[np.concatenate([[True], errors[alive][1:] < best[:-1]])]
        if alive.size > cap:
            # The smallest bounds and, where bounds are all alike, every so many of the others in order of cost.
            kept = np.zeros(alive.size, dtype=bool)
            kept[np.argpartition(bound[alive], cap // 2)[: cap // 2]] = True
            kept[np.linspace(0, alive.size - 1, cap // 2).astype(np.intp)] = True
            dropped = min(dropped, float(bound[alive[~kept]].min(initial=math.inf)))
            alive = alive[kept]
        cost, error = costs[alive], errors[alive]
        steps.append((alive // len(c), alive % len(c)))
    state, chosen = int(np.argmin(error)), []
    for parents, options in reversed(steps):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return chosen[::-1], dropped


def _relaxed(items: Items, budget: int) -> tuple[list[int], float]:
    """A choice within the budget, made at one price for a unit of cost and then filled up; and the price."""

    def choose(price: float) -> list[int]:
        return [int(np.lexsort((c, e + price * c))[0]) for c, e in items]

    def total(choice: list[int]) -> int:
        return sum(int(c[k]) for (c, _), k in zip(items, choice, strict=True))

    low, high = 0.0, 1e-30
    if total(best := choose(0.0)) <= budget:
        return best, 0.0
    cheapest = [int(np.lexsort((e, c))[0]) for c, e in items]
    while total(choice := choose(high)) > budget:
        low, high = high, 4 * high
        if high > 1e300:  # rounding hides the costs
            choice = cheapest
            break
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if total(choose(middle)) > budget:
            low = middle
        else:
            high, choice = middle, choose(middle)
    return _fill(items, choice, budget), high


def _fill(items: Items, choice: list[int], budget: int) -> list[int]:
    """Spend what is left of the budget where a single change of an option has less error."""
    choice = list(choice)
    left, improved = budget - sum(int(c[k]) for (c, _), k in zip(items, choice, strict=True)), True
    while improved:
        improved = False
        for i, (c, e) in enumerate(items):
            fits = np.flatnonzero(c - c[choice[i]] <= left)
            k = int(fits[np.argmin(e[fits])])
            if e[k] < e[choice[i]]:
                left, choice[i], improved = left - int(c[k] - c[choice[i]]), k, True
    return choice
