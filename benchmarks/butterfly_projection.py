"""Projection on dyadic butterflies: time on one thread and error, beside lazylinop and pyfaust where installed.

    python benchmarks/butterfly_projection.py                      # this library alone
    pip install lazylinop==1.24 pyfaust psutil pandas && python benchmarks/butterfly_projection.py

DFT, Hadamard, DCT-II and Gaussian matrices of sizes 256, 1024 and 4096 in double precision, with the columns in the
transform's permutation; every method gets the same chain (pyfaust has rank 1 only). All run in this one process,
in turns; the times are medians of the repeats. Ours include the certificate. ``--device cuda`` adds ours
on a GPU, the matrix already there, in double and in single precision.
Writes results/butterfly-projection.{csv,json}, of a GPU results/butterfly-projection-cuda.{csv,json}.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Method(NamedTuple):
    """What is timed is ``run``; inputs are where and what they have to be."""

    prepare: Callable[[np.ndarray], Any]
    run: Callable[[Any, int], Any]


def ours(order: str, device: str = "cpu", single: bool = False) -> Method:
    def prepare(W: np.ndarray) -> torch.Tensor:
        low = torch.complex64 if np.iscomplexobj(W) else torch.float32
        return torch.from_numpy(W).to(device, low if single else None)

    def run(W: torch.Tensor, rank: int) -> Any:
        result = project_butterfly(W, Chain.dyadic(len(W), rank), order)
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    return Method(prepare, run)


def lazylinop(backend: str) -> Method:
    butterfly = importlib.import_module("lazylinop.butterfly")

    def run(W: Any, rank: int) -> Any:
        return butterfly.ksd(W, butterfly.Chain([tuple(p) for p in Chain.dyadic(len(W), rank)]))

    return Method(torch.from_numpy if backend == "torch" else np.asarray, run)


def pyfaust() -> Method:
    fact = importlib.import_module("pyfaust.fact")

    def run(W: np.ndarray, rank: int) -> Any:
        if rank > 1:
            raise NotImplementedError("rank 1 only")
        return fact.butterfly(W, type="bbtree")

    return Method(np.asarray, run)


def methods(device: str) -> dict[str, Method]:
    orders = ("balanced", "left-to-right")
    found: dict[str, Method] = {f"structmat, {order}": ours(order) for order in orders}
    if device != "cpu":
        found |= {f"structmat, {order}, {device}": ours(order, device) for order in orders}
        found |= {f"structmat, {order}, {device}, single": ours(order, device, single=True) for order in orders}
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
        factors = [f.cpu().to(torch.complex128 if f.is_complex() else torch.float64) for f in result[0]]
        return from_support(merge_all(factors)).numpy()
    whole = result.toarray() if hasattr(result, "toarray") else result @ np.eye(n)
    return np.asarray(whole)


def measure(name: str, n: int, budget: float, device: str) -> list[dict[str, Any]]:
    W, rank = matrices(n)[name]
    size, runs, rows = np.linalg.norm(W), methods(device), []
    given, results, times, failed = {}, {}, {method: [] for method in runs}, {}
    for turn in range(20):  # in turns, so that what else the machine does meets all of them
        for method, (prepare, run) in runs.items():
            spent = times[method]
            if method in failed or (sum(spent) > budget and (len(spent) > 2 or spent[0] > budget)):
                continue
            try:
                if turn == 0:
                    given[method] = prepare(W)
                    if device in method:  # kernels are loaded, libraries make their workspaces
                        run(given[method], rank)
                before = time.perf_counter()
                results[method] = run(given[method], rank)
                spent.append(time.perf_counter() - before)
            except Exception as error:
                failed[method] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for method, spent in times.items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"matrix": name, "n": n, "method": method}
        row |= {"params": Chain.dyadic(n, rank).num_params, "status": failed.get(method, "ok")}
        if method not in failed:
            result = results[method]
            row |= {f"p{q}_s": round(float(np.quantile(spent, q / 100)), 6) for q in (20, 50, 80)}
            row["repeats"] = len(spent)
            row["error"] = f"{np.linalg.norm(W - dense(result, n)) / size:.2e}"
            row["bound"] = f"{result[1].item() / size:.2e}" if isinstance(result, tuple) else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--device", default="cpu", help="cuda: ours on it too, in double and in single precision")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for the repeats of a method")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    stem = "butterfly-projection" if args.device == "cpu" else f"butterfly-projection-{args.device}"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for n in args.sizes:
        for name in matrices(2):
            new = measure(name, n, args.budget, args.device)
            rows += new
            print(f"\n{name}, n = {n}")
            shown = ("method", "p50_s", "error", "bound", "status")
            print(table(shown, [[row[c] for c in shown] for row in new]), flush=True)
            args.out.mkdir(exist_ok=True)
            write_csv(args.out / f"{stem}.csv", rows, COLUMNS)
    names = ("structmat", "torch", "numpy", "scipy", "lazylinop", "pyfaust")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts = {"threads": 1, "machine": platform.machine(), "device": "cpu", "versions": versions}
    facts["python"] = platform.python_version()
    if args.device != "cpu":
        facts["device"] = torch.cuda.get_device_name(args.device)
    (args.out / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
