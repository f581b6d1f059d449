"""What :func:`structmat.surgery.allocate` decided, and its file.

The file is JSON: ``{"format": "structmat.plan", "version": 1, "configs": {pattern: config}, "budget", "spent", "unit",
"gap", "error", "costs", "report"}``, in which the report has names and shapes of the layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from structmat.config import Config, config_from_dict
from structmat.surgery.atomic import atomic_write
from structmat.surgery.report import Report, share
from structmat.surgery.selection import dense_shape, is_linear_like, module_names

_FORMAT, _VERSION = "structmat.plan", 1
_NUMBERS = ("budget", "spent", "unit", "gap", "error")


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation(Mapping[str, Config]):
    """Configs by layer names, for ``compress_`` and ``replace_``; what stays dense is not among them.

    Attributes:
        configs: a config of fixed size or budget for every layer that is to be replaced, by pattern of its name.
        budget: in ``unit``, for all selected layers.
        report: sizes and costs of every layer, with errors where they were computed; printed and drawn by this class.
        gap: of the rule "error": by which share of itself the sum of squared errors (of ``max_error``: the cost) can be
            above the least one, at most. 0 says that it is the least.
        spent: of the budget.
        unit: of budget and ``spent``: "parameters", "seconds", "cost" for costs that were passed in, or "relative
            error".
        costs: what each size of each layer costs, by words, where that was measured or passed in. Given to
            :func:`allocate` as ``cost``, they give the same plan again.
        error: of the rule "error": the relative error of all layers together, by weight; see ``max_error`` of
            :func:`allocate`. Else None.

    Example:
        >>> import os, tempfile, torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128))
        >>> plan = surgery.allocate(model, 0.5, structmat.MonarchConfig(nblocks=2))
        >>> path = os.path.join(tempfile.mkdtemp(), "plan.json")
        >>> plan.save(path)
        >>> surgery.compress_(model, surgery.Allocation.load(path)).params_after
        5888
        >>> surgery.compress_(torch.nn.Sequential(torch.nn.Linear(64, 32)), plan)
        Traceback (most recent call last):
            ...
        ValueError: this is a plan for another model, nothing was changed:
          0: 64 x 64 in the plan, 32 x 64 in the model
          1: not in the model
    """

    configs: dict[str, Config]
    budget: float
    report: Report
    gap: float = 0.0
    spent: float = 0.0
    unit: str = "parameters"
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: float | None = None

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
        what = "cost" if self.unit == "relative error" else "sum of squared errors"
        doubt = f"\nthe {what} is within {self.gap:.1e} of the least" if self.gap else ""
        return f"{self.report.table()}\nbudget: {budget} {self.unit}, {left}{doubt}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw parameters before and after of every selected layer, and errors where they were computed.

        Args:
            path: an image file; its suffix gives the format.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        self.report.plot(path)

    def check(self, model: nn.Module) -> None:
        """Raise unless the model has all layers of the plan, dense ones among them, in the plan's shapes.

        Raises:
            ValueError: if it has not; layers that differ are named.
        """
        modules = {name: module for module, names in module_names(model).items() for name in names}
        problems = []
        for row in self.report.compressed:
            module = modules.get(row.name)
            if module is None:
                problems.append(f"{row.name}: not in the model")
            elif not is_linear_like(module):
                problems.append(f"{row.name}: a linear layer in the plan, {type(module).__name__} in the model")
            elif (found := dense_shape(module)) != row.shape:
                (a, b), (c, d) = row.shape, found
                problems.append(f"{row.name}: {a} x {b} in the plan, {c} x {d} in the model")
        if problems:
            more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise ValueError(
                "this is a plan for another model, nothing was changed:\n  " + "\n  ".join(problems[:8] + more)
            )

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        data = {"format": _FORMAT, "version": _VERSION} | {name: getattr(self, name) for name in _NUMBERS}
        data["configs"] = {name: config.to_dict() for name, config in self.configs.items()}
        data |= {"costs": dict(self.costs), "report": json.loads(self.report.to_json())}
        with atomic_write(path) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, no plan, or of an unknown version.
        """
        with open(path, "rb") as file:
            text = file.read()
        try:
            data: Any = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != _FORMAT:
                raise ValueError(f"it has no format {_FORMAT!r}")
            if data.get("version") != _VERSION:
                raise ValueError(f"it is of version {data.get('version')!r}, this structmat reads {_VERSION}")
            numbers = {name: data[name] for name in _NUMBERS}
            for name in ("budget", "spent", "gap"):
                if isinstance(numbers[name], bool) or not isinstance(numbers[name], (int, float)):
                    raise TypeError(f"{name} is no number: {numbers[name]!r}")
            configs = {str(name): config_from_dict(config) for name, config in data["configs"].items()}
            costs = {str(key): float(value) for key, value in data["costs"].items()}
            return cls(configs, report=Report.from_json(json.dumps(data["report"])), costs=costs, **numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a plan that can be read: {what}") from error
