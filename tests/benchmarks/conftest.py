"""Makes `import harness` work in these tests, and loads the scripts beside it."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# The folder is on the path only meanwhile: its kernels.py has a name that others use. What is imported stays imported.
sys.path.insert(0, str(BENCHMARKS))
try:
    importlib.import_module("harness")
finally:
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def script():
    """Loads a script of benchmarks/ by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
