"""Time structured linear layers against the dense one, side by side in one run.

Prints a row for each size and structure: median, 20th and 80th percentile in microseconds, the ratio to dense
(`F.linear`; above 1 is faster than dense), and the error against float64. `--csv FILE` writes the same rows with the
device and the versions.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import structmat as sm
from structmat.testing import relative_error

STRUCTURES = {
    "monarch 4 blocks": lambda n: sm.MonarchConfig(nblocks=4),
    "monarch sqrt(n) blocks": lambda n: sm.MonarchConfig(nblocks=2 ** round(0.5 * (n - 1).bit_length())),
    "low rank, half the parameters": lambda n: sm.LowRankConfig(ratio=0.5),
    "block diagonal 4 blocks": lambda n: sm.BlockDiagonalConfig(nblocks=4),
}


def timings(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Microseconds of each of ``repeats`` calls, after a warm-up."""
    for _ in range(max(3, repeats // 5)):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def measure(n: int, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict]:
    """Rows for an n x n layer on ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, n, generator=generator).to(device, dtype)
    dense = torch.randn(n, n, generator=generator).div(n**0.5).to(device, dtype)
    candidates = {"dense F.linear": dense}
    for name, config in STRUCTURES.items():
        candidates[name] = config(n).random((n, n), generator=generator).to(device, dtype)
    rows, base = [], 0.0
    for name, weight in candidates.items():
        call = (lambda w=weight: F.linear(x, w)) if isinstance(weight, torch.Tensor) else lambda w=weight: w.linear(x)
        with torch.no_grad():
            times = timings(call, device, repeats)
            entries = weight if isinstance(weight, torch.Tensor) else weight.to(torch.float64).to_dense()
            error = relative_error(call()[:256], x[:256].double() @ entries.double().mT)
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        base = base or p50
        count = weight.numel() if isinstance(weight, torch.Tensor) else weight.num_params
        rows.append(
            {"n": n, "tokens": tokens, "structure": name, "params": count, "p20_us": round(p20, 1)}
            | {
                "p50_us": round(p50, 1),
                "p80_us": round(p80, 1),
                "speedup": round(base / p50, 3),
                "error": f"{error:.1e}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    device, gpu = torch.device(args.device), args.device.startswith("cuda")
    sizes = args.sizes or ([1024, 2048, 4096] if gpu else [384, 1024])
    tokens, repeats = args.tokens or (8192 if gpu else 512), args.repeats or (50 if gpu else 20)
    where = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {args.dtype}; {tokens} tokens; forward; microseconds")
    print(f"{'n':>6} {'structure':<32}{'params':>10}{'p20':>10}{'p50':>10}{'p80':>10}{'x dense':>9}{'error':>10}")
    rows = []
    for n in sizes:
        for row in measure(n, tokens, getattr(torch, args.dtype), device, repeats):
            rows.append({"device": where, "torch": torch.__version__, "dtype": args.dtype, **row})
            print(
                f"{n:>6} {row['structure']:<32}{row['params']:>10}{row['p20_us']:>10}{row['p50_us']:>10}"
                f"{row['p80_us']:>10}{row['speedup']:>9}{row['error']:>10}"
            )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
