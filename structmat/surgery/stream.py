"""Safetensors files read and written one tensor at a time.

The safetensors library maps a whole file into memory, whose pages count as the process's own, and writes from a
dictionary of all tensors. Here a file is read by plain reads and written in place, tensor by tensor, so that a
checkpoint larger than the memory can be rewritten. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structmat.surgery.atomic import atomic_write

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
#: torch's dtypes by the format's names; a name that is not here is carried along, but not read.
DTYPES: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _NAMES.items() if hasattr(torch, v)}
_DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 23


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: the format's name, such as "BF16".
        shape: sizes.
        nbytes: length in bytes.
        start: where it begins, from the start of the file; 0 in a file that is not written yet.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """The entry of a tensor (of any device, meta included).

        Raises:
            ValueError: if the format has no such dtype.
        """
        if tensor.dtype not in _DTYPE_NAMES:
            hint = "; convert it to complex64" if tensor.dtype.is_complex else ""
            raise ValueError(f"{name} has dtype {tensor.dtype}, which a safetensors file cannot hold{hint}")
        return cls(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.itemsize)


class TensorFile:
    """A safetensors file whose header has been read and checked.

    Args:
        path: the file.

    Attributes:
        path: the file.
        metadata: the header's own strings.
        entries: the tensors by name, in the header's order.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a safetensors file, or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise self._broken("it does not begin with the length of a header")
            if 8 + length > size:
                raise self._broken(f"its header of {length} bytes is cut off: the file has {size} bytes")
            try:
                header = json.loads(file.read(length))
            except (ValueError, RecursionError) as error:
                raise self._broken("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict):
            raise self._broken("its metadata are not a JSON object")
        self.entries = {name: self._entry(name, item, 8 + length) for name, item in header.items()}
        position = 8 + length
        for entry in sorted(self.entries.values(), key=lambda e: (e.start, e.nbytes)):
            if entry.start != position:
                raise self._broken("its tensors overlap or leave gaps")
            position += entry.nbytes
        if position > size:
            raise ValueError(f"{self.path} is cut short: its header describes {position} bytes, the file has {size}")
        if position < size:
            raise self._broken(f"{size - position} bytes follow its tensors")

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a safetensors file: {why}")

    def _entry(self, name: str, item: Any, base: int) -> Entry:
        try:
            begin, end = (int(v) for v in item["data_offsets"])
            entry = Entry(str(item["dtype"]), tuple(int(n) for n in item["shape"]), end - begin, base + begin)
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(f"the header's entry of {name!r} is malformed") from error
        known = DTYPES.get(entry.dtype)
        if min(entry.nbytes, 0, *entry.shape) < 0 or (known and entry.nbytes != entry.numel * known.itemsize):
            raise self._broken(f"{name!r} of shape {list(entry.shape)} and {entry.dtype} has {entry.nbytes} bytes")
        return entry

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            ValueError: if torch has no such dtype, or the file has become shorter.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {name} has dtype {entry.dtype}, which torch {torch.__version__} lacks")
        _check_byte_order()
        data = bytearray(entry.nbytes)
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != entry.nbytes:
                raise ValueError(f"{self.path} is cut short within {name}")
        dtype = DTYPES[entry.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, a few MiB at a time."""
        entry = self.entries[name]
        left = entry.nbytes
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(f"{self.path} is cut short within {name}")
                left -= len(chunk)
                yield chunk


class TensorWriter:
    """Writes the tensors of one file, in any order; made by :func:`tensor_writer`.

    Args:
        file: a binary file, open for writing.
        entries: every tensor that will be written.
        metadata: strings for the header.
    """

    def __init__(self, file: Any, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._entries: dict[str, Entry] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        # As the reference implementation lays tensors out: wide dtypes first, so that all of them are aligned.
        for name in sorted(entries, key=lambda name: (-_itemsize(entries[name]), name)):
            entry = dataclasses.replace(entries[name], start=position)
            position += entry.nbytes
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [entry.start, position],
            }
            self._entries[name] = entry
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _MAX_HEADER:
            raise ValueError(f"the header would have {len(text)} bytes, the format allows {_MAX_HEADER}")
        self._base = 8 + len(text)
        self.missing = set(self._entries)
        file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device.

        Raises:
            ValueError: if its dtype or shape is not what was announced.
        """
        entry, told = self._entries[name], Entry.of(name, tensor)
        if (told.dtype, told.shape) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} was announced as {entry.dtype} {entry.shape}, not {told.dtype} {told.shape}")
        data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        self.write_chunks(name, [data.view(torch.uint8).numpy().data])

    def write_chunks(self, name: str, chunks: Iterable[Any]) -> None:
        """Write one tensor as pieces of its bytes."""
        self._file.seek(self._base + self._entries[name].start)
        written = sum(self._file.write(chunk) for chunk in chunks)
        if written != self._entries[name].nbytes:
            raise ValueError(f"{name} has {written} bytes, {self._entries[name].nbytes} were announced")
        self.missing.discard(name)


@contextlib.contextmanager
def tensor_writer(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Iterator[TensorWriter]:
    """Write a safetensors file tensor by tensor, under a temporary name until it is complete.

    After an exception, an interruption from the keyboard included, the temporary file is removed and whatever was at
    ``path`` is as before.

    Args:
        path: the file to make or replace.
        entries: every tensor that will be written.
        metadata: strings for the header.

    Yields:
        The writer.

    Raises:
        OSError: if the file cannot be written.
        ValueError: on leaving, if a tensor was not written.

    Example:
        >>> import os, tempfile, torch
        >>> from structmat.surgery.stream import Entry, TensorFile, tensor_writer
        >>> path = os.path.join(tempfile.mkdtemp(), "ones.safetensors")
        >>> with tensor_writer(path, {"x": Entry.of("x", torch.ones(2))}, {"format": "pt"}) as writer:
        ...     writer.write("x", torch.ones(2))
        >>> TensorFile(path).read("x")
        tensor([1., 1.])
    """
    _check_byte_order()
    with atomic_write(path) as file:
        writer = TensorWriter(file, entries, metadata)
        yield writer
        if writer.missing:
            raise ValueError(f"{path} was left without {', '.join(sorted(writer.missing))}")


def _itemsize(entry: Entry) -> int:
    return DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian, and so must the machine be")
