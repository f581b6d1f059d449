"""Time transformer blocks whose linear layers are dense or structured: the numbers that a user feels.

    python benchmarks/blocks.py                 # GPT-2-medium-shaped and ViT-B-shaped blocks, on a GPU
    python benchmarks/blocks.py --quick         # one block, no torch.compile
    python benchmarks/blocks.py --device cpu    # tiny shapes: only that it runs

A training step is forward, backward and AdamW (fused) in bfloat16 autocast with float32 weights; inference is a forward
pass of bfloat16 weights. Layers are swapped by `structmat.surgery.replace_`, as a user would. Steps are timed by events
without synchronising between them, so that host overhead counts where it shows; the variants of a case take turns.
Writes results/blocks-<device>.csv and .json. The exit status is 1 if a variant failed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.device import about, slug
from harness.report import table, write_csv, write_json
from harness.timing import percentile
from torch import Tensor, nn

from structmat import MonarchConfig, surgery

HERE = Path(__file__).resolve().parent
COLUMNS = (
    *("model", "mode", "compiled", "layers", "variant", "params", "status", "unit", "throughput", "speedup"),
    *("p20_ms", "p50_ms", "p80_ms", "steps", "peak_mb"),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A stack of transformer blocks and its input."""

    model: str
    width: int
    heads: int
    tokens: int
    batch: int
    causal: bool
    unit: str  # of the throughput
    units: int  # in a batch
    sqrt: int  # number of blocks near the square root of the width


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.causal = shape.heads, shape.causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape("tiny", 64, 4, 32, 2, True, "tokens", 64, 8)]
    return [
        Shape("GPT-2 medium", 1024, 16, 1024, 8, True, "tokens", 8 * 1024, 32),
        Shape("ViT-B", 768, 12, 197, 128, False, "images", 128, 24),
    ]


def variants(shape: Shape) -> dict[str, MonarchConfig | None]:
    """Names, and what every linear layer becomes."""
    return {
        "dense": None,
        "Monarch 4 blocks": MonarchConfig(nblocks=4),
        f"Monarch {shape.sqrt} blocks": MonarchConfig(nblocks=shape.sqrt),
    }


@dataclasses.dataclass
class Variant:
    """A model with its step."""

    name: str
    params: int
    step: Callable[[], object]
    times: list[float] = dataclasses.field(default_factory=list)
    peak_mb: float | None = None
    error: str | None = None


def build(shape: Shape, layers: int, config: MonarchConfig | None, device: torch.device) -> nn.Module:
    """The stack, dense or structured, with weights from a fixed seed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(shape) for _ in range(layers)))
    if config is not None:
        surgery.replace_(model, config)
    return model.to(device)


def make(name: str, model: nn.Module, shape: Shape, mode: str, compiled: str, device: torch.device) -> Variant:
    """A variant ready to run."""
    params = sum(p.numel() for p in model.parameters())
    x = torch.randn(shape.batch, shape.tokens, shape.width, device=device)
    if mode == "inference":
        frozen = copy.deepcopy(model).bfloat16().eval()
        run, half = torch.compile(frozen, dynamic=False, mode=compiled) if compiled else frozen, x.bfloat16()

        @torch.inference_mode()
        def infer() -> Tensor:
            return run(half)

        return Variant(name, params, infer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    train = torch.compile(model, dynamic=False, mode=compiled) if compiled else model
    target = torch.randn_like(x)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.mse_loss(train(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(name, params, step)


def warm_up(variant: Variant, device: torch.device) -> None:
    """Compile, fill the optimizer's state, and measure the memory of a step, weights and state included."""
    for _ in range(3):
        variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.step()
        torch.cuda.synchronize(device)
        # Of the other variants of the case only what they hold between steps is in memory; it is taken off.
        variant.peak_mb = (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_steps(variant: Variant, device: torch.device, steps: int) -> None:
    """Add the milliseconds of some steps."""
    if device.type != "cuda":
        for _ in range(steps):
            start = time.perf_counter()
            variant.step()
            variant.times.append(1e3 * (time.perf_counter() - start))
        return
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    variant.step()  # the first one after another variant's is not counted
    marks[0].record()
    for mark in marks[1:]:
        variant.step()
        mark.record()
    torch.cuda.synchronize(device)
    variant.times += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def measure(shape: Shape, layers: int, mode: str, compiled: str, device: torch.device, rounds: int) -> list[dict]:
    """The rows of a case."""
    ready: list[Variant] = []
    held: dict[str, float] = {}
    for name, config in variants(shape).items():
        variant = Variant(name, 0, lambda: None)
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            variant = make(name, build(shape, layers, config, device), shape, mode, compiled, device)
            warm_up(variant, device)
            if device.type == "cuda":
                held[name] = (torch.cuda.memory_allocated(device) - before) / 2**20
        except Exception as error:
            variant.error = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ready.append(variant)
    for _ in range(rounds):
        for variant in ready:
            if variant.error is None:
                time_steps(variant, device, 5)
    rows, dense = [], None
    for variant in ready:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"model": shape.model, "mode": mode, "compiled": compiled, "layers": layers, "variant": variant.name}
        row |= {"params": variant.params, "status": variant.error or "ok", "unit": f"{shape.unit}/s"}
        if variant.error is None:
            p20, p50, p80 = (percentile(variant.times, q) for q in (0.2, 0.5, 0.8))
            dense = p50 if variant.name == "dense" else dense
            row |= {"p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3)}
            row |= {"steps": len(variant.times), "throughput": round(1e3 * shape.units / p50)}
            row["speedup"] = round(dense / p50, 3) if dense else ""
            row["peak_mb"] = "" if variant.peak_mb is None else round(variant.peak_mb + held[variant.name])
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="turns of five steps each")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    args = parser.parse_args()
    device, start = torch.device(args.device), time.time()
    gpu = device.type == "cuda"
    args.out = args.out or HERE / ("results" if gpu and not args.quick else "scratch")
    layers, rounds = (1, 2) if args.quick or not gpu else (args.layers, args.rounds)
    # "reduce-overhead": CUDA graphs, by which the host no longer counts.
    ways = ("", "reduce-overhead", "default") if gpu and not args.quick else ("",)
    cases = [(shape, mode, way) for way in ways for mode in ("training", "inference") for shape in shapes(not gpu)]
    rows: list[dict] = []
    left: list[str] = []
    facts = about(device)
    for shape, mode, compiled in cases:
        title = f"{shape.model}, {layers} blocks, {mode}{f', torch.compile ({compiled})' if compiled else ''}"
        if time.time() - start > args.budget:
            left.append(title)
            print(f"\n{title}: left out, no time")
            continue
        new = measure(shape, layers, mode, compiled, device, rounds)
        rows += new
        write_csv(args.out / f"blocks-{slug(device)}.csv", rows, COLUMNS)
        write_json(args.out / f"blocks-{slug(device)}.json", facts | {"left_out": left})
        names = ("params", "throughput", "speedup", "p20_ms", "p50_ms", "p80_ms", "peak_mb")
        print(f"\n{title}")
        print(
            table(
                ("variant", "params", new[0]["unit"], "x dense", "p20 ms", "p50 ms", "p80 ms", "peak MB"),
                [(row["variant"], *(row[name] for name in names)) for row in new],
            ),
            flush=True,
        )
        for row in new:
            if row["status"] != "ok":
                print(f"{row['variant']}: {row['status']}", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    write_json(args.out / f"blocks-{slug(device)}.json", facts | {"left_out": left})
    print(f"\n{len(rows)} rows, {time.time() - start:.0f} s")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
