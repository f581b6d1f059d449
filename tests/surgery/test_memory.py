"""How much memory the command takes for a checkpoint larger than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
SHARDS, PER_SHARD, SIZE = 4, 8, 4096

# VmHWM, not ru_maxrss: the latter counts what the parent process held when it started this one.
PEAK = """
import sys
{code}
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""


def peak(code, *args):
    """Run code in a process of its own and return the most memory that it held, in bytes."""
    command = [sys.executable, "-c", PEAK.format(code=code), *map(str, args)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """2 GiB of float32 in four shards of eight 4096 x 4096 tensors."""
    folder = tmp_path_factory.mktemp("checkpoint")
    weight_map = {}
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for shard in range(SHARDS):
        names = [f"layers.{shard * PER_SHARD + i}.up_proj.weight" for i in range(PER_SHARD)]
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        safetensors.torch.save_file({name: weight.roll(i, 0) for i, name in enumerate(names)}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [
        ["--structure", "blockdiagonal"],  # all 32 tensors: nothing may pile up
        # One in each shard, because a projection takes seconds.
        ["--nblocks", "16", "--ratio", "0.25", "--include", "layers.[08].*", "--include", "layers.[12][64].*"],
        # One whole eigendecomposition of the size of a tensor, in double precision.
        ["--structure", "lowrank", "--ratio", "0.25", "--include", "layers.9.*"],
    ],
    ids=["blockdiagonal", "monarch", "lowrank"],
)
def test_peak_memory_of_compress(checkpoint, tmp_path, options):
    shard = max(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert shard > 500 << 20
    base = peak("import structmat.cli")
    used = peak(
        "import structmat.cli\nassert structmat.cli.main(sys.argv[1:]) == 0",
        "compress",
        checkpoint,
        tmp_path / "out",
        *options,
    )
    print(f"import {base >> 20} MiB, compress {used >> 20} MiB, largest shard {shard >> 20} MiB")
    assert used < base + 1.5 * shard
    for path in (tmp_path / "out").iterdir():
        path.unlink()
