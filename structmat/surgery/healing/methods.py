"""The two ways to learn from the dense model: layer by layer, and end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn import StructuredLinear
from structmat.surgery.batches import device_of, to_device
from structmat.surgery.healing.feed import Forward, call_model
from structmat.surgery.healing.loss import Mask, Parts, combine, relative_error, split
from structmat.surgery.healing.models import Capture
from structmat.surgery.selection import module_names

MaskFn = Callable[[Any], Tensor | None]


def attention_mask(batch: Any) -> Tensor | None:
    """The positions that count: ``attention_mask`` of a mapping, if it is there and has shape (batch, positions)."""
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def cast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """An autocast region, or none."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Distill:
    """Gradients of :func:`healing_loss` of whole models.

    Args:
        compressed: gets gradients.
        dense: gets none.
        forward: see :func:`call_model`.
        mask: of a batch.
        autocast: dtype of the region around both models, or None.
        hidden: modules whose outputs are the hidden states; None for those that the models return.
        options: the numbers of :func:`healing_loss`.
        wrapper: what is called in the place of ``compressed``, such as a DistributedDataParallel around it.
    """

    def __init__(
        self,
        compressed: nn.Module,
        dense: nn.Module,
        forward: Forward | None,
        mask: MaskFn,
        autocast: torch.dtype | None,
        hidden: Sequence[str] | None,
        options: dict[str, Any],
        wrapper: nn.Module | None = None,
    ) -> None:
        self.device = device_of(compressed)
        self._models = (compressed, dense)
        self._callees = (wrapper or compressed, dense)
        self._devices = (self.device, device_of(dense, self.device))
        self._forward, self._mask, self._autocast, self._options = forward, mask, autocast, options
        self._ask = hidden is None and options["hidden_weight"] > 0
        self._named = hidden is not None
        self._captures: list[Capture] = []
        with contextlib.ExitStack() as stack:
            for model in self._models:
                self._captures.append(Capture(model, hidden or ()))
                stack.callback(self._captures[-1].close)
            stack.pop_all()

    def loss(self, batch: Any) -> tuple[Tensor, Any]:
        """The loss, with its graph, and what the compressed model returned."""
        with torch.no_grad():
            _, dense = self._parts(1, batch)
        outputs, compressed = self._parts(0, batch)
        return combine(compressed, dense, self._mask(batch), **self._options), outputs

    def backward(self, batch: Any, scale: float) -> float:
        """Add ``scale`` times the gradient of a batch's loss; return the loss."""
        loss, _ = self.loss(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on a trained parameter: does forward turn gradients off?")
        (scale * loss).backward()
        return loss.item()

    def _parts(self, which: int, batch: Any) -> tuple[Any, Parts]:
        device, model = self._devices[which], self._models[which]
        with self._captures[which].active() as seen, cast(device, self._autocast):
            outputs = call_model(model, to_device(batch, device), self._forward, self._ask, self._callees[which])
            seen = dict(seen)
        hidden, heads = split(("compressed_outputs", "dense_outputs")[which], outputs)
        return outputs, (seen if self._named else hidden, heads)

    def close(self) -> None:
        """Remove the hooks."""
        for capture in self._captures:
            capture.close()


class Layerwise:
    """Gradients of each structured layer's own error, at the inputs and outputs of the dense layer of its name.

    One pass of the dense model; a layer's graph lives only while the dense layer's hook runs.

    Args:
        compressed: its structured layers get gradients.
        dense: is called.
        forward: see :func:`call_model`.
        mask: of a batch.
        autocast: dtype of the region around the dense model and the structured layers, or None.
        chosen: the parameters that are trained.

    Raises:
        ValueError: if a chosen parameter belongs to no structured layer, or a layer has no counterpart.
    """

    def __init__(
        self,
        compressed: nn.Module,
        dense: nn.Module,
        forward: Forward | None,
        mask: MaskFn,
        autocast: torch.dtype | None,
        chosen: dict[str, nn.Parameter],
    ) -> None:
        self.device = device_of(compressed)
        self._dense, self._where = dense, device_of(dense, self.device)
        self._forward, self._mask, self._autocast = forward, mask, autocast
        self.errors: dict[str, tuple[float, float]] = {}
        self._now: dict[str, list[Tensor]] = {}
        self._keep, self._scale = Mask(None), 1.0
        pairs = _pairs(compressed, dense, chosen)
        self._handles = [
            module.register_forward_hook(self._hook(name, layer), with_kwargs=True)
            for module, (name, layer) in pairs.items()
        ]

    def _hook(self, name: str, layer: StructuredLinear) -> Any:
        like = next(layer.parameters())

        def run(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.detach().to(like.device, like.dtype if x.is_floating_point() else None)
            with torch.enable_grad():
                y = layer(x)
                with torch.autocast(like.device.type, enabled=False):
                    error = relative_error(y, output, self._keep)
                    (self._scale * error).backward()
            self._now.setdefault(name, []).append(error.detach())

        return run

    def backward(self, batch: Any, scale: float) -> float:
        """Add ``scale`` times the gradients of a batch; return the mean of the layers' errors."""
        self._keep, self._scale, self._now = Mask(self._mask(batch)), scale, {}
        with torch.no_grad(), cast(self._where, self._autocast):
            call_model(self._dense, to_device(batch, self._where), self._forward)
        if not self._now:
            raise ValueError("the dense model called none of the layers that are structured in compressed")
        now = {name: sum(e.item() for e in errors) / len(errors) for name, errors in self._now.items()}
        self.errors.update({name: (self.errors.get(name, (e, e))[0], e) for name, e in now.items()})
        return sum(now.values()) / len(now)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _pairs(
    compressed: nn.Module, dense: nn.Module, chosen: dict[str, nn.Parameter]
) -> dict[nn.Module, tuple[str, StructuredLinear]]:
    """For each dense module the structured layer that stands at its place."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    ids, covered = {id(p) for p in chosen.values()}, set()
    pairs: dict[nn.Module, tuple[str, StructuredLinear]] = {}
    for layer, names in module_names(compressed).items():
        if not isinstance(layer, StructuredLinear) or not any(id(p) in ids for p in layer.parameters()):
            continue
        covered |= {id(p) for p in layer.parameters()}
        for name in names:
            if name not in modules:
                raise ValueError(f"dense has no module {name!r}, where compressed has a {type(layer).__name__}")
            pairs.setdefault(modules[name], (name, layer))
    outside = [name for name, p in chosen.items() if id(p) not in covered]
    if outside:
        raise ValueError(
            'mode="layerwise" trains structured layers only, and train chooses '
            f"{', '.join(outside[:5])}{' and others' if len(outside) > 5 else ''} too"
        )
    return pairs
