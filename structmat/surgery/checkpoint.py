"""Save a model with structured layers, and load it into the model it was made from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from structmat.nn import StructuredLinear
from structmat.surgery.selection import dense_shape, is_linear_like, module_names, refusal
from structmat.surgery.shards import Checkpoint
from structmat.surgery.spec import (
    KEY,
    LayerSpec,
    build,
    describe,
    dump_layers,
    find_class,
    is_conv1d,
    layer_prefix,
    tensor_names,
)
from structmat.surgery.stream import DTYPES, Entry, tensor_writer
from structmat.surgery.swap import disable_fused_encoder, structured_like, swap


def save_file(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Save a model's state dict, and in the header what its structured layers are, to a safetensors file.

    Tensors keep their dtypes; one that stands under several names is stored once. The file is written under a
    temporary name and renamed when it is complete.

    Args:
        model: any module, with structured layers or without.
        path: the file to make or replace.
        metadata: more strings for the header.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if the state dict holds something that is not a plain tensor.
        ValueError: if a tensor is on the meta device or of a dtype that the format lacks, or metadata has the key
            ``structmat``.

    Example:
        >>> import os, tempfile, torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> report = surgery.compress_(model, structmat.MonarchConfig(nblocks=2, rank=4))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> surgery.save_file(model, path)
        >>> other = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> surgery.load_file(other, path)
        ([], [])
        >>> type(other[0]).__name__, torch.equal(other[0].weight.left, model[0].weight.left)
        ('MonarchLinear', True)
    """
    if KEY in (metadata or {}):
        raise ValueError(f"the key {KEY!r} of the metadata is taken by the description of the structured layers")
    state = model.state_dict()
    for name, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise TypeError(f"{name} in the state dict is a {type(tensor).__name__}, not a plain dense tensor")
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: it has no values to save")
    layers: dict[str, LayerSpec] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredLinear):
            conv1d = bool(vars(module).get("conv1d", False))
            layers[name] = LayerSpec.of(type(module), module.weight(), module.bias is not None, conv1d)
            for key in tensor_names(layers[name].matrix, layer_prefix(name)):
                if key not in state:
                    raise ValueError(f"the state dict has no {key}: a hook renames its keys; save the unwrapped model")
    first: dict[Any, str] = {}
    aliases = {name: first[key] for name, key in _storages(state).items() if first.setdefault(key, name) != name}
    entries = {name: Entry.of(name, tensor) for name, tensor in state.items() if name not in aliases}
    header = {"format": "pt", **aliases, **(metadata or {})}
    if layers:
        header[KEY] = dump_layers(layers)
    with tensor_writer(path, entries, header) as writer:
        for name in entries:
            writer.write(name, state[name])


