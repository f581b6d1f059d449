"""CPU time of the Monarch projection against lazylinop's butterfly factorisation, and the quality of both.

Run with `pip install lazylinop psutil pandas` for the comparison; without, only this library is timed. CPU time is
that of the whole process (all threads), the quantity that does not depend on how many cores are free.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
import warnings

import numpy as np
import torch

import structmat as sm


def clock(call, repeats: int) -> tuple[object, list[float], list[float]]:
    """The last result, and CPU and wall seconds of each repeat."""
    cpu, wall, result = [], [], None
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        result = call()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return result, cpu, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--nblocks", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    n, nblocks = args.size, args.nblocks
    W = np.random.default_rng(0).standard_normal((n, n))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float64, {n} x {n}")

    config = sm.MonarchConfig(nblocks=nblocks, rank=1)
    tensor = torch.from_numpy(W)
    ours, cpu, wall = clock(lambda: sm.Monarch.from_dense(tensor, **config.resolve(n, n)), args.repeats)
    error = np.linalg.norm(W - ours.to_dense().numpy()) / np.linalg.norm(W)
    print(
        f"structmat    cpu {statistics.median(cpu):6.2f} s  wall {statistics.median(wall):6.2f} s  error {error:.12f}"
    )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lazylinop warns of its own optional parts
            from lazylinop.butterfly import Chain, ksd
    except ImportError as missing:
        print(f"lazylinop is not compared: {missing}; pip install lazylinop psutil pandas")
        return
    chain = Chain.monarch((n, n), nblocks, nblocks)
    theirs, their_cpu, their_wall = clock(lambda: ksd(W, chain), args.repeats)
    error = np.linalg.norm(W - theirs.toarray()) / np.linalg.norm(W)
    version = importlib.metadata.version("lazylinop")
    print(
        f"lazylinop    cpu {statistics.median(their_cpu):6.2f} s  wall {statistics.median(their_wall):6.2f} s  "
        f"error {error:.12f}  (version {version})"
    )
    print(f"ratio of CPU times, lazylinop / structmat: {statistics.median(their_cpu) / statistics.median(cpu):.2f}")


if __name__ == "__main__":
    main()
