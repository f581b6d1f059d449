"""The kernels compile for a GPU where there is none, and keep to its registers and its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists(),
    reason="this Triton has no assembler for NVIDIA's chips",
)

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")
#: Bytes that a program may have on an H100.
SHARED = 232_448
#: Bytes of a thread's stack, where registers are spilled to: of the filter's gradient, and of the others.
STACK = {"correlate": 1536}
OTHERS = 512


def compiled(*names):
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *names], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_short_convolutions_and_pointwise_operations():
    found = compiled("short_conv", "pointwise")
    assert {row["kernel"] for row in found} == {"_forward", "_backward", "_transpose"}
    assert all(row["stack"] == 0 and row["shared"] <= SHARED for row in found)


@pytest.mark.slow
def test_long_convolutions():
    """Those in float32 grade spill, which is known: "auto" does not take them."""
    found = compiled("fft_conv")
    wanted = {"convolve", "correlate", "gradients", "largest", "windows", "transform", "carry", "combine"}
    assert {row["kernel"] for row in found} == wanted
    for row in found:
        assert row["shared"] <= SHARED, row
        assert row["stack"] <= STACK.get(row["kernel"], OTHERS) or "float32" in row["for"], row
