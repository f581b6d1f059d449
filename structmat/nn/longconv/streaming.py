"""States of causal convolutions whose input comes piece by piece."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structmat.nn.longconv.functional import common_dtype

_T = TypeVar("_T")

# A first buffer has room for so many inputs at least.
_LEAST_ROOM = 64


def reordered(history: Tensor, index: Tensor) -> Tensor:
    """Rows of the first batch dimension of a history (*batch, channels, number)."""
    if history.ndim < 3:
        raise ValueError(f"reorder needs a batch, got a history of shape {tuple(history.shape)}")
    return history.index_select(0, index)


def register_state(cls: type[_T]) -> type[_T]:
    """Make a dataclass a pytree node whose leaves are its tensors."""
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    leaves = tuple(f.name for f in dataclasses.fields(cls) if f.type == "Tensor")  # pyright: ignore[reportArgumentType]
    static = tuple(name for name in names if name not in leaves)

    def flatten(state: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(state, name) for name in leaves], tuple(getattr(state, name) for name in static)

    def unflatten(children: Any, context: Any) -> Any:
        return cls(**dict(zip(leaves, children, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


@register_state
@dataclasses.dataclass
class LongConvState:
    """What a causal :class:`~structmat.nn.LongConv` knows of its input so far: gated inputs and the filter's taps.

    A step writes into the buffer and moves the state on, in place; to go on in two ways from one state take a
    ``clone()`` first. The buffer doubles when it is full, up to what ``limit`` allows; where the filter is a sliding
    window it holds at most two windows (or 64 inputs), and what the taps can still meet moves to the front when it is
    full: a step costs O(1) copies on average. Numbers are float32 at least.

    Args:
        taps: shape (channels, taps), the last one first.
        history: shape (*batch, channels, room), the inputs before ``end`` that taps can meet, in order.
        position: how many inputs there have been.
        end: how much of history is in use.
        limit: how many inputs there can be; -1 for any number.
    """

    taps: Tensor
    history: Tensor
    position: int
    end: int
    limit: int

    def reorder(self, index: Tensor) -> LongConvState:
        """The state whose rows of the first batch dimension are those at ``index``, a copy: for beam search.

        Args:
            index: shape (new batch,), integers.

        Raises:
            ValueError: if the state has no batch dimension.
        """
        return dataclasses.replace(self, history=reordered(self.history, index))

    def clone(self) -> LongConvState:
        """A state of its own that can go on in another way."""
        return dataclasses.replace(self, history=self.history.clone())

    def recent(self, count: int) -> Tensor:
        """The last inputs, as many as there are up to ``count``: a view of shape (*batch, channels, ..)."""
        return self.history[..., max(self.end - count, 0) : self.end]

    def append(self, u: Tensor, gate: Tensor | None = None) -> None:
        """Go on by inputs of shape (*batch, channels, number), times a gate; no graph is kept."""
        window, count = self.taps.shape[-1], u.shape[-1]
        x = u.detach()[..., max(count - window, 0) :].to(self.history.dtype)
        if gate is not None:
            x = x * gate.detach()[..., max(count - window, 0) :].to(x.dtype)
        if self.end + x.shape[-1] > self.history.shape[-1]:
            self._make_room(x)
        self.history[..., self.end : self.end + x.shape[-1]] = x
        self.end += x.shape[-1]
        self.position += count

    def step(self, u: Tensor, gate: Tensor | None = None) -> Tensor:
        """Go on by one input, shape (*batch, channels, 1), times a gate: what the taps make of all inputs so far."""
        self.append(u, gate)
        return self._last(self.taps.shape[-1])

    def _last(self, count: int) -> Tensor:
        """The last output's share of the last inputs, as many as there are up to ``count``."""
        inputs = self.recent(count)
        # No matrix product, which would be rounded to TF32 where such products may be.
        return (inputs * self.taps[..., self.taps.shape[-1] - inputs.shape[-1] :]).sum(-1, keepdim=True)

    def _make_room(self, x: Tensor) -> None:
        old = self.recent(self.taps.shape[-1] - x.shape[-1])  # with x all that taps can meet
        kept = old.shape[-1]
        needed = kept + x.shape[-1]
        if 2 * needed <= self.history.shape[-1]:
            self.history[..., :kept] = old  # which lies behind: there is room for both
        else:
            room = max(2 * needed, _LEAST_ROOM)
            if self.limit >= 0:
                room = min(room, kept + self.limit - self.position)
            history = x.new_zeros((*x.shape[:-1], room))
            history[..., :kept] = old
            self.history = history
        self.end = kept


def check_state(state: Any, u: Tensor, gate: Tensor | None) -> None:
    """Raise unless state is one that inputs u (*batch, channels, number) with this gate can follow."""
    if not isinstance(state, LongConvState):
        raise TypeError(f"state must be a LongConvState or None, got {type(state).__name__}")
    found, dtype, count = state.history, common_dtype(u, (gate,)), u.shape[-1]
    if found.shape[:-1] != u.shape[:-1] or found.device != u.device or found.dtype != dtype:
        raise ValueError(
            f"state must be of inputs {tuple(u.shape[:-1])} of {dtype} on {u.device}, got "
            f"{tuple(found.shape[:-1])} of {found.dtype} on {found.device}"
        )
    if 0 <= state.limit < state.position + count:
        raise ValueError(
            f"the state has room for {state.limit} inputs, got {count} after {state.position}; give prefill "
            'max_length=, or the filter extend="zero", a window that slides'
        )


def check_inference(**tensors: Tensor | None) -> None:
    """Raise where a gradient would silently stop at a state."""
    for name, value in tensors.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise RuntimeError(
                f"{name} requires grad, but a state holds no graph: gradients would not reach the filter and earlier "
                "inputs. Continue from a state under torch.no_grad(), or train with forward on the whole input"
            )
