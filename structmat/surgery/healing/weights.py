"""The numbers that healing changes, as the optimizer sees them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Weights:
    """Trained parameters, and float32 copies of those in bfloat16, on which the optimizer works.

    A step of 1e-4 would be lost in a bfloat16 weight, whose neighbours are 2^-8 of it apart. Gradients are added up in
    float32 too; after each step the parameter is the rounded copy.

    Args:
        parameters: by name; they have gradients.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters: dict[str, nn.Parameter] = {}
        self._handles = []
        for name, p in parameters.items():
            if p.dtype == torch.bfloat16:
                self.masters[name] = master = nn.Parameter(p.detach().float())
                self._handles.append(p.register_post_accumulate_grad_hook(_move_gradient(master)))
            else:
                self.masters[name] = p

    @property
    def count(self) -> int:
        """How many numbers."""
        return sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the parameters."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def state(self) -> State:
        """The values, on the CPU."""
        return {name: master.detach().to("cpu", copy=True) for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Put :meth:`state` back."""
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _move_gradient(master: nn.Parameter):
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hook


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of ``lr`` at a step: a line from 1 / warmup to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
