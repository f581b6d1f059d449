"""Checkpoints: one safetensors file, or the shards that an index names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from structmat.surgery.spec import KEY, LayerSpec, parse_layers
from structmat.surgery.stream import Entry, TensorFile

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint: where they are, and which structured layers they make.

    Args:
        path: a safetensors file; the ``*.safetensors.index.json`` of a sharded checkpoint; or a folder that holds
            exactly one index, or exactly one safetensors file.

    Attributes:
        index: the index's path, or None.
        folder: the folder, if the checkpoint is one (or has an index).
        files: the shards, in the order of their names.
        where: the shard of every tensor.
        layers: the structured layers.
        aliases: names of tensors that were saved once under another name, and that name.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is damaged, or the checkpoint is not one of those described.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = Path(path)
        self.index: Path | None = None
        self.folder: Path | None = None
        self.index_metadata: dict[str, Any] = {}
        if path.is_dir():
            self.folder = path
            path = _find(path)
        if path.name.endswith(".index.json"):
            self.index, self.folder = path, path.parent
            weight_map = self._read_index()
            self.files = [self._shard(name) for name in sorted(set(weight_map.values()))]
        else:
            weight_map = {}
            self.files = [TensorFile(path)]
        self.where: dict[str, TensorFile] = {}
        self.layers: dict[str, LayerSpec] = {}
        aliases: dict[str, str] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.where:
                    raise ValueError(f"{name} is in both {self.where[name].path} and {file.path}")
                self.where[name] = file
            self.layers |= parse_layers(file.metadata, str(file.path))
            aliases |= {k: v for k, v in file.metadata.items() if k != KEY}
        for name, shard in weight_map.items():
            if name not in self.where:
                raise ValueError(f"{self.index} says that {shard} holds {name}, which it does not")
        # As safetensors.torch.save_model records them, among the metadata.
        self.aliases = {k: v for k, v in aliases.items() if v in self.where and k not in self.where}

    def entry(self, name: str) -> Entry:
        """The entry of a tensor."""
        return self.where[name].entries[name]

    def resolve(self, name: str) -> str:
        """The name under which a tensor is stored.

        Raises:
            ValueError: if there is no such tensor.
        """
        stored = self.aliases.get(name, name)
        if stored not in self.where:
            raise ValueError(f"{self.path} has no tensor {name}")
        return stored

    def _read_index(self) -> dict[str, str]:
        assert self.index is not None
        try:
            data = json.loads(self.index.read_bytes())
            weight_map = data["weight_map"]
            self.index_metadata = dict(data.get("metadata") or {})
            if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
                raise TypeError("weight_map must be a non-empty object of strings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.index} is not the index of a sharded checkpoint: {error!r}") from error
        return weight_map

    def _shard(self, name: str) -> TensorFile:
        assert self.index is not None
        if Path(name).name != name:  # a path could lead out of the folder, and the output is written by these names
            raise ValueError(f"{self.index} names the shard {name!r}, which is not a plain file name")
        path = self.index.parent / name
        if not path.is_file():
            raise ValueError(f"{self.index} names the shard {name}, which is not there")
        return TensorFile(path)


def _find(folder: Path) -> Path:
    """The index of a folder, or its only safetensors file."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for suffix in (INDEX_SUFFIX, SUFFIX):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ValueError(f"{folder} holds {', '.join(found)}: name one of them")
    raise ValueError(f"{folder} holds neither a *{INDEX_SUFFIX} nor a *{SUFFIX} file")
