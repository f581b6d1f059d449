"""Measure kernel configurations on this machine's GPU and keep the best: ``python -m structmat_kernels.tune``.

For a Monarch layer of the given size it times every configuration that fits, forward and backward, by replays of CUDA
graphs, checks each against the reference, and writes the fastest into the table that :mod:`structmat_kernels.tuning`
reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from structmat_kernels.tuning import Config, entry_key, read_table, user_file


def microseconds(call: Callable[[], object], repeats: int = 8, replays: int = 7) -> float:
    """Median time of a call on the GPU, from replays of a graph of several calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                call()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(1e3 * start.elapsed_time(end) / repeats)
    return statistics.median(times)


def fastest(
    candidates: Iterable[Config], run: Callable[[Config], Tensor | None], expected: Tensor, bound: float
) -> tuple[Config, float] | None:
    """The fastest configuration whose result is right, and its time."""
    best: tuple[Config, float] | None = None
    for config in candidates:
        try:
            got = run(config)
            if got is None:
                continue
            error = ((got.double() - expected).norm() / expected.norm()).item()
            if not error <= bound:
                print(f"wrong: {config}: relative error {error:.1e}")
                continue
            time = microseconds(lambda config=config: run(config))
        except Exception as error:
            if "out of resource" not in str(error) and "power of 2" not in str(error):
                print(f"failed: {config}: {type(error).__name__}: {str(error)[:100]}")
            continue
        if best is None or time < best[1]:
            best = config, time
    return best


def tune(rows: int, columns: int, blocks: int, tokens: int, dtype: torch.dtype) -> dict[str, dict[str, Config]]:
    """Table entries for a Monarch matrix of ``blocks`` blocks and the largest hidden width."""
    from structmat_kernels.monarch import candidates, launch, launch_backward, reference

    s, p = -(-rows // blocks), -(-columns // blocks)
    sizes = (blocks, s, min(s, p), blocks, min(s, p), p)
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    x, gy = draw(1, tokens, columns), draw(1, tokens, rows)
    left, right = draw(1, *sizes[:3]), draw(1, *sizes[3:])
    bound, none = 5e-3 if dtype == torch.bfloat16 else 1e-3, x.new_empty(1, 0)
    table: dict[str, dict[str, Config]] = {}
    head = slice(0, 256)
    expected = reference.monarch(x[:, head].double(), left.double(), right.double(), rows)

    def forward(config: Config) -> Tensor | None:
        y = launch.forward(x, left, right, none, rows, "", config)
        return y if y is None else y[:, head]

    def backward(config: Config) -> Tensor | None:
        grads = launch_backward.backward(gy, x, left, right, columns, True, True, config)
        return None if grads[0] is None else grads[0][:, head]

    back = reference.monarch_transposed(gy[:, head].double(), left.double(), right.double(), columns)
    work = (
        ("monarch", candidates.forward(sizes), forward, expected),
        ("monarch_backward", candidates.backward(sizes), backward, back),
    )
    for op, configs, run, reference_value in work:
        best = fastest(configs, run, reference_value, bound)
        if best is not None:
            print(f"{op} {rows} x {columns}, {blocks} blocks, {tokens} tokens: {best[1]:.1f} us, {best[0]}")
            table[entry_key(op, x.device, dtype, sizes)] = {str(tokens): best[0]}
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True, help="out_features")
    parser.add_argument("--columns", type=int, required=True, help="in_features")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--file", type=Path, default=user_file(), help="table to add to (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("measuring needs a CUDA device")
    table = read_table(args.file)
    for tokens in args.tokens:
        for key, entries in tune(args.rows, args.columns, args.blocks, tokens, getattr(torch, args.dtype)).items():
            table[key] = table.get(key, {}) | entries
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{args.file}: {len(table)} entries")


if __name__ == "__main__":
    main()
