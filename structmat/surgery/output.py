"""Where a rewritten checkpoint goes: a file, or a folder that appears when all of it is there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from structmat.surgery.shards import INDEX_SUFFIX, SUFFIX, Checkpoint

# Copied along are configurations and tokenizers, not weights in other formats.
_WEIGHTS = {SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tmp"}
_LARGEST_COPY = 100 << 20


def check_output(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    """Raise unless ``out`` can be written: before hours of work, not after.

    Args:
        checkpoint: what is read.
        out: a file for a file, a folder for a folder.
        force: whether an existing file or checkpoint may be replaced.

    Raises:
        OSError: if the folder that would hold ``out`` does not exist or is not writable.
        ValueError: if ``out`` exists, or is of the wrong kind.
    """
    parent = out if out.is_dir() else out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    if checkpoint.folder is None:
        if out.is_dir():
            raise ValueError(f"{out} is a folder, but {checkpoint.path} is one file: name a file to write")
        if out.exists() and not force:
            raise ValueError(f"{out} exists; give --force to replace it")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but {checkpoint.path} is a folder's checkpoint: name a folder to write")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(f"{out} exists; give --force to replace the checkpoint in it")
    new = {file.path.name for file in checkpoint.files}
    foreign = {p.name for p in out.glob(f"*{SUFFIX}")} - new - _named_by_index(out)
    if foreign:
        raise ValueError(
            f"{out} holds {', '.join(sorted(foreign))}, which the new checkpoint would neither replace nor contain; "
            "remove it, or name another folder"
        )


@contextlib.contextmanager
def staging(out: Path, source: Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes ``out``, or whose files move into an ``out`` that exists, on success.

    After an exception the temporary folder is removed and ``out`` is as before.

    Args:
        out: the folder to make; or one that exists, in which files of the same names are replaced, and the shards that
            an index names are removed.
        source: a folder of which files that are not weights are copied first, unless it is ``out`` itself.

    Yields:
        The folder to write in.
    """
    # Inside an existing folder, because a folder beside it may lie on another file system.
    name = f".{out.name}.{secrets.token_hex(6)}.tmp"
    stage = out / name if out.is_dir() else out.with_name(name)
    stage.mkdir()
    try:
        if source is not None and not (out.is_dir() and out.samefile(source)):
            for path in sorted(source.iterdir()):
                if _comes_along(path):
                    shutil.copy(path, stage / path.name)
        yield stage
        if stage.parent != out:
            os.rename(stage, out)
            return
        stale = _named_by_index(out) - {p.name for p in stage.iterdir()}
        # The index last: until then the old one names the old shards.
        for path in sorted(stage.iterdir(), key=lambda p: (p.name.endswith(INDEX_SUFFIX), p.name)):
            os.replace(path, out / path.name)
        for old in stale:
            (out / old).unlink(missing_ok=True)
        stage.rmdir()
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _comes_along(path: Path) -> bool:
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= _LARGEST_COPY
    )


def _named_by_index(folder: Path) -> set[str]:
    """The indices in a folder and the shards that they name."""
    names: set[str] = set()
    for path in folder.glob(f"*{INDEX_SUFFIX}"):
        names.add(path.name)
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            shards = json.loads(path.read_bytes())["weight_map"].values()
            names.update(name for name in shards if isinstance(name, str) and Path(name).name == name)
    return names
