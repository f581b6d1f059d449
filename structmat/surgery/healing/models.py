"""What healing does to the two models for as long as it lasts: modes, flags, hooks, recomputation."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute_later

from structmat._checks import check_inexact, check_tensor
from structmat.nn import MatrixParameters, StructuredLinear
from structmat.surgery.selection import module_names

Train = str | Callable[[str, nn.Parameter], bool]

_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}


def check_models(compressed: Any, dense: Any) -> None:
    """Raise unless there are two models that can be called as they are."""
    for name, model in (("compressed", compressed), ("dense", dense)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        wrapper = _WRAPPERS.intersection(c.__name__ for c in type(model).__mro__)
        if wrapper:
            raise ValueError(
                f"{name} is a {wrapper.pop()}: heal runs in one process, on a model that is not wrapped; for more use "
                "structmat.surgery.healing_trainer"
            )
    if compressed is dense:
        raise ValueError("compressed and dense are one model: keep a copy.deepcopy of it before it is compressed")


def trained_parameters(compressed: nn.Module, dense: nn.Module, train: Train) -> dict[str, nn.Parameter]:
    """The parameters that healing changes, in the model's order.

    Raises:
        TypeError: if ``train`` has the wrong type.
        ValueError: if there are none, or one cannot be trained.
    """
    named = dict(compressed.named_parameters())
    if train == "structured":
        kinds = (StructuredLinear, MatrixParameters)
        owned = {p for m in compressed.modules() if isinstance(m, kinds) for p in m.parameters()}
        chosen = {name: p for name, p in named.items() if p in owned}
    elif train == "all":
        chosen = {name: p for name, p in named.items() if p.is_floating_point() or p.is_complex()}
    elif callable(train):
        chosen = {name: p for name, p in named.items() if train(name, p)}
    else:
        raise TypeError(f'train must be "structured", "all" or a function of name and parameter, got {train!r}')
    if not chosen:
        raise ValueError(
            f"train={train!r} chooses no parameter of the {len(named)} of compressed"
            + ("; it has no structured layer: compress_ it first" if train == "structured" else "")
        )
    theirs = set(dense.parameters()) | {p.data_ptr() for p in dense.parameters() if _plain(p)}
    for name, p in chosen.items():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the model first")
        check_inexact(name, p)
        if p.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, whose gradients would vanish without loss scaling; use compressed.bfloat16() or "
                "compressed.float()"
            )
        if p in theirs or (_plain(p) and p.data_ptr() in theirs):
            raise ValueError(f"{name} is a parameter of dense too: make dense a copy.deepcopy before compressing")
    return chosen


def _plain(p: Tensor) -> bool:
    return type(p.data) is Tensor and p.device.type != "meta" and p.numel() > 0


# ---------------------------------------------------------------- modes and flags
@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Modes, ``requires_grad`` flags and gradients are afterwards what they were before."""
    modes = [(m, m.training) for m in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag, grad in parameters:
            p.grad = grad
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def set_trainable(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """Let exactly these parameters have gradients, and begin without any."""
    ids = {id(p) for p in chosen.values()}
    for p in model.parameters():
        p.grad = None
        if p.requires_grad != (id(p) in ids):
            p.requires_grad_(id(p) in ids)


def set_mode(model: nn.Module, dropout: bool) -> None:
    """Evaluation mode, or training mode in which normalisations keep their running statistics."""
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


# ---------------------------------------------------------------- outputs of named modules
class Capture:
    """Keeps what chosen modules return while it is active.

    Args:
        model: the model whose modules are meant.
        patterns: dotted names, as in :mod:`fnmatch`.

    Raises:
        TypeError: if ``patterns`` is not a sequence of strings.
        ValueError: if a pattern matches nothing.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"hidden must be a sequence of names of modules, got {patterns!r}")
        self.seen: dict[str, Tensor] = {}
        self._on, self._handles = False, []
        if not patterns:
            return
        names = {aliases[0]: (module, aliases) for module, aliases in module_names(model).items()}
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(a, pattern) for _, aliases in names.values() for a in aliases):
                self.close()
                raise ValueError(f"hidden: no module of {type(model).__name__} has a name like {pattern!r}")
        for name, (module, aliases) in names.items():
            if any(fnmatch.fnmatchcase(a, p) for a in aliases for p in patterns):
                self._handles.append(module.register_forward_hook(functools.partial(self._keep, name)))

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._on:  # recomputed in the backward pass
            return
        first: Any = output[0] if isinstance(output, (tuple, list)) and output else output
        check_tensor(f"hidden: the output of {name}", first, 1)
        calls = sum(key.startswith(f"{name}#") for key in self.seen)
        self.seen[f"{name}#{calls}"] = first

    @contextlib.contextmanager
    def active(self) -> Iterator[dict[str, Tensor]]:
        """Collect into the mapping that this yields."""
        self.seen, self._on = {}, True
        try:
            yield self.seen
        finally:
            self._on, self.seen = False, {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


# ---------------------------------------------------------------- recomputation
@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """The layers of a transformers model keep their inputs only, and are computed again in the backward pass.

    Not by ``gradient_checkpointing_enable``, which does nothing in evaluation mode.

    Raises:
        ValueError: if the model has no such layers.
    """
    layers: list[Any] = [
        m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)
    ]
    if not hasattr(model, "gradient_checkpointing_enable") or not layers:
        raise ValueError(
            f"gradient_checkpointing=True needs a transformers model with gradient_checkpointing_enable, and "
            f"{type(model).__name__} has no layers for it"
        )
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(recompute_later, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
