"""Time M2-BERT of 80 million parameters beside transformers' BERT-base, at lengths from 512 to 8192 tokens.

    python benchmarks/m2_bert.py                        # on a GPU, about three minutes
    python benchmarks/m2_bert.py --smoke --device cpu   # tiny: only that it runs

Both are encoders without a head, with fresh weights: speed does not depend on their values. Batches have 32,768 tokens
and no padding. "eager attention" is what transformers did before it had scaled_dot_product_attention, and what the M2
paper compared with; "sdpa" is the fastest of torch's attention kernels, which torch chooses. Forward: bfloat16 weights.
Forward and backward: float32 weights under bfloat16 autocast. Compiled: each layer by torch.compile. Taps kept: the
filters of the long convolutions, which do not depend on the input, are made once (structmat.nn.cache_taps). Calls take
turns; they are not captured in CUDA graphs, which would hold the memory of all models at once. Memory: the peak of a
call beyond what is held before it.

Writes results/m2-bert-<device>.csv and .json. The exit status is 1 if a case failed for want of anything but memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.device import about, slug
from harness.pool import describe
from harness.report import table, write_csv, write_json
from harness.timing import Timed, take_turns
from harness.training import times_in_ms
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from structmat.models.m2 import M2BertConfig, M2BertModel
from structmat.nn import cache_taps

HERE = Path(__file__).resolve().parent
LENGTHS = (512, 1024, 2048, 4096, 8192)
BASE, PLAIN = "BERT, sdpa", "BERT, eager attention"
COLUMNS = (
    *("length", "batch", "mode", "model", "params", "status", "p20_ms", "p50_ms", "p80_ms", "tokens_per_second"),
    *("speedup", "speedup_eager", "peak_mb", "repeats", "timer"),
)


def variants(length: int, smoke: bool, compiled: bool, forward: bool) -> dict[str, Callable[[], nn.Module]]:
    """Names and makers of the models."""
    sizes = {"num_hidden_layers": 1, "vocab_size": 100} if smoke else {}
    sizes |= {"max_position_embeddings": length, "hidden_dropout_prob": 0.0}
    small = {"hidden_size": 64, "intermediate_size": 128} if smoke else {}

    def bert(attention: str) -> Callable[[], nn.Module]:
        heads = {"num_attention_heads": 2} if smoke else {}
        config = BertConfig(attention_probs_dropout_prob=0.0, attn_implementation=attention, **sizes, **small, **heads)
        return lambda: BertModel(config, add_pooling_layer=False)

    def m2() -> nn.Module:
        return M2BertModel(M2BertConfig.preset("80M", **sizes, **small), add_pooling_layer=False)

    found = {BASE: bert("sdpa"), PLAIN: bert("eager"), "M2-BERT": m2}
    if forward:
        found["M2-BERT, taps kept"] = m2
    if compiled:
        found |= {f"{BASE}, compiled": bert("sdpa"), "M2-BERT, compiled": m2}
    return found


def compile_layers(model: nn.Module) -> None:
    """Compile each layer: all are alike, so that one compilation does for them."""
    for layer in model.encoder.layer if isinstance(model, BertModel) else model.layers:  # pyright: ignore
        layer.compile(dynamic=False)


def call_of(model: nn.Module, tokens: Tensor, mode: str, compiled: bool) -> Callable[[int], object]:
    """What is timed."""
    if mode == "forward":
        frozen = model.eval().to(torch.bfloat16 if tokens.is_cuda else torch.float32)
        if compiled:
            compile_layers(frozen)

        @torch.no_grad()
        def forward(i: int) -> object:
            return frozen(tokens).last_hidden_state

        return forward
    params = list(model.parameters())
    if compiled:
        compile_layers(model)

    def both(i: int) -> object:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            loss = model(tokens).last_hidden_state.float().square().mean()
        return torch.autograd.grad(loss, params, allow_unused=True)

    return both


def plain(call: Callable[[int], object], device: torch.device) -> Timed:
    """The call, not captured."""
    start = time.perf_counter()
    call(0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    us = 1e6 * (time.perf_counter() - start)
    return Timed(lambda: call(0), 1, "events" if device.type == "cuda" else "host clock", us)


def measure(length: int, batch: int, mode: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one length."""
    with contextlib.ExitStack() as contexts:
        return _measure(length, batch, mode, args, device, contexts)


def _measure(
    length: int, batch: int, mode: str, args: argparse.Namespace, device: torch.device, contexts: contextlib.ExitStack
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    ready: list[tuple[dict[str, Any], Timed]] = []
    for name, make in variants(length, args.smoke, length in args.compiled, mode == "forward").items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
            "length": length,
            "batch": batch,
            "mode": mode,
            "model": name,
        }
        rows.append(row | {"status": "ok"})
        row = rows[-1]
        try:
            torch.manual_seed(0)
            model = make().to(device)
            row["params"] = sum(p.numel() for p in model.parameters())
            tokens = torch.randint(1, 100, (batch, length), device=device)
            if name.endswith("taps kept"):
                contexts.enter_context(cache_taps(model))
            call = call_of(model, tokens, mode, name.endswith("compiled"))
            call(0)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call(0)
                torch.cuda.synchronize()
                row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            ready.append((row, plain(call, device)))
        except torch.cuda.OutOfMemoryError:
            row["status"] = "out of memory"
        except Exception as error:
            row["status"] = describe(error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for (row, _), times in zip(ready, take_turns([t for _, t in ready], device, args.seconds, least=6), strict=True):
        row |= times_in_ms(times)
        row["tokens_per_second"] = round(1e6 * batch * length / times.p50)
    for base, column in ((BASE, "speedup"), (PLAIN, "speedup_eager")):
        against = next((r["p50_ms"] for r in rows if r["model"] == base), "")
        for row in rows:
            row[column] = round(against / row["p50_ms"], 3) if against and row["p50_ms"] else ""
    return rows


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--compiled", nargs="*", type=int, default=[512, 4096], help="lengths to compile for too")
    parser.add_argument("--tokens", type=int, default=2**15, help="in a batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repeats of a length")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which nothing is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two short lengths, nothing compiled")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    args = parser.parse_args(given)
    if args.smoke:
        args.lengths, args.tokens, args.compiled = [16, 33], 128, []
    device, start = torch.device(args.device), time.time()
    out = args.out or HERE / ("results" if device.type == "cuda" and not args.smoke else "scratch")
    path = out / f"m2-bert-{slug(device)}.csv"
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for mode in ("forward", "forward and backward"):
        for length in args.lengths:
            if time.time() - start > args.budget:
                left.append(f"{mode}, {length}")
                continue
            new = measure(length, max(1, args.tokens // length), mode, args, device)
            rows += new
            write_csv(path, rows, COLUMNS)
            print(f"\n[{time.time() - start:4.0f} s] {mode}, {length} tokens")
            print(table(("model", *COLUMNS[4:]), [[r[k] for k in ("model", *COLUMNS[4:])] for r in new]), flush=True)
    write_json(path.with_suffix(".json"), about(device) | {"left_out": left, "arguments": {"tokens": args.tokens}})
    return 1 if any(r["status"] not in ("ok", "out of memory") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
