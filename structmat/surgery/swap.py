"""Exchange modules in a model: the new one takes the old one's places, hooks and attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from structmat.base import StructuredMatrix
from structmat.nn import StructuredLinear
from structmat.surgery.spec import is_conv1d, layer_class

# Attributes that speak of the old module only: its compiled call, its sizes, and how its dense weight lay.
_OWN = ("_compiled_call_impl", "conv1d", "in_features", "out_features", "matrix_batch")
Pairs = Iterable[tuple[nn.Module, nn.Module]]


def structured_like(
    old: nn.Module,
    value: StructuredMatrix,
    fresh_bias: bool = False,
    cls: type[StructuredLinear] | None = None,
) -> StructuredLinear:
    """A structured layer to stand in a dense one's place.

    Args:
        old: an ``nn.Linear``, ``Conv1D`` or structured layer.
        value: the weight.
        fresh_bias: draw a new bias (if there was one) instead of keeping the parameter.
        cls: the layer's class, by default the one for this kind of value.
    """
    bias: Any = old.bias
    layer = (cls or layer_class(value))._from_parts(value, None, old)
    if fresh_bias and bias is not None:
        layer.bias = nn.Parameter(value_like(value, layer.out_features), requires_grad=bias.requires_grad)
        layer._reset_bias()
    elif bias is not None:
        layer.bias = bias  # the same object: an optimizer, or another layer that shares it, goes on holding it
    conv1d = type(old) if is_conv1d(old) else vars(old).get("conv1d")
    if conv1d:
        # The class, for the way back. Checkpoints say too how the dense weight lay, so that a file for one layout does
        # not go into the other.
        vars(layer)["conv1d"] = conv1d
    return layer


def value_like(value: StructuredMatrix, size: int) -> Any:
    """An uninitialised vector of the value's dtype and device."""
    return next(value.tensors()).new_empty(size, dtype=value.dtype)


def dense_class(old: StructuredLinear) -> type[nn.Module]:
    """What stands in a structured layer's place once it is dense: ``Conv1D`` where that was there before."""
    kind: Any = vars(old).get("conv1d")
    return nn.Linear if kind is None or old.bias is None else kind  # a Conv1D cannot be without a bias


def dense_like(old: StructuredLinear, weight: nn.Parameter) -> nn.Module:
    """A dense layer with this weight, of a ``Conv1D`` (in, out), to stand in a structured layer's place."""
    cls = dense_class(old)
    layer = cls.__new__(cls)  # not its constructor, which would draw random numbers
    nn.Module.__init__(layer)
    names = ("in_features", "out_features") if cls is nn.Linear else ("nx", "nf")
    for name, size in zip(names, (old.in_features, old.out_features), strict=True):
        setattr(layer, name, size)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", old.bias)
    return layer.train(old.training)


def swap(model: nn.Module, pairs: Pairs) -> None:
    """Put the second module of each pair in every place of the first, with its hooks and extra attributes."""
    new = {}
    for old, replacement in pairs:
        _adopt(old, replacement)
        new[old] = replacement
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]


def disable_fused_encoder(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` off its fused inference path where a feed-forward layer is structured.

    In evaluation mode without gradients that path passes ``linear1.weight`` and ``linear2.weight`` to a kernel as
    dense tensors. These two attributes are what PyTorch itself consults before it takes the path.
    """

    def structured(layer: Any) -> bool:
        return isinstance(layer, nn.TransformerEncoderLayer) and any(
            isinstance(part, StructuredLinear) for part in (layer.linear1, layer.linear2)
        )

    for module in model.modules():
        if structured(module):
            module.activation_relu_or_gelu = 0  # pyright: ignore[reportArgumentType]
        elif isinstance(module, nn.TransformerEncoder) and any(structured(layer) for layer in module.layers):
            module.use_nested_tensor = False


def _adopt(old: nn.Module, new: nn.Module) -> None:
    # The hook dictionaries themselves move, because the handles that remove hooks refer to them; the old module, if
    # anyone still has it, goes on with copies.
    for name, value in list(vars(old).items()):
        if "_hooks" in name or name == "_is_full_backward_hook":
            object.__setattr__(new, name, value)
            object.__setattr__(old, name, copy.copy(value))
        elif name not in vars(new) and name not in _OWN:
            object.__setattr__(new, name, value)
    hooks = new._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):  # it holds a weak reference to its module
            hooks[key] = type(hook)(hook.hook, new)  # pyright: ignore[reportCallIssue]
