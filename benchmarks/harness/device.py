"""What a result file says of the machine: names, versions, and the rates that floors are computed from."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.problem import DTYPES, matmul_precision
from harness.timing import prepare, take_turns

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Roofs:
    """Measured ceilings of a device: bandwidth of a large copy (read plus written), rate of a large dense product."""

    copy_gb_s: float
    tflop_s: dict[str, float]
    cache: int  # bytes of the last-level cache


def measure_roofs(device: torch.device, dtypes: set[str]) -> Roofs:
    """Measure rates and bandwidth, in this order: the products warm the device up."""
    gpu = device.type == "cuda"
    rates = {}
    for name in sorted(dtypes):
        n = (8192 if DTYPES[name].itemsize == 2 else 4096) if gpu else 1024
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        with matmul_precision(name):
            product = prepare(functools.partial(_product, a, b), 1, device)
            rates[name] = 2e-6 * n**3 / take_turns([product], device, 0.3, least=10, most=200)[0].p50
    elements = 2**29 if gpu else 2**25
    source = torch.randn(elements // 64, device=device, dtype=torch.bfloat16).repeat(64)
    target = torch.empty_like(source)
    copy = prepare(functools.partial(_copy, target, source), 1, device)
    seconds = 1e-6 * take_turns([copy], device, 0.3)[0].p50
    copy_gb_s = 4e-9 * elements / seconds
    del source, target, copy
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20) if gpu else 0
    return Roofs(round(copy_gb_s, 1), {k: round(v, 2) for k, v in rates.items()}, cache)


def _copy(target: torch.Tensor, source: torch.Tensor, i: int) -> torch.Tensor:
    return target.copy_(source)


def _product(a: torch.Tensor, b: torch.Tensor, i: int) -> torch.Tensor:
    return a @ b


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def slug(device: torch.device) -> str:
    """The device in a file name: "h100", "cpu"."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    known = re.search(r"\b(gh200|[abhvl]\d{2,3}s?|rtx \w+)\b", name)
    return re.sub(r"[^a-z0-9]+", "-", known[1] if known else name).strip("-")


def about(device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Device, versions, date and code of a run."""
    return {
        "device": device_name(device),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if device.type == "cuda"
        else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in ("fast_hadamard_transform", "torch_butterfly") if _version(name)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": os.environ.get("STRUCTMAT_COMMIT") or _first_line(["git", "rev-parse", "HEAD"]),
        "sources": sources_digest(),
        "seed": seed,
    }


def sources_digest(root: Path = ROOT) -> str:
    """A digest of the measured code, for copies that have no git history."""
    digest = hashlib.sha256()
    for folder in ("kernels/structmat_kernels", "structmat"):
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".json")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
