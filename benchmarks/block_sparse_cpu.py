"""A linear layer with 90 % of its blocks empty beside nn.Linear on a CPU, 64 rows, float32: ratios of median times.

    OMP_NUM_THREADS=2 python benchmarks/block_sparse_cpu.py

Both run in turns in one process. Above 1 the sparse layer is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness.report import table

from structmat import layouts
from structmat.nn import BlockSparseLinear

ROWS, DENSITY = 64, 0.1


def ratio(dense: Callable[[], object], sparse: Callable[[], object], repeats: int) -> float:
    """Dense's median time over the other's."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 3):
        for call, found in zip((dense, sparse), times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 3:  # the first ones warm up
                found.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for n in (1024, 2048, 4096):
        dense, x = torch.nn.Linear(n, n), torch.randn(ROWS, n)
        for block in (32, 64, 128):
            sparse = BlockSparseLinear(n, n, layout=layouts.random((n, n), block, DENSITY, seed=0))
            with torch.no_grad():
                forward = ratio(lambda: dense(x), lambda: sparse(x), 40)  # noqa: B023
            both = ratio(
                lambda: dense(x).square().mean().backward(),  # noqa: B023
                lambda: sparse(x).square().mean().backward(),  # noqa: B023
                15,
            )
            share = sparse.weight().num_params / n**2
            rows.append((n, block, f"{share:.3f}", f"{forward:.2f}", f"{both:.2f}"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(("n", "block", "density", "forward", "forward+backward"), rows))


if __name__ == "__main__":
    main()
