"""What a checkpoint holds, from its header alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from structmat.surgery.candidates import natural
from structmat.surgery.report import align, share
from structmat.surgery.shards import Checkpoint
from structmat.surgery.spec import LayerSpec, build, layer_prefix, structure_name, tensor_names
from structmat.surgery.stream import DTYPES


@dataclass(frozen=True)
class LayerInfo:
    """A weight of a checkpoint.

    Attributes:
        name: the layer's name.
        structure: in words; ``dense`` for a plain matrix.
        shape: (out, in); a dense tensor's own sizes.
        params: stored numbers, without the bias.
        dtype: the format's name.
        share: ``params`` relative to a dense weight.
    """

    name: str
    structure: str
    shape: tuple[int, ...]
    params: int
    dtype: str
    share: float


@dataclass(frozen=True)
class Contents:
    """The layers of a checkpoint and its totals.

    Attributes:
        path: the checkpoint.
        layers: structured layers, and dense weights of two and more dimensions, in the order of their names.
        other_tensors: how many tensors belong to none of them: biases, norms, buffers.
        other_params: how many numbers these hold.
        params: all stored numbers.
        dense_params: the same, were every layer dense.
        nbytes: length of all tensors.
    """

    path: str
    layers: tuple[LayerInfo, ...]
    other_tensors: int
    other_params: int
    params: int
    dense_params: int
    nbytes: int

    def to_json(self) -> str:
        """The contents as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "structure", "dtype", "shape", "params", "of dense")]
        for layer in self.layers:
            size = "x".join(map(str, layer.shape))
            rows.append((layer.name, layer.structure, layer.dtype, size, f"{layer.params:,}", f"{layer.share:.1%}"))
        rows.append((f"{self.other_tensors} other tensors", "", "", "", f"{self.other_params:,}", ""))
        rows.append(("total", "", "", "", f"{self.params:,}", share(self.params, self.dense_params)))
        structured = sum(layer.structure != "dense" for layer in self.layers)
        return f"{align(rows, left=3)}\n{structured} structured layers, {self.nbytes:,} bytes of tensors"


def inspect_checkpoint(path: str) -> Contents:
    """List the layers of a checkpoint; reads headers only.

    Args:
        path: a safetensors file, or the folder or index of a checkpoint in shards.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is damaged, or its description of structured layers is malformed.
    """
    checkpoint = Checkpoint(path)
    layers: list[LayerInfo] = []
    taken: set[str] = set()
    dense_params = 0
    for name, spec in checkpoint.layers.items():
        keys = {checkpoint.resolve(key) for key in tensor_names(spec.matrix, layer_prefix(name))} - taken
        taken |= keys
        entries = [checkpoint.entry(key) for key in keys]
        params = sum(e.numel for e in entries if not e.dtype.startswith(("I", "U")))
        size = spec.shape[0] * spec.shape[1]
        dtype = next((e.dtype for e in entries if not e.dtype.startswith(("I", "U"))), "-")
        layers.append(LayerInfo(name, _structure(checkpoint, name, spec), spec.shape, params, dtype, params / size))
        dense_params += size if keys else 0  # a module that stands under two names is stored, and counted, once
    others, other_params = 0, 0
    for tensor in checkpoint.where:
        if tensor in taken:
            continue
        entry = checkpoint.entry(tensor)
        dense_params += entry.numel
        if tensor.endswith(".weight") and len(entry.shape) > 1:
            name = tensor.removesuffix(".weight")
            layers.append(LayerInfo(name, "dense", entry.shape, entry.numel, entry.dtype, 1.0))
        else:
            others, other_params = others + 1, other_params + entry.numel
    entries = [checkpoint.entry(name) for name in checkpoint.where]
    return Contents(
        str(path),
        tuple(sorted(layers, key=lambda layer: natural(layer.name))),
        others,
        other_params,
        sum(entry.numel for entry in entries),
        dense_params,
        sum(entry.nbytes for entry in entries),
    )


def _structure(checkpoint: Checkpoint, name: str, spec: LayerSpec) -> str:
    def shaped(key: str) -> Tensor:
        entry = checkpoint.entry(checkpoint.resolve(key))
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    try:
        return structure_name(build(spec.matrix, layer_prefix(name), shaped))
    except Exception:  # a class that is not imported, or one that checks values: its name must do
        return str(spec.matrix.get("class"))
