"""The moments of a model's layers, as a mapping and as a file.

The file is a safetensors file. Under the key ``structmat.calibration`` its metadata hold ``{"version": 1, "layers":
{name: layer}, "aliases": {name: first name}, "gradients": bool}``. A layer has its ``shape`` (out, in) and, unless it
saw no input, its ``count`` and the names of the tensors ``inputs``, ``mean`` and ``outputs`` (or null). Complex tensors
are stored as pairs of real numbers, in a last dimension of size 2: the format has no complex128.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structmat.projection.moments import Moments
from structmat.surgery.stream import Entry, TensorFile, tensor_writer

_KEY = "structmat.calibration"
_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Mapping[str, Moments]):
    """The moments of a model's layers by dotted name, made by :func:`calibrate`.

    A mapping: it holds the layers that saw an input, under their first names; a lookup finds other names of a layer
    that stands in several places too. Layers that were given the same tensors share the moments' memory.

    Attributes:
        moments: of the layers that saw an input.
        shapes: (out, in) of every layer that was watched.
        aliases: for other names of a layer, its first.
        gradients: whether the moments of the output gradients were collected.

    Example:
        >>> import torch
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> calibration = surgery.calibrate(model, [torch.randn(50, 8), torch.randn(30, 8)])
        >>> calibration
        Calibration(2 layers, 80 inputs each)
        >>> calibration["2"].inputs.shape
        torch.Size([16, 16])
    """

    moments: Mapping[str, Moments]
    shapes: Mapping[str, tuple[int, int]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    gradients: bool = False

    def __getitem__(self, name: str) -> Moments:
        first = self.aliases.get(name, name)
        if first in self.moments:
            return self.moments[first]
        if first in self.shapes:
            raise KeyError(f"{name} saw no input during the calibration: calibrate on data that reaches it")
        raise KeyError(f"the calibration has no layer {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def __repr__(self) -> str:
        counts = sorted(moments.count for moments in self.values()) or [0]
        inputs = f"{counts[0]} inputs each" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]} inputs"
        parts = [f"{len(self)} layer{'' if len(self) == 1 else 's'}", inputs]
        if self.gradients:
            missing = len(self.without_gradients)
            parts.append(f"gradients of all but {missing}" if missing else "with gradients")
        if self.unseen:
            parts.append(f"{len(self.unseen)} without input")
        return f"Calibration({', '.join(parts)})"

    @property
    def unseen(self) -> tuple[str, ...]:
        """The layers that saw no input, such as experts to which no token went."""
        return tuple(name for name in self.shapes if name not in self.moments)

    @property
    def without_gradients(self) -> tuple[str, ...]:
        """Where gradients were collected, the layers that none reached: their ``outputs`` are None."""
        return tuple(name for name, m in self.items() if m.outputs is None) if self.gradients else ()

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise unless these layers can be projected with this calibration.

        Args:
            shapes: (out, in) of layers by name.

        Raises:
            ValueError: if a layer is not in the calibration, saw no input, or has another shape; all are named.
        """
        problems = []
        for name, shape in shapes.items():
            first = self.aliases.get(name, name)
            if first not in self.shapes:
                problems.append(f"{name}: not in the calibration")
            elif tuple(shape) != self.shapes[first]:
                problems.append(f"{name}: {tuple(shape)} in the model, {self.shapes[first]} in the calibration")
            elif first not in self.moments:
                problems.append(f"{name}: saw no input during the calibration")
        if problems:
            more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise ValueError(
                f"the calibration ({len(self.shapes)} layers) is not of these layers: it is of another model, or its "
                "data did not reach them. Exclude them with filter_fn, or calibrate this model:\n  "
                + "\n  ".join(problems[:8] + more)
            )

    def to(self, device: torch.device | str) -> Calibration:
        """The same calibration on another device."""
        moved: dict[int, Tensor] = {}

        def move(t: Tensor) -> Tensor:
            if id(t) not in moved:
                moved[id(t)] = t.to(device)
            return moved[id(t)]

        moments = {
            name: Moments(move(m.inputs), move(m.mean), m.count, None if m.outputs is None else move(m.outputs))
            for name, m in self.items()
        }
        return Calibration(moments, self.shapes, self.aliases, self.gradients)

    def __add__(self, other: Calibration) -> Calibration:
        """The calibration on the data of both, for passes that ran apart; the layers must be the same.

        Raises:
            ValueError: if the layers differ, or only one has gradients.
        """
        if not isinstance(other, Calibration):
            return NotImplemented
        if dict(self.shapes) != dict(other.shapes) or self.gradients != other.gradients:
            raise ValueError(
                "calibrations that are added must be of the same layers, and both with gradients or both without; got "
                f"{self!r} and {other!r}"
            )
        summed: dict[Any, Tensor] = {}

        def mix(a: Tensor | None, b: Tensor | None, share: float) -> Tensor | None:
            if a is None or b is None:  # nothing is a zero matrix: no gradient came
                return a * share if a is not None else b * (1 - share) if b is not None else None
            key = (id(a), id(b), share)
            if key not in summed:
                summed[key] = torch.lerp(b.to(a.device), a, share)
            return summed[key]

        moments: dict[str, Moments] = {}
        for name in self.shapes:
            a, b = self.moments.get(name), other.moments.get(name)
            if a is not None and b is not None:
                share = a.count / (a.count + b.count)
                parts: Any = [mix(getattr(a, k), getattr(b, k), share) for k in ("inputs", "mean", "outputs")]
                moments[name] = Moments(parts[0], parts[1], a.count + b.count, parts[2])
            elif a is not None or b is not None:
                moments[name] = a or b  # pyright: ignore[reportArgumentType]
        return Calibration(moments, self.shapes, self.aliases, self.gradients)

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; numbers are kept exactly, shared tensors are stored once.

        Args:
            path: the file to make or replace.

        Raises:
            OSError: if the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}

        def store(kind: str, t: Tensor | None) -> str | None:
            if t is None:
                return None
            if id(t) not in names:
                names[id(t)] = f"{len(tensors)}.{kind}"
                tensors[names[id(t)]] = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
            return names[id(t)]

        layers: dict[str, dict[str, Any]] = {name: {"shape": list(shape)} for name, shape in self.shapes.items()}
        for name, m in self.items():
            layers[name] |= {"count": m.count} | {k: store(k, getattr(m, k)) for k in ("inputs", "mean", "outputs")}
        text = {"version": _VERSION, "layers": layers, "aliases": dict(self.aliases), "gradients": self.gradients}
        entries = {name: Entry.of(name, t) for name, t in tensors.items()}
        with tensor_writer(path, entries, {"format": "pt", _KEY: json.dumps(text)}) as writer:
            for name, t in tensors.items():
                writer.write(name, t)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote, to the CPU.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, not a calibration, or of an unknown version.
        """
        file = TensorFile(path)
        if _KEY not in file.metadata:
            raise ValueError(f"{path} is not a calibration: its header has no {_KEY!r}")
        read: dict[str, Tensor] = {}

        def tensor(name: str) -> Tensor:
            if name not in read:
                t, matrix = file.read(name), not name.endswith(".mean")
                read[name] = torch.view_as_complex(t) if t.ndim == 2 + matrix else t
            return read[name]

        try:
            text: dict[str, Any] = json.loads(file.metadata[_KEY])
            if text["version"] != _VERSION:
                raise ValueError(f"it is of version {text['version']!r}, this structmat reads {_VERSION}")
            shapes = {name: (int(item["shape"][0]), int(item["shape"][1])) for name, item in text["layers"].items()}
            moments = {}
            for name, item in text["layers"].items():
                if "count" in item:
                    outputs = None if item["outputs"] is None else tensor(item["outputs"])
                    m = Moments(tensor(item["inputs"]), tensor(item["mean"]), item["count"], outputs)
                    m_out = shapes[name][0] if outputs is None else len(outputs)
                    if (m_out, len(m.mean)) != shapes[name]:
                        raise ValueError(f"the moments of {name} are not of its shape {shapes[name]}")
                    moments[name] = m
            return cls(moments, shapes, dict(text["aliases"]), bool(text["gradients"]))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration that can be read: {error}") from error
