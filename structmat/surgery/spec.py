"""What a checkpoint says about its structured layers, as JSON in the header of a safetensors file.

Under the key ``structmat`` the metadata hold ``{"version": 1, "layers": {name: layer}}``. A layer is

- ``class``: the module's class, ``matrix``: the value's class, static fields and nested values (see :func:`describe`),
- ``shape``: (out, in), ``bias``: whether there is one,
- ``conv1d``: whether the dense weight was stored as (in, out), as transformers' ``Conv1D`` does. The structured one
  is (out, in) in any case.

The factors are ordinary tensors of the file, named as in the state dict: ``fc.weight.left``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from structmat.base import StructuredMatrix
from structmat.matrices import LDR, BlockDiagonal, BlockSparse, Butterfly, LowRank, Monarch, PivotedLowRank, Pixelfly
from structmat.nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear, StructuredLinear
from structmat.value import from_json, to_json

KEY = "structmat"
VERSION = 1

_LAYERS: dict[type[StructuredMatrix], type[StructuredLinear]] = {
    Monarch: MonarchLinear,
    LowRank: LowRankLinear,
    BlockDiagonal: BlockDiagonalLinear,
}
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class LayerSpec:
    """A structured layer of a checkpoint; see the module's text for the fields."""

    layer: str
    matrix: dict[str, Any]
    shape: tuple[int, int]
    bias: bool
    conv1d: bool = False

    @classmethod
    def of(cls, layer: type[StructuredLinear], value: StructuredMatrix, bias: bool, conv1d: bool) -> LayerSpec:
        """The description of a layer of class ``layer`` around ``value``."""
        return cls(class_key(layer), describe(value), (value.shape[-2], value.shape[-1]), bias, conv1d)


def layer_class(value: StructuredMatrix) -> type[StructuredLinear]:
    """The layer that is made for a value of this class."""
    return _LAYERS.get(type(value), StructuredLinear)


# ---------------------------------------------------------------- classes by name
def class_key(cls: type) -> str:
    """The name under which a class is stored: bare for structmat's own, with its module for others."""
    own = cls.__module__.split(".")[0] == "structmat"
    return cls.__qualname__ if own else f"{cls.__module__}.{cls.__qualname__}"


def find_class(base: T, key: Any) -> T:
    """The subclass of ``base`` that :func:`class_key` names ``key``.

    Raises:
        ValueError: if no class of this name has been imported.
    """
    stack: list[Any] = [base]
    while stack:
        cls = stack.pop()
        if class_key(cls) == key:
            return cls
        stack.extend(cls.__subclasses__())
    raise ValueError(
        f"{key!r} is not a known subclass of {base.__name__}; import the module that defines it, or use the version "
        "of structmat that wrote the file"
    )


# ---------------------------------------------------------------- values
def describe(value: StructuredMatrix) -> dict[str, Any]:
    """A value without its tensors: class, static fields, and the same for nested values (null for a tensor)."""

    def child(item: Any) -> Any:
        if isinstance(item, tuple):
            return [child(i) for i in item]
        return describe(item) if isinstance(item, StructuredMatrix) else None

    return {
        "class": class_key(type(value)),
        "static": {name: to_json(getattr(value, name)) for name in value._static},
        "fields": {name: child(getattr(value, name)) for name in value._dynamic},
    }


def build(spec: Any, prefix: str, read: Callable[[str], Tensor]) -> StructuredMatrix:
    """Make the value that ``spec`` describes; the class checks that the tensors fit together.

    Args:
        spec: what :func:`describe` returned.
        prefix: ``fc.weight.``, with which the tensors' names begin.
        read: gives the tensor of a name.

    Raises:
        ValueError: if the description is malformed, or the tensors do not fit.
    """
    cls = find_class(StructuredMatrix, spec["class"])
    fields: dict[str, Any] = {}
    for name, item in spec["fields"].items():
        if item is None:
            fields[name] = read(prefix + name)
        elif isinstance(item, list):
            fields[name] = tuple(build(part, f"{prefix}{name}.{i}.", read) for i, part in enumerate(item))
        else:
            fields[name] = build(item, f"{prefix}{name}.", read)
    fields |= {name: from_json(item) for name, item in spec["static"].items()}
    if "place" in fields:  # that of the machine which wrote it
        fields["place"] = "cpu"
    names = (*cls._dynamic, *cls._static)
    if set(fields) != set(names):
        raise ValueError(f"{cls.__name__} has the fields {', '.join(names)}, the description {', '.join(fields)}")
    # Not by the constructor, whose arguments may be others than the fields.
    value = cls._rebuild(tuple(fields[n] for n in cls._dynamic), tuple(fields[n] for n in cls._static))
    check: Any = getattr(value, "__post_init__", None)
    if check is not None:
        check()
    return value


