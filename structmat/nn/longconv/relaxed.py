"""States whose steps are cheap on average: relaxed multiplication by a filter that is known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

from structmat.matrices.displacement._convolution import convolve
from structmat.nn.longconv.streaming import LongConvState, register_state, reordered

#: A step multiplies at most so many inputs by taps one by one, and every such number of steps there is a convolution.
BASE = 64


@register_state
@dataclasses.dataclass
class RelaxedState(LongConvState):
    """A state of a causal :class:`~structmat.nn.LongConv` that prepares outputs of many steps at once.

    After n steps, n a multiple of 64, with w the largest power of two that divides n: the last w inputs are convolved
    with the taps 1, ..., 2 w - 1, and added to the next w outputs. So each pair of an input and a later output is met
    once, unless both lie between two multiples of 64: these a step multiplies itself. A step costs O(log^2 taps)
    operations on average instead of O(taps); the dearest one, once every so many steps as there are taps, and the first
    one after a piece, one convolution with all taps. Sums of float32 are those of :class:`LongConvState` to rounding.

    Args:
        taps: as of :class:`LongConvState`, as are history, position, end and limit.
        history: the inputs so far that taps can meet.
        position: how many inputs there have been.
        end: how much of history is in use.
        limit: how many inputs there can be; -1 for any number.
        pending: shape (*batch, channels, size), what is known of the outputs from the last multiple of size steps on;
            size is 64 times a power of two, at least the number of taps that are left, less one.
        steps: since the last piece.

    Source: van der Hoeven 2002, "Relax, but don't be too lazy"; for filters that are known, van der Hoeven 2003,
    "Relaxed multiplication using the middle product"; for models of sequences, Oncescu, Purandare, Idreos, Kakade 2024,
    "Flash inference: near linear time inference for long convolution sequence models and beyond".

    Example:
        >>> import torch, structmat
        >>> conv, u = structmat.nn.LongConv(8, 1000), torch.randn(1, 8, 1000)
        >>> with torch.no_grad():
        ...     y, state = conv.prefill(u[..., :800], relaxed=True)
        ...     for t in range(800, 1000):
        ...         last, state = conv.step(u[..., t], state)
        >>> type(state).__name__, torch.allclose(last, conv(u)[..., 999], atol=1e-5)
        ('RelaxedState', True)
    """

    pending: Tensor
    steps: int

    @classmethod
    def of(cls, state: LongConvState) -> Self:
        """The same state, relaxed."""
        pending = state.history.new_empty((*state.history.shape[:-1], 0))
        return cls(state.taps, state.history, state.position, state.end, state.limit, pending, 0)

    def reorder(self, index: Tensor) -> RelaxedState:
        pending = reordered(self.pending, index)
        return dataclasses.replace(self, history=reordered(self.history, index), pending=pending)

    def clone(self) -> RelaxedState:
        return dataclasses.replace(self, history=self.history.clone(), pending=self.pending.clone())

    def append(self, u: Tensor, gate: Tensor | None = None) -> None:
        super().append(u, gate)
        self.steps, self.pending = 0, self.pending[..., :0]

    def step(self, u: Tensor, gate: Tensor | None = None) -> Tensor:
        steps, pending = self.steps, self.pending
        if steps % BASE == 0:
            pending = self._prepared()
        super().append(u, gate)
        self.steps, self.pending = steps + 1, pending
        place, fresh = steps % pending.shape[-1], steps % BASE + 1
        return self._last(min(fresh, self.taps.shape[-1])) + pending[..., place : place + 1]

    def _prepared(self) -> Tensor:
        """What is known of the coming outputs, with that of the last inputs up to a power of two."""
        pending, taps = self.pending, self.taps.shape[-1]
        size = pending.shape[-1]
        if size == 0 or self.steps % size == 0:  # nothing is left of it: from all inputs that taps can meet
            most = taps - 1 if self.limit < 0 else min(taps - 1, self.limit - self.position)
            size = size or BASE
            while size < most:
                size *= 2
            return self._share(taps - 1, size)
        width = BASE
        while self.steps % (2 * width) == 0:
            width *= 2
        place = self.steps % size
        pending[..., place : place + width] += self._share(width, width)
        return pending

    def _share(self, count: int, size: int) -> Tensor:
        """What the last ``count`` inputs give to the next ``size`` outputs."""
        inputs, number = self.recent(count), self.taps.shape[-1]
        count = inputs.shape[-1]
        dtype = torch.promote_types(inputs.dtype, self.taps.dtype)
        taps = self.taps[..., max(number - size - count, 0) : number - 1].flip(-1).to(dtype)  # from the second one on
        if 0 in (*inputs.shape, taps.shape[-1]):
            return inputs.new_zeros((*inputs.shape[:-1], size), dtype=dtype)
        return convolve(taps, inputs.to(dtype), size, count - 1)
