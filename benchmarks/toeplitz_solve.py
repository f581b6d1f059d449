"""Time of Toeplitz solves against n, and what they leave of the residual, beside dense LU and SciPy's Levinson.

    OMP_NUM_THREADS=2 python benchmarks/toeplitz_solve.py

Double precision, one right-hand side. "decaying": t_k = (1 + k)^-1.1 below and 0.7 (1 + k)^-1.3 above the diagonal;
"exponential": 0.9^|k|, symmetric; "random": standard normal entries, which no circulant preconditioner helps, so that
``Toeplitz.solve`` eliminates. "elimination" is that way for all of them, "levinson" structmat.numeric's recursion. All
methods run in this one process, in turns; the times are quantiles over the turns, of which a slow method has fewer.
Residuals are ``|b - T x| / |b|``. Slopes are those of log time over log n, from the n that is written with them on.
Writes results/toeplitz-solve.{csv,json}; the load of the machine before and after is in the JSON file.
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
import scipy.linalg
import torch
from harness.report import table, write_csv, write_json
from torch import Tensor

from structmat import Toeplitz
from structmat.matrices.displacement._toeplitz_solve import _eliminate
from structmat.numeric import levinson

HERE = Path(__file__).resolve().parent
COLUMNS = ("matrix", "n", "method", "p20_s", "p50_s", "p80_s", "repeats", "residual")
#: Largest log2 n by method, for time and memory.
LARGEST = {"torch dense LU": 13, "elimination": 13, "levinson": 13}
#: Largest log2 n by matrix, where that is less than is asked for.
LARGEST_OF = {"random": 13}


def matrix(kind: str, n: int) -> Toeplitz:
    k = torch.arange(n, dtype=torch.float64)
    if kind == "decaying":
        return Toeplitz((1 + k) ** -1.1, 0.7 * (1 + k) ** -1.3)
    if kind == "exponential":
        return Toeplitz(0.9**k)
    diagonals = torch.randn(2 * n - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    if kind == "t_0 = 1e-10":
        diagonals[n - 1] = 1e-10
    return Toeplitz.from_diagonals(diagonals, n)


def residual(T: Toeplitz, x: Any, b: Tensor) -> float:
    return float(f"{float((b - T.matvec(torch.as_tensor(x))).norm() / b.norm()):.2g}")


def methods(T: Toeplitz, b: Tensor) -> dict[str, Callable[[], Any]]:
    column, row, vector, log = T.column.numpy(), T.row.numpy(), b.numpy(), T.shape[-1].bit_length() - 1
    found: dict[str, Callable[[], Any]] = {
        "structmat.Toeplitz.solve": lambda: T.solve(b),
        "elimination": lambda: _eliminate(T, b.unsqueeze(-1)).squeeze(-1),
        "levinson": lambda: levinson(T.column, T.row, b),
        "scipy solve_toeplitz": lambda: scipy.linalg.solve_toeplitz((column, row), vector, check_finite=False),
        "torch dense LU": lambda: torch.linalg.solve(T.to_dense(), b),
    }
    return {name: run for name, run in found.items() if log <= LARGEST.get(name, log)}


def measure(kind: str, n: int, budget: float) -> list[dict[str, Any]]:
    T, b = matrix(kind, n), torch.randn(n, dtype=torch.float64)
    runs = methods(T, b)
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for turn in range(31):  # in turns, so that what else the machine does meets all of them
        for name, run in runs.items():
            if len(times[name]) > 2 and sum(times[name]) > budget:
                continue
            start = time.perf_counter()
            results[name] = run()
            spent = time.perf_counter() - start
            if turn or spent > budget:  # the first makes workspaces
                times[name].append(spent)
    return [
        {"matrix": kind, "n": n, "method": name, "repeats": len(spent), "residual": residual(T, results[name], b)}
        | {f"p{q}_s": float(f"{np.quantile(spent, q / 100):.4g}") for q in (20, 50, 80)}
        for name, spent in times.items()
    ]


def slope(rows: list[dict[str, Any]], kind: str, method: str) -> str | None:
    points = [(r["n"], r["p50_s"]) for r in rows if (r["matrix"], r["method"]) == (kind, method) and r["n"] >= 2**11]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points)).T
    return f"{np.polyfit(x, y, 1)[0]:.2f} for n = {points[0][0]} to {points[-1][0]}"


def tiny_diagonal(n: int) -> dict[str, float]:
    """The residuals, and the condition number, of a matrix whose first minor is 1e-10."""
    T, b = matrix("t_0 = 1e-10", n), torch.randn(n, dtype=torch.float64)
    scipys = scipy.linalg.solve_toeplitz((T.column.numpy(), T.row.numpy()), b.numpy())
    return {
        "condition": float(f"{float(torch.linalg.cond(T.to_dense())):.2g}"),
        "structmat": residual(T, T.solve(b), b),
        "scipy": residual(T, scipys, b),
    }


def singular_raises(n: int) -> bool:
    try:
        Toeplitz(torch.ones(n, dtype=torch.float64)).solve(torch.ones(n, dtype=torch.float64))
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=16, help="log2 of the largest n, at least 13")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the repeats of a method")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    load, rows = os.getloadavg(), []
    for kind in ("decaying", "exponential", "random"):
        for log in range(8, min(args.largest, LARGEST_OF.get(kind, 99)) + 1):
            new = measure(kind, 2**log, args.budget)
            rows += new
            print(f"\n{kind}, n = 2^{log}")
            cells = [[r["method"], r["p20_s"], r["p50_s"], r["residual"]] for r in new]
            print(table(("method", "p20_s", "p50_s", "residual"), cells), flush=True)
    write_csv(args.out / "toeplitz-solve.csv", rows, COLUMNS)

    def ratio(kind: str, n: int, above: str) -> float | None:
        p50 = {r["method"]: r["p50_s"] for r in rows if (r["matrix"], r["n"]) == (kind, n)}
        return float(f"{p50[above] / p50['structmat.Toeplitz.solve']:.3g}") if above in p50 else None

    kinds, names = sorted({r["matrix"] for r in rows}), sorted({r["method"] for r in rows})
    sizes = [2**log for log in range(12, args.largest + 1)]
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "dtype": "float64",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("structmat", "torch", "numpy", "scipy")},
        "load_before_and_after": [load, os.getloadavg()],
        "slopes": {f"{kind}, {name}": s for kind in kinds for name in names if (s := slope(rows, kind, name))},
        "dense LU over Toeplitz.solve, n = 4096": {kind: ratio(kind, 4096, "torch dense LU") for kind in kinds},
        "scipy solve_toeplitz over Toeplitz.solve": {
            kind: {str(n): r for n in sizes if (r := ratio(kind, n, "scipy solve_toeplitz"))} for kind in kinds
        },
        "residuals with t_0 = 1e-10": {str(n): tiny_diagonal(n) for n in (256, 1024, 4096)},
        "a singular matrix raises": {str(n): singular_raises(n) for n in (64, 4096)},
    }
    write_json(args.out / "toeplitz-solve.json", facts)
    print(f"\n{facts}")


if __name__ == "__main__":
    main()
