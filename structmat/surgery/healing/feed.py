"""Batches again and again, and models called with them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structmat.surgery import batches

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Forward = Callable[[nn.Module, Any], Any]


class Feed:
    """One batch after the other, from the beginning again where they end, with a place that can be returned to.

    Args:
        batches: an iterable, or a function that returns one. An iterator is gone through once.
        device: whose random state counts, beside the CPU's.

    Raises:
        TypeError: if ``batches`` is neither, or is itself a batch.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        if isinstance(batches, (Mapping, Tensor, str)):
            raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}: use [batch]")
        if not (isinstance(batches, Iterable) or callable(batches)):
            raise TypeError(
                f"batches must be an iterable of batches or a function that returns one, got {type(batches).__name__}"
            )
        self._batches, self._device = batches, device
        self._iterator: Iterator[Any] | None = None
        self._position, self._start = 0, {}
        # A DataLoader's own source of random numbers, and its sampler's.
        owners = (batches, getattr(batches, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        self._generators = [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and g not in found[:i]]

    def next(self) -> Any:
        """The next batch.

        Raises:
            ValueError: if there is none.
        """
        for _ in range(2):
            if self._iterator is None:
                self._begin()
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._once:
                    raise ValueError(f"batches is an iterator, which ended after {self._position} batches") from None
                if self._position == 0:
                    break
                self._iterator = None
                continue
            self._position += 1
            return batch
        raise ValueError("batches is empty")

    @property
    def _once(self) -> bool:
        return isinstance(self._batches, Iterator)

    def _begin(self) -> None:
        self._start = self._random()
        source = self._batches if isinstance(self._batches, Iterable) else self._batches()
        self._iterator, self._position = iter(source), 0

    def _random(self) -> dict[str, Any]:
        return random_state(self._device) | {"generators": [g.get_state() for g in self._generators]}

    def state(self) -> dict[str, Any]:
        """Where the feed is, and the random state at which the present round began."""
        return {"position": self._position, "start": self._start}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a place: the round begins as it did then, and its first batches are passed over.

        Raises:
            ValueError: if there are fewer batches than that.
        """
        set_random_state(state["start"], self._device)
        for generator, value in zip(self._generators, state["start"]["generators"], strict=False):
            generator.set_state(value)
        self._begin()
        assert self._iterator is not None
        for i in range(state["position"]):
            try:
                next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"batches has {i} batches, the checkpoint was made after {state['position']} of a round: these are "
                    "other data"
                ) from None
        self._position = state["position"]


# ---------------------------------------------------------------- random numbers
def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's global generators, as ``torch.load`` takes it."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put :func:`random_state` back."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


# ---------------------------------------------------------------- calls
def call_model(
    model: nn.Module, batch: Any, forward: Forward | None, hidden: bool = False, callee: nn.Module | None = None
) -> Any:
    """A model's outputs for a batch.

    Args:
        model: any module.
        batch: a mapping becomes keyword arguments, a tuple or list positional ones, a tensor the only one.
        forward: called with model and batch instead.
        hidden: ask a transformers model for its hidden states.
        callee: what is called, by default the model.

    Raises:
        TypeError: if the batch is something else and there is no ``forward``.
    """
    callee = callee or model
    if forward is not None:
        return forward(callee, batch)
    options: dict[str, Any] = {}
    if is_transformers(model):
        config: Any = model.config
        options = {"output_hidden_states": True, "return_dict": True} if hidden else {"return_dict": True}
        if "use_cache" in inspect.signature(model.forward).parameters:
            options["use_cache"] = False
        if isinstance(batch, Mapping) and not getattr(config, "is_encoder_decoder", False):
            batch = {key: value for key, value in batch.items() if key != "labels"}  # they make a loss for nobody
    return batches.call(callee, batch, options)


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers', without importing that."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__
    )
