"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a temporary binary file beside ``path``; rename it on success, remove it on any exception.

    Args:
        path: the file to make or replace.

    Yields:
        The open file.

    Raises:
        OSError: if the folder does not exist or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # Not the tempfile module: its files are readable by their owner only, and keep that when renamed.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        file = open(temporary, "xb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # of the name that the caller knows
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the renaming could leave a file of zeros
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
