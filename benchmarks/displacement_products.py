"""Time of a Toeplitz product against n, beside torch's dense product, SciPy's matmul_toeplitz and the bare FFTs.

    OMP_NUM_THREADS=2 python benchmarks/displacement_products.py

Random Toeplitz matrices in single precision, n = 2^8 to 2^20, with one vector and with 16. All methods run in this one
process, in turns; the times are quantiles over the turns. "three FFTs" are those of NumPy and SciPy of the padded size:
two of real numbers and an inverse for each vector, no product and no copies. The slope is that of log time over log n
from n = 2^13 on (2^10 to 2^13 of dense products, which end there).
Writes results/displacement-products.{csv,json}; the load of the machine before and after is in the JSON file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from harness.report import table, write_csv, write_json

from structmat import Toeplitz
from structmat.matrices.displacement._convolution import good_size

HERE = Path(__file__).resolve().parent
COLUMNS = ("n", "vectors", "method", "p20_s", "p50_s", "p80_s", "repeats")
LARGEST_DENSE = 2**13


def ffts(module: Any, size: int, vectors: int) -> Callable[[], Any]:
    """One transform of the diagonals, one of each vector, one inverse of each."""
    one, many = (np.random.default_rng(0).standard_normal((k, size)).astype(np.float32) for k in (1, vectors))
    spectrum = module.rfft(many)
    return lambda: (module.rfft(one), module.rfft(many), module.irfft(spectrum, size))


def methods(n: int, vectors: int) -> dict[str, Callable[[], Any]]:
    T, x = Toeplitz.random((n, n)), torch.randn(vectors, n)
    column, row, columns = T.column.numpy(), T.row.numpy(), x.T.contiguous().numpy()
    size = good_size(2 * n - 1)
    found: dict[str, Callable[[], Any]] = {
        "structmat.Toeplitz": lambda: T.linear(x),
        "scipy matmul_toeplitz": lambda: scipy.linalg.matmul_toeplitz((column, row), columns, check_finite=False),
        "three FFTs, scipy": ffts(scipy.fft, size, vectors),
        "three FFTs, numpy": ffts(np.fft, size, vectors),
    }
    if n <= LARGEST_DENSE:
        W = T.to_dense()
        found["torch dense"] = lambda: x @ W.T
    return found


def measure(n: int, vectors: int, budget: float) -> list[dict[str, Any]]:
    runs = methods(n, vectors)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(201):  # in turns, so that what else the machine does meets all of them
        for name, run in runs.items():
            if len(times[name]) > 7 and sum(times[name]) > budget:
                continue
            start = time.perf_counter()
            run()
            if turn:  # the first makes workspaces
                times[name].append(time.perf_counter() - start)
    return [
        {"n": n, "vectors": vectors, "method": name, "repeats": len(spent)}
        | {f"p{q}_s": float(f"{np.quantile(spent, q / 100):.4g}") for q in (20, 50, 80)}
        for name, spent in times.items()
    ]


def slope(rows: list[dict[str, Any]], method: str, vectors: int) -> float:
    low, high = (2**10, LARGEST_DENSE) if method == "torch dense" else (2**13, 2**20)
    points = [
        (row["n"], row["p50_s"])
        for row in rows
        if (row["method"], row["vectors"]) == (method, vectors) and low <= row["n"] <= high
    ]
    return round(float(np.polyfit(*np.log(np.array(points)).T, 1)[0]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=20, help="log2 of the largest n, at least 14")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the repeats of a method")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    load, rows = os.getloadavg(), []
    for vectors, largest in ((1, args.largest), (16, min(17, args.largest))):
        for log in range(8, largest + 1):
            new = measure(2**log, vectors, args.budget)
            rows += new
            print(f"\nn = 2^{log}, {vectors} vectors")
            print(table(("method", "p20_s", "p50_s"), [[r["method"], r["p20_s"], r["p50_s"]] for r in new]), flush=True)
    write_csv(args.out / "displacement-products.csv", rows, COLUMNS)

    def ratio(n: int, vectors: int, above: str, below: str) -> float:
        p50 = {r["method"]: r["p50_s"] for r in rows if (r["n"], r["vectors"]) == (n, vectors)}
        return round(p50[above] / p50[below], 2)

    ours, largest = "structmat.Toeplitz", 2**args.largest
    names = sorted({r["method"] for r in rows})
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("structmat", "torch", "numpy", "scipy")},
        "load_before_and_after": [load, os.getloadavg()],
        "slopes": {f"{name}, {v} vectors": slope(rows, name, v) for name in names for v in (1, 16)},
        f"dense over Toeplitz, n = {LARGEST_DENSE}, 16 vectors": ratio(LARGEST_DENSE, 16, "torch dense", ours),
        f"Toeplitz over three FFTs of numpy, n = {largest}": ratio(largest, 1, ours, "three FFTs, numpy"),
        f"Toeplitz over three FFTs of scipy, n = {largest}": ratio(largest, 1, ours, "three FFTs, scipy"),
        f"Toeplitz over matmul_toeplitz, n = {largest}": ratio(largest, 1, ours, "scipy matmul_toeplitz"),
    }
    write_json(args.out / "displacement-products.json", facts)
    print(f"\n{facts}")


if __name__ == "__main__":
    main()
