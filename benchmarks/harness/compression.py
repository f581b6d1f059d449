"""Ways to compress the linear layers of a model to a share of their parameters, with one signature to compare them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.baselines import METHODS
from structmat import Config, LowRankConfig, MonarchConfig, PivotedLowRankConfig, SumConfig, surgery
from structmat.base import StructuredMatrix


@dataclasses.dataclass
class Problem:
    """A dense model, what was learnt of it on data, and how much of its linear layers may stay.

    Attributes:
        model: dense; never changed.
        pattern: of the names of the layers.
        batches: of the calibration.
        calibration: made of them, with the moments of output gradients where ``gradients`` says so.
        sensitivities: the layers' weights in an allocation, or None to take those that the gradients imply.
        ratio: share of the parameters of all layers.
    """

    model: nn.Module
    pattern: str
    batches: list[Any]
    calibration: surgery.Calibration
    sensitivities: dict[str, float] | None
    ratio: float

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers of a model by name: those that the calibration has, tied ones apart."""
        import fnmatch

        found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in self.calibration}
        return {n: m for n, m in found.items() if fnmatch.fnmatchcase(n, self.pattern)}


Method = Callable[[Problem], tuple[nn.Module, int]]
"""The compressed model, and the parameters of the layers' weights in it."""


def baseline(name: str) -> Method:
    """A method of the literature, layer by layer at equal shares; biases stay as they are."""

    @torch.no_grad()
    def run(problem: Problem) -> tuple[nn.Module, int]:
        model, params = copy.deepcopy(problem.model), 0
        for layer_name, layer in problem.layers(model).items():
            weight = layer.weight
            found = METHODS[name](weight, problem.calibration[layer_name], int(problem.ratio * weight.numel()))
            params += found.num_params if isinstance(found, StructuredMatrix) else int((found != 0).sum())
            dense = found.to_dense() if isinstance(found, StructuredMatrix) else found
            weight.copy_(dense)
        return model, params

    return run


def uniform(make: Callable[[float], Config], calibrated: bool = True, compensate: bool = False) -> Method:
    """One structure for all layers, each at the same share."""

    def run(problem: Problem) -> tuple[nn.Module, int]:
        model = copy.deepcopy(problem.model)
        report = surgery.compress_(
            model,
            {problem.pattern: make(problem.ratio)},
            lambda name, _: name in problem.calibration,
            calibration=problem.calibration if calibrated else None,
            compensate=problem.batches if compensate else None,
            progress=False,
        )
        return model, report.params_after

    return run


def allocated(makes: list[Callable[[float], Config]], compensate: bool = False) -> Method:
    """Structures and sizes chosen by ``surgery.allocate``."""

    def run(problem: Problem) -> tuple[nn.Module, int]:
        model = copy.deepcopy(problem.model)
        plan = surgery.allocate(
            model,
            problem.ratio,
            {problem.pattern: [make(problem.ratio) for make in makes]},
            rule="error",
            filter_fn=lambda name, _: name in problem.calibration,
            calibration=problem.calibration,
            weight=problem.sensitivities,
        )
        surgery.compress_(
            model,
            plan,
            calibration=problem.calibration,
            compensate=problem.batches if compensate else None,
            progress=False,
        )
        return model, plan.params

    return run


def low_rank(ratio: float) -> Config:
    """Low rank."""
    return LowRankConfig(ratio=ratio)


def pivoted(ratio: float) -> Config:
    """Low rank by pivots."""
    return PivotedLowRankConfig(ratio=ratio)


def monarch(nblocks: int) -> Callable[[float], Config]:
    """Monarch of so many blocks."""
    return lambda ratio: MonarchConfig(nblocks=nblocks, ratio=ratio)


def with_low_rank(ratio: float) -> Config:
    """Monarch of four blocks with three quarters of the budget, and low rank."""
    return SumConfig((MonarchConfig(nblocks=4, ratio=1), LowRankConfig(ratio=1)), (3, 1), ratio=ratio)


#: Pixelfly takes longer to fit at several sizes than all of these together.
SEVERAL = [low_rank, monarch(2), monarch(4), with_low_rank]

#: By the name that the tables give them, in their order.
ALTERNATIVES: dict[str, Method] = {
    **{name: baseline(name) for name in METHODS},
    "Monarch, plain": uniform(monarch(4), calibrated=False),
    "low rank, calibrated": uniform(low_rank),
    "pivoted low rank, calibrated": uniform(pivoted),
    "Monarch, calibrated": uniform(monarch(4)),
    "Monarch + low rank, calibrated": uniform(with_low_rank),
    "low rank, calibrated, in order": uniform(low_rank, compensate=True),
    "Monarch, calibrated, in order": uniform(monarch(4), compensate=True),
    "low rank, allocated": allocated([low_rank]),
    "pivoted low rank, allocated": allocated([pivoted]),
    "Monarch, allocated": allocated([monarch(4)]),
    "several, allocated": allocated(SEVERAL),
    "several, allocated, in order": allocated(SEVERAL, compensate=True),
}
