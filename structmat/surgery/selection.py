"""Which layers of a model are to be replaced, and why others are left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from structmat.config import Config
from structmat.surgery.report import LayerRow
from structmat.surgery.spec import is_conv1d

FilterFn = Callable[[str, nn.Module], bool]
Configs = Config | Mapping[str, Config]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
# Wrappers that have taken the parameters over: they would go on synchronising or gathering the old ones.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


@dataclass(frozen=True)
class Target:
    """A layer that is to be replaced."""

    name: str
    module: nn.Module
    config: Config

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return dense_shape(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight as (out, in), without its graph."""
        return dense_weight(self.module)


@dataclass
class Selection:
    """The layers to replace and, in the model's order, the rows of the others (None in a target's place)."""

    targets: list[Target] = field(default_factory=list)
    rows: list[LayerRow | None] = field(default_factory=list)
    unused_patterns: tuple[str, ...] = ()


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` or ``Conv1D`` as (out, in), without its graph."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear``, ``Conv1D`` or subclass, whatever its weight has become."""
    weight = module._parameters.get("weight")
    if isinstance(weight, Tensor) and not is_lazy(weight) and weight.ndim == 2:
        m, n = weight.shape
        return (n, m) if is_conv1d(module) else (m, n)
    return int(getattr(module, "out_features", 0)), int(getattr(module, "in_features", 0))


def count_params(model: nn.Module) -> int:
    """The model's parameters, shared ones counted once, uninitialised ones not at all."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


# ---------------------------------------------------------------- why a layer is left alone
def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear layer that a structured one could stand for, subclasses included."""
    return isinstance(module, nn.Linear) or any(
        cls.__name__ == "Conv1D" and cls.__module__.split(".")[0] == "transformers" for cls in type(module).__mro__
    )


def refusal(module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced, or None if it can; ties to other modules are not looked at."""
    if parametrize.is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize)"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"it is a {type(module).__name__}, a subclass: other code may read its weight or rely on its methods"
    if "forward" in vars(module):
        return "its forward method has been replaced on the instance"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter (weight_norm, spectral_norm and pruning compute it)"
    extra = [n for n in (*module._parameters, *module._buffers, *module._modules) if n not in ("weight", "bias")]
    if extra:
        return f"it holds more than weight and bias: {', '.join(extra)}"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES:
        return f"its weight has dtype {weight.dtype}"
    if weight.ndim != 2 or weight.numel() == 0:
        return f"its weight has shape {tuple(weight.shape)}"
    return None


def owners_of(model: nn.Module) -> dict[Any, list[str]]:
    """Under which names each parameter, or another that begins at the same memory, is registered."""
    owners: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _identity(parameter: Tensor) -> Any:
    # Two parameters made of one tensor are tied too, where memory says so: not lazy, meta, empty or wrapped ones.
    plain = not is_lazy(parameter) and type(parameter.data) is Tensor and parameter.device.type != "meta"
    pointer = parameter.data_ptr() if plain else 0
    return (parameter.device, pointer) if pointer else id(parameter)


# ---------------------------------------------------------------- the walk
def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All dotted names of every module, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def select(model: nn.Module, config: Configs, filter_fn: FilterFn | None) -> Selection:
    """Walk a model.

    Args:
        model: any module.
        config: one config for all, or configs by patterns of names.
        filter_fn: takes a name and a module; false leaves the layer alone.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if nothing is to be replaced, or the model is itself a linear layer.
    """
    check_model(model)
    patterns = patterns_of(config)
    owners, names = owners_of(model), module_names(model)
    selection, used = Selection(), set()
    for module, aliases in names.items():
        if not is_linear_like(module):
            continue
        name, reason = aliases[0], refusal(module)
        matched = next((p for p in patterns if any(fnmatch.fnmatchcase(a, p) for a in aliases)), None)
        used.add(matched)
        if reason is None and (others := ties(module, aliases, owners)):
            reason = f"its weight is tied to {', '.join(others)}"
        if matched is None:
            reason = "no pattern matches its name"
        elif reason is None and filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn returned false"
        if reason is None and matched is not None:
            if name == "":
                raise ValueError(
                    f"the model is itself a {type(module).__name__}, which cannot be replaced in place; make a new "
                    "layer with structmat.nn.StructuredLinear.from_linear(model, config)"
                )
            selection.targets.append(Target(name, module, patterns[matched]))
            selection.rows.append(None)
        else:
            weight = module._parameters.get("weight")
            params = 0 if weight is None or is_lazy(weight) else weight.numel()
            selection.rows.append(LayerRow.left_alone(name, dense_shape(module), params, reason or ""))
    if not selection.targets:
        convolutions = sum(isinstance(m, nn.modules.conv._ConvNd) for m in names)
        raise ValueError(_nothing_found(selection, patterns, len(names), filter_fn is not None, convolutions))
    selection.unused_patterns = tuple(p for p in patterns if p not in used)
    return selection


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a module whose layers can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        found = _WRAPPERS.intersection(cls.__name__ for cls in type(module).__mro__)
        if found:
            raise ValueError(
                f"{name or 'the model'} is a {found.pop()}, which has taken over the parameters of the layers in it; "
                "replace layers first and wrap the model afterwards"
            )


def patterns_of(config: Any) -> dict[str, Config]:
    """Configs by patterns of names; a config alone is for all layers."""
    patterns = dict(config) if isinstance(config, Mapping) else {"*": config}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str) or not isinstance(value, Config):
            raise TypeError(
                "config must be a Config such as structmat.MonarchConfig(nblocks=4), or a mapping of name patterns to "
                f"Configs, got {type(value).__name__}" + (f" for {pattern!r}" if isinstance(config, Mapping) else "")
            )
    return patterns


def ties(module: nn.Module, aliases: list[str], owners: dict[Any, list[str]]) -> list[str]:
    """Under which other names a layer's weight is registered; see :func:`owners_of`."""
    weight = module._parameters["weight"]
    assert weight is not None
    own = {f"{name}.weight" if name else "weight" for name in aliases}
    return [name for name in owners[_identity(weight)] if name not in own]


def _nothing_found(
    selection: Selection, patterns: dict[str, Config], seen: int, filtered: bool, convolutions: int
) -> str:
    wanted = "a layer of exact type torch.nn.Linear or transformers' Conv1D"
    if list(patterns) != ["*"]:
        wanted += f" whose name matches one of {', '.join(map(repr, patterns))}" if patterns else " and no pattern"
    if filtered:
        wanted += " and that filter_fn accepts"
    text = f"there is nothing to replace: looked for {wanted} in {seen} module{'' if seen == 1 else 's'}"
    if convolutions:
        text += f"; {convolutions} of them are convolutions, which are left alone, those of kernel 1 too"
    left = [row for row in selection.rows if row is not None]
    for row in left[:5]:
        text += f"\n  {row.name or '(model)'}: {row.skipped}"
    return text + (f"\n  and {len(left) - 5} more" if len(left) > 5 else "")
