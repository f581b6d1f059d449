"""Projection on dyadic butterflies: time on one thread and error, beside lazylinop and pyfaust where installed.

    python benchmarks/butterfly_projection.py                      # this library alone
    pip install lazylinop==1.24 pyfaust psutil pandas && python benchmarks/butterfly_projection.py

DFT, Hadamard, DCT-II and Gaussian matrices of sizes 256, 1024 and 4096 in double precision, with the columns in the
transform's permutation; every method gets the same chain (pyfaust has rank 1 only). All run in this one process,
one after the other; the times are medians of the repeats. Ours include the certificate.
Writes results/butterfly-projection.{csv,json}.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from harness.report import table, write_csv

from structmat import Chain
from structmat.projection import project_butterfly
from structmat.projection.splitting import from_support, merge_all

HERE = Path(__file__).resolve().parent
COLUMNS = ("matrix", "n", "method", "params", "p20_s", "p50_s", "p80_s", "repeats", "error", "bound", "status")


def bit_reversal(n: int) -> np.ndarray:
    levels = n.bit_length() - 1
    return np.arange(n).reshape((2,) * levels).transpose(range(levels)[::-1]).reshape(-1)


def matrices(n: int) -> dict[str, tuple[np.ndarray, int]]:
    """The matrices with permuted columns, and the rank of their chains."""
    reversal = bit_reversal(n)
    even_odd = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])
    return {
        "DFT": (scipy.fft.fft(np.eye(n), axis=0)[:, reversal], 1),
        "Hadamard": (scipy.linalg.hadamard(n).astype(float), 1),
        "DCT-II": (scipy.fft.dct(np.eye(n), axis=0, norm="ortho")[:, even_odd[reversal]], 2),
        "Gaussian": (np.random.default_rng(0).standard_normal((n, n)), 1),
    }


Method = Callable[[np.ndarray, int], tuple[Any, float | None]]


def ours(order: str) -> Method:
    def run(W: np.ndarray, rank: int) -> tuple[Any, float | None]:
        factors, lower, _ = project_butterfly(torch.from_numpy(W), Chain.dyadic(len(W), rank), order)
        return factors, lower.item()

    return run


def lazylinop(backend: str) -> Method:
    butterfly = importlib.import_module("lazylinop.butterfly")

    def run(W: np.ndarray, rank: int) -> tuple[Any, float | None]:
        chain = butterfly.Chain([tuple(p) for p in Chain.dyadic(len(W), rank)])
        return butterfly.ksd(torch.from_numpy(W) if backend == "torch" else W, chain), None

    return run


def pyfaust() -> Method:
    fact = importlib.import_module("pyfaust.fact")

    def run(W: np.ndarray, rank: int) -> tuple[Any, float | None]:
        if rank > 1:
            raise NotImplementedError("rank 1 only")
        return fact.butterfly(W, type="bbtree"), None

    return run


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {f"structmat, {order}": ours(order) for order in ("balanced", "left-to-right")}
    for name, make in (
        ("lazylinop, numpy", lambda: lazylinop("numpy")),
        ("lazylinop, torch", lambda: lazylinop("torch")),
        ("pyfaust, bbtree", pyfaust),
    ):
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: not installed ({error})")
    return found


def dense(result: Any, n: int) -> np.ndarray:
    if isinstance(result, tuple):
        return from_support(merge_all(result)).numpy()
    whole = result.toarray() if hasattr(result, "toarray") else result @ np.eye(n)
    return np.asarray(whole)


def measure(name: str, n: int, budget: float) -> list[dict[str, Any]]:
    W, rank = matrices(n)[name]
    size, rows = np.linalg.norm(W), []
    for method, run in methods().items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"matrix": name, "n": n, "method": method, "status": "ok"}
        row["params"] = Chain.dyadic(n, rank).num_params
        try:
            times, start = [], time.perf_counter()
            while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < 20):
                before = time.perf_counter()
                result, lower = run(W, rank)
                times.append(time.perf_counter() - before)
                if times[0] > budget:
                    break
            for column, share in (("p20_s", 0.2), ("p50_s", 0.5), ("p80_s", 0.8)):
                row[column] = round(float(np.quantile(times, share)), 6)
            row["p50_s"] = round(statistics.median(times), 6)
            row["repeats"] = len(times)
            row["error"] = f"{np.linalg.norm(W - dense(result, n)) / size:.2e}"
            row["bound"] = "" if lower is None else f"{lower / size:.2e}"
        except Exception as error:
            row["status"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for the repeats of a method")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for n in args.sizes:
        for name in matrices(2):
            new = measure(name, n, args.budget)
            rows += new
            print(f"\n{name}, n = {n}")
            shown = ("method", "p50_s", "error", "bound", "status")
            print(table(shown, [[row[c] for c in shown] for row in new]), flush=True)
            args.out.mkdir(exist_ok=True)
            write_csv(args.out / "butterfly-projection.csv", rows, COLUMNS)
    names = ("structmat", "torch", "numpy", "scipy", "lazylinop", "pyfaust")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts = {"threads": 1, "machine": platform.machine(), "python": platform.python_version(), "versions": versions}
    (args.out / "butterfly-projection.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
