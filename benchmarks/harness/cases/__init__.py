"""Every problem of the benchmark, the most telling first: what is left out when time is short stands last."""

from __future__ import annotations

from harness.cases import linear, sparse, transforms
from harness.problem import FORWARD, TRAINING, Problem

BOTH = (FORWARD, TRAINING)


def gpu_problems() -> list[Problem]:
    """What `benchmarks/kernels.py` measures on a GPU."""
    found = [
        linear.square(n, 8192, "bf16", way, eager=n in (1024, 4096)) for n in (4096, 1024, 2048, 8192) for way in BOTH
    ]
    found += [transforms.hadamard(n, tokens, "bf16") for n in (1024, 2048, 4096, 8192) for tokens in (8192, 32768)]
    found += [sparse.block_sparse(4096, block, 8192, way) for block in (128, 64, 32) for way in BOTH]
    found += [
        linear.square(n, tokens, "bf16", eager=True) for n in (4096, 1024, 2048, 8192) for tokens in (1, 4, 16, 64)
    ]
    found += [linear.square(n, 32768, "bf16", way) for n in (4096, 1024, 2048, 8192) for way in BOTH]
    found += [linear.square(n, 4096, "bf16", way) for n in (1024, 2048) for way in BOTH]
    found += [sparse.block_sparse(4096, block, 32768, way) for block in (128, 64, 32) for way in BOTH]
    found += [linear.compiled(4096, 8192, FORWARD), linear.compiled(4096, 8192, TRAINING)]
    found += [transforms.butterfly(4096, 8192, dtype, way) for dtype in ("bf16", "fp32") for way in BOTH]
    found += [
        linear.square(n, 8192, dtype, way) for dtype in ("fp16", "tf32", "fp32") for n in (4096, 1024) for way in BOTH
    ]
    found += [linear.feed_forward(1024, 4096, 8192), linear.block_diagonal(4096, 8192)]
    found += [transforms.hadamard(4096, 8192, "bf16", TRAINING), transforms.hadamard(4096, 8192, "fp32")]
    found += [transforms.hadamard(32768, 2048, "bf16")]
    found += [sparse.block_sparse(8192, block, 8192, way) for block in (128, 32) for way in BOTH]
    return [*found, linear.compiled(1024, 8192, FORWARD)]


def quick_problems() -> list[Problem]:
    """One of each, for a check that everything runs."""
    return [
        linear.square(1024, 8192, "bf16", eager=True),
        linear.square(1024, 8192, "bf16", TRAINING),
        linear.square(4096, 8192, "bf16"),
        linear.square(4096, 16, "bf16", eager=True),
        transforms.hadamard(4096, 8192, "bf16"),
        sparse.block_sparse(4096, 128, 8192),
        transforms.butterfly(4096, 8192, "bf16"),
    ]


def cpu_problems() -> list[Problem]:
    """The same shapes reduced, for the reference paths on a CPU."""
    found = [linear.square(n, 512, "fp32", way) for n in (256, 1024) for way in BOTH]
    found += [linear.square(1024, tokens, "fp32") for tokens in (1, 16)]
    found += [transforms.hadamard(1024, 512, "fp32"), transforms.butterfly(1024, 512, "fp32")]
    found += [sparse.block_sparse(1024, block, 512, dtype="fp32") for block in (128, 32)]
    return [*found, linear.feed_forward(256, 1024, 512, "fp32"), linear.block_diagonal(1024, 512, "fp32")]


def check_keys(problems: list[Problem]) -> list[Problem]:
    """The same list; raises where two problems could not be told apart in a result file."""
    keys = [problem.key for problem in problems]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"problems with the same key: {sorted(twice)}")
    return problems
