"""How long a model takes to compress: calibrate, probe several structures at several sizes, allocate, project.

The model is all-MiniLM-L6-v2, its 36 encoder layers at half of their parameters; see `compression.py` for the data.
Each layer's share of the budget and its structure are chosen among low rank, low rank by pivots, Monarch matrices of
four blocks and Pixelfly matrices. Needs `pip install structmat[demo]`.

    OMP_NUM_THREADS=2 python benchmarks/compression_time.py --limit 180

With `--limit SECONDS` the exit status is 1 if the whole takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compression import MiniLM
from harness.device import about, slug
from harness.report import table, write_json

from structmat import (
    BlockDiagonalConfig,
    Config,
    LowRankConfig,
    MonarchConfig,
    PivotedLowRankConfig,
    PixelflyConfig,
    surgery,
)

ROOT = Path(__file__).resolve().parent
STRUCTURES: dict[str, Config] = {
    "lowrank": LowRankConfig(ratio=1),
    "pivoted": PivotedLowRankConfig(ratio=1),
    "monarch": MonarchConfig(nblocks=4, ratio=1),
    "pixelfly": PixelflyConfig(ratio=1),
    "blockdiagonal": BlockDiagonalConfig(ratio=1),
}


class Clock:
    """Seconds of stages by name: on the clock, and of all of the process's threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs within."""
        start = time.perf_counter(), time.process_time()
        yield
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        self.seconds[name] = wall, cpu
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of processors", flush=True)


def main() -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES)[:4])
    parser.add_argument("--sentences", type=int, default=256, help="to calibrate on")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the parameters")
    parser.add_argument("--levels", type=int, default=8, help="sizes at which a structure is probed")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences")
    parser.add_argument("--limit", type=float, help="seconds that the whole may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the result file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT.parent / "examples"))
    device, clock = torch.device(args.device), Clock()
    subject: Any = MiniLM(device, args)
    model, batches = copy.deepcopy(subject.model), subject.batches(args.seed)
    with clock.stage("calibrate"):
        calibration, weights = subject.calibrate(batches)
    with clock.stage("probe and allocate"):
        plan = surgery.allocate(
            model,
            args.ratio,
            {subject.pattern: [STRUCTURES[name] for name in args.structures]},
            levels=args.levels,
            rule="error",
            calibration=calibration,
            weight=weights,
            progress=False,
        )
    with clock.stage("project"):
        report = surgery.compress_(model, plan, calibration=calibration, progress=False)
    whole = [sum(part) for part in zip(*clock.seconds.values(), strict=True)]
    chosen = Counter(config.structure for config in plan.values())
    values = subject.quality(model)
    rows = [(name, *(f"{s:.1f}" for s in seconds)) for name, seconds in [*clock.seconds.items(), ("all", whole)]]
    print("\n" + table(("stage", "seconds", "of processors"), rows))
    print(f"\nstructures probed: {', '.join(args.structures)}; chosen: {dict(chosen)}")
    print(
        f"{report.params_after:,} parameters, plan's error {plan.error:.5f};",
        *(f"{k} {v:.4f}" for k, v in values.items()),
    )
    facts = about(device, args.seed) | {"stages": clock.seconds, "chosen": dict(chosen), "quality": values}
    facts |= {"structures": args.structures, "sentences": args.sentences, "ratio": args.ratio, "levels": args.levels}
    facts |= {"seconds": whole[0], "processor_seconds": whole[1], "error": plan.error, "rows": _rows(plan, report)}
    write_json(args.out / f"compression-time-{slug(device)}.json", facts)
    if args.limit is not None and whole[0] > args.limit:
        sys.exit(f"{whole[0]:.0f} s are more than {args.limit:g} s")


def _rows(plan: surgery.Allocation, report: surgery.Report) -> list[dict[str, Any]]:
    """For each compressed layer its structure, and the errors of the probe and of the projection."""
    probed = {row.name: row for row in plan.report.rows}
    return [
        {
            "layer": row.name,
            "structure": row.structure,
            "params": row.params_after,
            "probed": probed[row.name].calibrated_error,
            "error": row.calibrated_error,
        }
        for row in report.compressed
    ]


if __name__ == "__main__":
    main()