def tensor_names(spec: Any, prefix: str) -> Iterator[str]:
    """The names of the tensors of a description, as in the state dict."""
    for name, item in spec["fields"].items():
        if item is None:
            yield prefix + name
        elif isinstance(item, list):
            for i, part in enumerate(item):
                yield from tensor_names(part, f"{prefix}{name}.{i}.")
        else:
            yield from tensor_names(item, f"{prefix}{name}.")


def structure_name(value: StructuredMatrix) -> str:
    """The structure in a few words: ``monarch 4x4 rank 24``, ``lowrank 8``, ``Product(Monarch, Diagonal)``."""
    if isinstance(value, Monarch):
        l, _, _, k, q, _ = value.sizes
        # Where l divides q, all slices have one rank; else their ranks differ, and the hidden width says it all.
        return f"monarch {k}x{l} " + (f"width {k * q}" if q % l else f"rank {q // l}")
    if isinstance(value, LowRank):
        return f"lowrank {value.rank}"
    if isinstance(value, PivotedLowRank):
        return f"pivoted lowrank {value.rank}"
    if isinstance(value, BlockDiagonal):
        return f"blockdiagonal {value.blocks.shape[-3]}"
    if isinstance(value, Butterfly):
        return f"butterfly {len(value.factors)}"
    if isinstance(value, BlockSparse):
        count, rows, columns = value.values.shape[-3:]  # the layout is data, which a matrix on the meta device lacks
        return f"blocksparse {count} of {rows}x{columns}"
    if isinstance(value, Pixelfly):
        return f"pixelfly {structure_name(value.block_sparse)} rank {value.low_rank.rank}"
    if isinstance(value, LDR):
        return f"{type(value).__name__.lower()} rank {value.displacement_rank}"
    inner: list[str] = []
    for name in value._dynamic:
        child = getattr(value, name)
        parts = child if isinstance(child, tuple) else (child,)
        inner += [structure_name(p) for p in parts if isinstance(p, StructuredMatrix)]
    return type(value).__name__ + (f"({', '.join(inner)})" if inner else "")


# ---------------------------------------------------------------- the header's text
def dump_layers(layers: Mapping[str, LayerSpec]) -> str:
    """The text for the metadata."""
    items = {}
    for name, layer in layers.items():
        data = asdict(layer)
        items[name] = {"class": data.pop("layer"), **data}
    return json.dumps({"version": VERSION, "layers": items}, separators=(",", ":"))


def parse_layers(metadata: Mapping[str, str], source: str) -> dict[str, LayerSpec]:
    """The structured layers of a header; none if the file was not written by structmat.

    Args:
        metadata: the header's strings.
        source: what to call the file in a message.

    Raises:
        ValueError: if the version is unknown or the description is malformed.
    """
    if KEY not in metadata:
        return {}
    try:
        data = json.loads(metadata[KEY])
        version, items = data["version"], data["layers"]
        if version != VERSION:
            raise ValueError(
                f"{source} describes its structured layers in format version {version!r}, this structmat reads "
                f"version {VERSION}; use the version that wrote it"
            )
        layers = {}
        for name, item in items.items():
            out, into = (int(n) for n in item["shape"])
            layers[name] = LayerSpec(
                item["class"], item["matrix"], (out, into), bool(item["bias"]), bool(item["conv1d"])
            )
            list(tensor_names(item["matrix"], ""))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: the description of its structured layers is malformed ({error!r})") from error
    return layers


def layer_prefix(name: str) -> str:
    """``fc.weight.`` for ``fc``: how the names of its factors begin."""
    return f"{name}.weight." if name else "weight."


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is exactly transformers' ``Conv1D`` (told by name, so that transformers is not imported)."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.split(".")[0] == "transformers"
