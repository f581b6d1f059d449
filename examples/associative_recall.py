"""What a model without attention cannot do: look values up. Multi-query associative recall, and copying.

Two models of two layers and 64 channels, a transformer and M2-GPT, are trained on sequences drawn anew in every step
and tested on others. Recall: 8 keys with their values, then each key again in some place; the model says its value
(Arora et al. 2023, "Zoology"). Copying: 32 random tokens, a separator, the same tokens again. A gated long convolution
mixes by position: it learns to copy, which is to look a fixed distance back; to look for content it does not.

    OMP_NUM_THREADS=1 python examples/associative_recall.py                  # about 15 minutes on one core
    python examples/associative_recall.py --device cuda                      # faster
    python examples/associative_recall.py --tasks copying --steps 500        # a minute
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import structmat
from structmat.models import GPT, M2GPTConfig, M2GPTForCausalLM
from structmat.models.tasks import IGNORED, associative_recall, copying

LENGTH, PAIRS, DIM, DEPTH = 64, 8, 64, 2
RATES = {"attention": 3e-3, "M2": 3e-3}
COLUMNS = ("task", "model", "params", "steps", "batch", "vocabulary", "rate", "accuracy", "seconds")


def tasks(vocabulary: int) -> dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]]:
    """Makers of (tokens, labels) of so many sequences."""
    return {
        "copying": lambda count, g: copying(count, LENGTH, vocab_size=vocabulary, generator=g),
        "recall": lambda count, g: associative_recall(count, LENGTH, pairs=PAIRS, vocab_size=vocabulary, generator=g),
    }


class M2(nn.Module):
    """M2-GPT, from tokens to logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "intermediate_size": 4 * DIM}
        self.model = M2GPTForCausalLM(M2GPTConfig(vocabulary, LENGTH, **sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def make(model: str, vocabulary: int) -> nn.Module:
    """A model from tokens to logits."""
    return M2(vocabulary) if model == "M2" else GPT(vocabulary, LENGTH, dim=DIM, depth=DEPTH, heads=1)


def train(
    model: nn.Module,
    task: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    batch: int,
    rate: float,
    device: torch.device,
    title: str,
) -> None:
    """AdamW with one cycle of the rate, on fresh sequences in every step."""
    optimizer = torch.optim.AdamW(structmat.nn.parameter_groups(model, 0.1), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    generator = torch.Generator(device).manual_seed(1)
    bar = tqdm(range(steps), desc=title, mininterval=1.0)
    for step in bar:
        tokens, labels = task(batch, generator)
        asked = labels != IGNORED
        loss = cross_entropy(model(tokens)[asked], labels[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(
    model: nn.Module, task: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], device: torch.device
) -> float:
    """Share of right answers on 1024 sequences that were not trained on."""
    tokens, labels = task(1024, torch.Generator(device).manual_seed(10**6))
    asked = labels != IGNORED
    right = [
        (model(t).argmax(-1) == y)[a] for t, y, a in zip(*(x.split(128) for x in (tokens, labels, asked)), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def main(given: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("copying", "recall"), default=["copying", "recall"])
    parser.add_argument("--models", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, help="1000 of copying, 8000 of recall")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for recall.csv and recall.json")
    args = parser.parse_args(given)
    device, rows = torch.device(args.device), []
    for name in args.tasks:
        task = tasks(args.vocabulary)[name]
        steps = args.steps or {"copying": 1000, "recall": 8000}[name]
        for kind in args.models:
            torch.manual_seed(0)
            model, start = make(kind, args.vocabulary).to(device), time.perf_counter()
            train(model, task, steps, args.batch, RATES[kind], device, f"{name}, {kind}")
            sizes = {"params": sum(p.numel() for p in model.parameters()), "steps": steps, "batch": args.batch}
            sizes |= {"vocabulary": args.vocabulary, "rate": RATES[kind]}
            seconds, found = round(time.perf_counter() - start, 1), round(accuracy(model.eval(), task, device), 4)
            rows.append({"task": name, "model": kind, **sizes, "accuracy": found, "seconds": seconds})
            print(f"{name}, {kind}: {100 * found:.1f} % of the answers are right", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "recall.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        facts = {"device": name, "torch": torch.__version__, "structmat": structmat.__version__}
        facts |= {"threads": torch.get_num_threads(), "python": platform.python_version(), "seed": 0}
        (args.out / "recall.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
