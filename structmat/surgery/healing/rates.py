"""Which learning rate to heal with: a short trial of each, from the same weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from structmat._checks import check_int
from structmat.surgery.batches import device_of
from structmat.surgery.healing.api import heal
from structmat.surgery.healing.feed import Batches, random_state, set_random_state
from structmat.surgery.healing.loop import Diverged
from structmat.surgery.healing.methods import Distill, attention_mask
from structmat.surgery.healing.models import check_models, kept, trained_parameters

# Of so many batches one is held out where no validation is given, and at least one of all.
_HELD = 10
_LOSS = {"hidden_weight": 1.0, "output_weight": 1.0, "temperature": 1.0, "head": None}


def learning_rates(
    compressed: nn.Module,
    dense: nn.Module,
    batches: Batches,
    rates: Sequence[float] = (1e-5, 3e-5, 1e-4, 3e-4),
    steps: int = 30,
    *,
    validate: Callable[[nn.Module], float] | None = None,
    **options: Any,
) -> dict[float, float]:
    """What a short healing at each learning rate comes to; the models are left as they were.

    A rate that heals a small network ruins a language model, and the loss on what is trained on says so late. Each
    trial is a run of :func:`heal` with its rise and fall of the rate, from the same weights and with the same random
    numbers, and is judged on what it was not trained on. Take the best: ``min(found, key=found.get)``.

    Args:
        compressed: as for :func:`heal`.
        dense: as for :func:`heal`.
        batches: as for :func:`heal`; without ``validate`` a sequence, the last tenth of which judges.
        rates: positive numbers.
        steps: of each trial.
        validate: a function of the compressed model that returns a number, the smaller the better. By default the mean
            of :func:`healing_loss` over the batches that are held out, in layerwise healing too.
        **options: what the healing is to have, as for :func:`heal`; no ``lr`` and no checkpoint.

    Returns:
        For each rate what the validation gave after the trial; infinity where loss or gradients did not stay finite.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if rates are empty or not positive, there are too few batches to hold one out, or as for
            :func:`heal`.

    Cost: steps of each rate, and one validation before and after each trial; a copy of the trained parameters.

    Example:
        >>> import copy, torch, structmat
        >>> from structmat import surgery
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> small = copy.deepcopy(dense)
        >>> report = surgery.compress_(small, structmat.MonarchConfig(nblocks=4))
        >>> found = surgery.learning_rates(small, dense, [torch.randn(64, 32) for _ in range(20)], [1e-4, 1e-2, 10])
        >>> min(found, key=found.get)
        0.01
    """
    check_models(compressed, dense)
    rates = list(rates)
    if not rates or not all(isinstance(r, (int, float)) and math.isfinite(r) and r > 0 for r in rates):
        raise ValueError(f"rates must be positive numbers, at least one, got {rates!r}")
    check_int("steps", steps)
    if given := {"lr", "checkpoint", "checkpoint_every", "validate_every"} & options.keys():
        raise TypeError(f"learning_rates sets {' and '.join(sorted(given))} itself; take it away")
    if validate is None:
        if not isinstance(batches, Sequence) or isinstance(batches, str) or len(batches) < 2:
            raise ValueError(
                "without validate, batches must be a list of at least two, of which the last judge the trials; got "
                + (f"{len(batches)}" if isinstance(batches, Sequence) else f"a {type(batches).__name__}")
            )
        held = max(1, len(batches) // _HELD)
        validate = _judge(dense, batches[-held:], options)
        batches = batches[:-held]
    found: dict[float, float] = {}
    for rate in rates:
        with _put_back(compressed, dense, options.get("train", "structured")):
            try:
                report = heal(
                    compressed,
                    dense,
                    batches,
                    steps,
                    **{"progress": False, **options},
                    lr=rate,
                    validate=validate,
                    validate_every=steps,
                )
                value = report.validations[-1][1]
            except Diverged:
                value = math.inf
            found[rate] = math.inf if math.isnan(value) else value
    return found


def _judge(dense: nn.Module, held: Sequence[Any], options: dict[str, Any]) -> Callable[[nn.Module], float]:
    """The mean of the end-to-end loss over batches."""

    def judge(compressed: nn.Module) -> float:
        loss = {name: options.get(name, default) for name, default in _LOSS.items()}
        method = Distill(
            compressed,
            dense,
            options.get("forward"),
            options.get("mask", attention_mask),
            options.get("autocast"),
            options.get("hidden"),
            loss,
        )
        with contextlib.closing(method), kept(dense), torch.no_grad():
            dense.eval()
            return sum(method.loss(batch)[0].item() for batch in held) / len(held)

    return judge


@contextlib.contextmanager
def _put_back(compressed: nn.Module, dense: nn.Module, train: Any) -> Iterator[None]:
    """Trained parameters and random numbers are afterwards what they were before."""
    chosen = trained_parameters(compressed, dense, train)
    device = device_of(compressed)
    values, numbers = {name: p.detach().clone() for name, p in chosen.items()}, random_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in chosen.items():
                p.copy_(values[name])
        set_random_state(numbers, device)