@torch.no_grad()
def load_file(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> tuple[list[str], list[str]]:
    """Load a checkpoint of :func:`save_file`, or of the command ``structmat compress``, into a model.

    Where the file has a structured layer and the model a dense one, the structured layer is made in its place, with
    the dense layer's dtype, device, bias, mode, ``requires_grad`` and hooks; the model needs no preparation. All other
    values are copied into the model's own tensors, and take their dtype and device, as ``load_state_dict`` does. A
    file without structured layers is loaded likewise. Errors are found before the model is changed.

    Args:
        model: a model of the architecture that was saved, with its layers dense or already structured.
        path: a safetensors file, or the folder or index of a sharded checkpoint.
        strict: whether missing and unexpected tensors are errors.

    Returns:
        The names of missing and unexpected tensors, both empty if strict.

    Raises:
        OSError: if a file cannot be read.
        TypeError: if model is not a module.
        ValueError: if the file is damaged or of an unknown version, tensors are missing or unexpected, shapes differ,
            a layer of the model cannot be replaced, or the model is on the meta device.

    Example:
        >>> import os, tempfile, torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(structmat.nn.LowRankLinear(8, 8, rank=2))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> surgery.save_file(model, path)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=torch.bfloat16))
        >>> missing, unexpected = surgery.load_file(dense, path)
        >>> type(dense[0]).__name__, dense[0].weight.dtype
        ('LowRankLinear', torch.bfloat16)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checkpoint = Checkpoint(path)
    layers = _structured_layers(model, checkpoint)
    swap(model, layers)
    try:
        state = model.state_dict()
        meta = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta]
        if meta:
            raise ValueError(f"the model is on the meta device ({meta[0]}): make it real with to_empty(device=...)")
        sources, missing, unexpected = _match(state, checkpoint)
        _check(state, sources, missing if strict else [], unexpected if strict else [], checkpoint)
        handles = {file.path: safe_open(file.path, framework="pt") for file in checkpoint.files}
        tensors = {key: handles[checkpoint.where[source].path].get_tensor(source) for key, source in sources.items()}
        model.load_state_dict(tensors, strict=False)
    except BaseException:
        swap(model, [(new, old) for old, new in layers])
        raise
    disable_fused_encoder(model)
    return missing, unexpected


def _structured_layers(model: nn.Module, checkpoint: Checkpoint) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a layer of the model and what shall take its place."""
    modules = {name: module for module, names in module_names(model).items() for name in names}
    new: dict[nn.Module, nn.Module] = {}
    for name, spec in checkpoint.layers.items():
        where = f"{checkpoint.path} has a structured layer {name!r}"
        old = modules.get(name)
        if old is None:
            raise ValueError(f"{where}, the model has no module of that name")
        if old in new:
            continue
        if isinstance(old, StructuredLinear):
            if describe(old.weight()) == spec.matrix:
                continue  # the values go into the layer that is there
            shape: tuple[int, int] = (old.out_features, old.in_features)
        elif is_linear_like(old) and (reason := refusal(old)) is None:
            shape = dense_shape(old)
            if is_conv1d(old) != spec.conv1d:
                layouts = {True: "(in, out), as Conv1D does", False: "(out, in), as nn.Linear does"}
                raise ValueError(
                    f"{where} of a weight that was read as {layouts[spec.conv1d]}, but the model's layer is a "
                    f"{type(old).__name__}; compress it with this layout (the command takes --conv1d)"
                )
        else:
            reason = refusal(old) if is_linear_like(old) else f"it is a {type(old).__name__}"
            raise ValueError(f"{where}, and the model's {name!r} cannot become one: {reason}")
        if name == "":
            raise ValueError("the model is itself a linear layer, which cannot be replaced in place")
        if shape != spec.shape:
            raise ValueError(f"{where} of shape {spec.shape}, the model's has shape {shape}")
        new[old] = _make(old, name, spec, checkpoint)
    return list(new.items())


def _make(old: nn.Module, name: str, spec: LayerSpec, checkpoint: Checkpoint) -> StructuredLinear:
    read: dict[str, Tensor] = {}

    def tensor(key: str) -> Tensor:
        stored = checkpoint.resolve(key)
        if stored not in read:  # one object for one tensor, so that factors that were shared are shared again
            read[stored] = checkpoint.where[stored].read(stored)
        return read[stored]

    like: Any = old.weight
    try:
        value = build(spec.matrix, layer_prefix(name), tensor)
        if value.shape != spec.shape:
            raise ValueError(f"its factors make a matrix of shape {tuple(value.shape)}, not {spec.shape}")
        if value.dtype.is_complex and not like.dtype.is_complex:
            raise TypeError(f"the factors are {value.dtype}, the model's layer is {like.dtype}")
        layer = structured_like(old, value, cls=find_class(StructuredLinear, spec.layer))
        layer.weight.to(device=like.device, dtype=like.dtype)  # the module, not the value: what is shared stays shared
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path}: the structured layer {name!r} cannot be made: {error}") from error
    return layer


def _storages(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A key for every tensor; tensors of equal keys are one."""
    return {
        name: (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name for name, t in state.items()
    }


def _match(state: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, str], list[str], list[str]]:
    """For each key of the state dict the tensor to read, and what is missing and unexpected."""
    storages = _storages({name: t for name, t in state.items() if isinstance(t, Tensor)})
    found = {storages[name]: name for name in state if name in checkpoint.where and name in storages}
    sources, missing = {}, []
    for name in state:
        stored = checkpoint.aliases.get(name, name)
        if stored not in checkpoint.where:
            stored = found.get(storages.get(name), name)  # under the name of a parameter that it is tied to
        if stored in checkpoint.where:
            sources[name] = stored
        else:
            missing.append(name)
    used = set(sources.values())
    return sources, missing, [name for name in checkpoint.where if name not in used]


def _check(
    state: Mapping[str, Any], sources: dict[str, str], missing: list[str], unexpected: list[str], found: Checkpoint
) -> None:
    problems = []
    for what, names in (("missing in the file", missing), ("not in the model", unexpected)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{what}: {', '.join(names[:8])}{more} (strict=False allows this)")
    for name, source in sources.items():
        shape, dtype = found.entry(source).shape, found.entry(source).dtype
        if dtype not in DTYPES:
            problems.append(f"{name} has dtype {dtype}, which torch {torch.__version__} lacks")
        elif isinstance(state[name], Tensor) and tuple(state[name].shape) != shape:
            problems.append(f"{name} has shape {shape} in the file and {tuple(state[name].shape)} in the model")
    if problems:
        raise ValueError(f"{found.path} does not fit the model, which was not changed:\n  " + "\n  ".join(problems))
