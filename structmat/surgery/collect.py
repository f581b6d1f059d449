"""Sums of x x^H over what the layers of a running model are given, and over the gradients of what they put out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from structmat.projection.moments import Moments
from structmat.surgery.gram import Gram, Sums

# Inputs that are kept until another layer may have been given the same tensor. Two, because between two projections
# of one input another layer may run, as in multi-head latent attention.
_PENDING = 2


@dataclasses.dataclass(eq=False)
class Layer:
    """A layer that is watched.

    Attributes:
        name: its first dotted name.
        module: the layer.
        shape: (out, in).
        stride: of a convolution, else None.
        shared: sums over tensors that a fixed set of layers was given, this one among them.
        own: sums over other inputs of this layer.
        outputs: sums over the gradients of its outputs.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    stride: tuple[int, ...] | None = None
    shared: Sums | None = None
    own: Sums | None = None
    outputs: Sums | None = None


@dataclasses.dataclass
class _Pending:
    """The sums over an input, and the layers that were given this same tensor."""

    tensor: Tensor
    key: tuple[Any, ...]
    gram: Gram
    layers: list[Layer]


class Collector:
    """Watches layers, while entered as a context.

    Args:
        layers: what to watch.
        gradients: whether to watch the gradients of the outputs too.
        dtype: see :meth:`Gram.of`.

    Attributes:
        mask: which positions of inputs (B, T, ...) count, shape (B, T), or None for all.
        anchors: scalars on which every output depends: differentiating by them runs through all layers, and through
            no parameter.
    """

    def __init__(self, layers: list[Layer], gradients: bool, dtype: torch.dtype | None) -> None:
        self.layers, self.gradients, self.dtype = layers, gradients, dtype
        self.mask: Tensor | None = None
        self.anchors: dict[Any, Tensor] = {}
        self._pending: list[_Pending] = []
        self._finite: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []
        self._backward = False

    def __enter__(self) -> Collector:
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._before(layer), with_kwargs=True))
            if self.gradients:
                self._handles.append(layer.module.register_forward_hook(self._after(layer)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()

    # ---------------------------------------------------------------- hooks
    def _before(self, layer: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            # What runs again during the backward pass is a checkpointed forward: it has been seen.
            if isinstance(x, Tensor) and not self._backward:
                self._see(layer, x)

        return hook

    def _after(self, layer: Layer) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # within a model's own no_grad: nothing of the loss comes here
                return None
            key = (output.device, output.dtype)
            if key not in self.anchors:
                self.anchors[key] = torch.zeros((), device=key[0], dtype=key[1], requires_grad=True)
            # A new tensor, which neither needs nor is a leaf: what comes next may work in place. A hook on the tensor
            # gets the gradient of its value before that.
            output = output + self.anchors[key]
            mask = self.mask
            output.register_hook(lambda g: self._gradient(layer, g, mask))
            return output

        return hook

    @torch.no_grad()
    def _see(self, layer: Layer, x: Tensor) -> None:
        key = (None if x.is_inference() else x._version, layer.stride)
        for entry in self._pending:
            if entry.tensor is x and entry.key == key and key[0] is not None and layer not in entry.layers:
                entry.layers.append(layer)
                return
        sampled = x if layer.stride is None else x[(..., *(slice(None, None, s) for s in layer.stride))]
        rows = _rows(layer, sampled, self.mask)
        if not len(rows):
            return
        gram = Gram.of(rows, self.dtype)
        self._finite.append((f"the inputs of {layer.name or 'the model'}", gram.first.isfinite().all()))
        self._pending.append(_Pending(x, key, gram, [layer]))
        if len(self._pending) > _PENDING:
            _settle(self._pending.pop(0))

    @torch.no_grad()
    def _gradient(self, layer: Layer, g: Tensor, mask: Tensor | None) -> None:
        rows = _rows(layer, g, mask)
        if not len(rows):
            return
        gram = Gram.of(rows, self.dtype)
        self._finite.append((f"the output gradients of {layer.name or 'the model'}", gram.first.isfinite().all()))
        layer.outputs = layer.outputs or Sums()
        layer.outputs.add(gram)

    # ---------------------------------------------------------------- a batch
    def end_forward(self, batch: int) -> None:
        """Let go of the inputs of a batch.

        Raises:
            ValueError: if one of them was not finite.
        """
        while self._pending:
            _settle(self._pending.pop(0))
        self._check(batch)

    def backward(self, loss: Tensor, batch: int) -> None:
        """Collect the gradients of a loss.

        Raises:
            ValueError: if one of them was not finite, or there are none.
        """
        self._backward = True
        try:
            anchors = list(self.anchors.values())
            found = torch.autograd.grad(loss, anchors, allow_unused=True) if anchors and loss.requires_grad else ()
            if all(g is None for g in found):
                raise ValueError(f"the loss of batch {batch} (counted from 0) depends on no layer that is calibrated")
        finally:
            self._backward = False
            self.anchors.clear()
        self._check(batch)

    def _check(self, batch: int) -> None:
        # Once a batch: a look at each flag when it arises would wait for the device every time.
        found, self._finite = self._finite, []
        for what, finite in found:
            if not finite:
                raise ValueError(f"{what} have NaN or infinite entries in batch {batch} (counted from 0)")

    # ---------------------------------------------------------------- results
    def moments(self) -> dict[str, Moments]:
        """The moments of every layer that saw an input; layers that saw the same ones share the tensors.

        To be called once: the sums become the results.
        """
        sums = {s: None for layer in self.layers for s in (layer.shared, layer.own) if s is not None}
        totals = {s: s.totals() for s in sums}
        kept = {layer.shared for layer in self.layers if layer.own is not None}  # needed undivided
        averages: dict[tuple[Sums, ...], tuple[Tensor, Tensor]] = {}
        moments = {}
        for layer in self.layers:
            parts = tuple(s for s in (layer.shared, layer.own) if s is not None)
            if not parts:
                continue
            count = sum(s.count for s in parts)
            if parts not in averages:
                outer, first = totals[parts[0]]
                if len(parts) == 2:
                    outer, first = outer + totals[parts[1]][0], first + totals[parts[1]][1]
                elif parts[0] in kept:
                    outer, first = outer.clone(), first.clone()
                averages[parts] = outer.div_(count), first.div_(count)
            outputs = None
            if layer.outputs is not None:
                total = layer.outputs.totals()[0]
                # A zero metric would make all matrices equally near: it says that the loss does not see this layer.
                outputs = total.div_(count) if total.any() else None
            inputs, mean = averages[parts]
            try:
                moments[layer.name] = Moments(inputs, mean, count, outputs)
            except ValueError as error:
                raise ValueError(f"the moments of {layer.name or 'the model'} overflow: {error}") from error
        return moments


def _rows(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
    """Vectors as rows (count, n): what a layer is given or puts out, at the positions that count."""
    if layer.stride is not None:
        x = x.movedim(-1 - len(layer.stride), -1)
    if mask is not None and x.ndim > mask.ndim and x.shape[: mask.ndim] == mask.shape:
        x = x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _settle(entry: _Pending) -> None:
    """Add an input's sums to those of the layers that were given it."""
    layers = set(entry.layers)
    shared = entry.layers[0].shared
    if all(layer.shared is None and layer.own is None for layer in layers):
        shared = Sums(layers)
        for layer in layers:
            layer.shared = shared
    if shared is not None and shared.owners == layers:
        shared.add(entry.gram)
        return
    # Not the set that the first of them began with: one of them has been left out, or called more often.
    for layer in layers:
        layer.own = layer.own or Sums()
        layer.own.add(entry.gram.clone())
