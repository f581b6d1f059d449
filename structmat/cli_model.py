"""``structmat compress --model``: compress a transformers model by the text that it is to read."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structmat import __version__, surgery
from structmat.cli_options import DTYPES, check_arguments, check_places, find_device, layer_filter
from structmat.config import Config, LowRankConfig
from structmat.surgery.model_report import ModelReport, Rows
from structmat.surgery.output import staging
from structmat.surgery.pretrained import (
    import_transformers,
    model_class,
    read_config,
    undrawn_model,
    write_pretrained,
)
from structmat.surgery.selection import FilterFn
from structmat.surgery.shards import SUFFIX, Checkpoint
from structmat.surgery.text import Held, TextFeed, hold_out, read_passages

_SENSITIVITY_TOKENS = 2048  # every layer costs a forward pass of these
_LATENCY_TOKENS = 128
_STAGES = ("dense", "compressed", "healed")


def compress_model(args: argparse.Namespace) -> None:
    """``structmat compress`` with ``--model``.

    Raises:
        ImportError: if transformers is not installed.
        OSError: if a file cannot be read or written.
        ValueError: if an argument, the model or the text is of no use.
    """
    structures = check_arguments(args)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = import_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = Path(args.model)
    config = read_config(source)
    plan = None if args.plan is None else surgery.Allocation.load(args.plan)
    if args.dry_run:
        with torch.device("meta"):
            model = undrawn_model(config, source)
        if plan is not None:
            print(surgery.compress_(model, plan, dry_run=True))
        for structure in structures:
            print(surgery.compress_(model, structure, layer_filter(args, model), dry_run=True))
        return
    out, told = check_places(args, source)
    passages = None if args.calibrate is None else read_passages(args.calibrate)
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    dense = _load(source, config, args.dtype).to(device)
    if plan is not None:
        plan.check(dense)
    text = None
    if passages is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        text = _Text(args, dense, tokenizer, passages)
    model, plan, report = _run(args, dense, text, structures, plan)
    with _made(told), staging(out, source) as stage:
        write_pretrained(model, stage)
        plan.save(stage / "plan.json")
        if told is not None:
            report.save(told)
    print(report.layers)
    for name, *values in report.quality:
        print(f"{name} on held-out text: {', '.join(f'{w} {v}' for w, v in zip(_STAGES, values, strict=True) if v)}")
    if report.slower:
        print(f"slower than dense ones on this device: {len(report.slower)} structured layers")
    print(f"wrote {out}" + ("" if told is None else f" and {told / 'report.html'}"))


class _Text:
    """The text, cut up for a model: what it is calibrated and healed on, and what it is measured on."""

    def __init__(self, args: argparse.Namespace, dense: nn.Module, tokenizer: Any, passages: list[str]) -> None:
        self.feed = TextFeed(dense, tokenizer, args.length, args.batch_size, args.seed)
        self.fisher = args.sensitivity == "fisher" and args.plan is None
        if self.fisher and self.feed.kind == "encoder":
            raise ValueError(
                f"--sensitivity fisher needs the loss of a language model, which {type(dense).__name__} is not"
            )
        self.rest, last = hold_out(passages)
        random.Random(args.seed).shuffle(self.rest)
        self.sequences = self.feed.sequences(self.rest, args.calibrate_tokens)
        self.batches = self.feed.batches(self.sequences)
        self.held = Held(self.feed, dense, self.feed.sequences(last, args.calibrate_tokens))
        tokens = f"{sum(map(len, self.sequences)):,} in {len(self.sequences):,} sequences of at most {self.feed.length}"
        self.facts: Rows = [("text", args.calibrate), ("passages", f"{len(passages):,}"), ("tokens", tokens)]
        self.facts.append(("held out", f"the last {len(last):,} passages, of them {self.held.tokens:,} tokens"))
        self.facts += [("damping", str(args.damping)), ("sensitivity", args.sensitivity if args.plan is None else "-")]
        self.facts.append(("compensation", "layers in order" if args.compensate else "none"))

    def calibrate(self, model: nn.Module, chosen: FilterFn) -> surgery.Calibration:
        """The moments of these layers."""
        batches = self.feed.batches(self.sequences, labels=True) if self.fisher else self.batches
        return surgery.calibrate(model, batches, chosen, gradients=self.fisher)


def _run(
    args: argparse.Namespace,
    dense: nn.Module,
    text: _Text | None,
    structures: list[Config],
    plan: surgery.Allocation | None,
) -> tuple[nn.Module, surgery.Allocation, ModelReport]:
    """The compressed model, the plan, and the report."""
    calibration = None
    if plan is not None:
        planned = {row.name for row in plan.report.compressed}
        calibration = text and text.calibrate(dense, lambda name, _: name in planned)
    else:
        chosen, weight = layer_filter(args, dense), None
        if text is not None:
            calibration = text.calibrate(dense, chosen)
            if args.sensitivity == "measured":
                few = text.feed.batches(text.feed.sequences(text.rest, min(_SENSITIVITY_TOKENS, args.calibrate_tokens)))
                error = LowRankConfig(ratio=min(0.5, args.ratio))
                weight = surgery.sensitivity(dense, calibration, few, error, filter_fn=chosen, damping=args.damping)
        options: dict[str, Any] = {"calibration": calibration, "damping": args.damping}
        plan = surgery.allocate(dense, args.ratio, structures, "error", chosen, weight, **options)
    model = copy.deepcopy(dense)
    compensate = text.batches if text is not None and args.compensate else None
    layers = surgery.compress_(model, plan, calibration=calibration, damping=args.damping, compensate=compensate)
    report = ModelReport(Path(args.model).resolve().name, layers, _facts(args, dense, text, plan))
    if text is not None:
        values, healing = [text.held.dense, text.held(model)], None
        if args.heal_steps:
            healing = _heal(args, model, dense, text)
            values.append(text.held(model))
        words = [f"{value:.4g}" for value in values] + [""] * (len(_STAGES) - len(values))
        report = dataclasses.replace(report, quality=[(text.held.name, *words)], healing=healing)
    return model, plan, report if args.report is None else _timed(args, report, model, dense, text)


def _heal(args: argparse.Namespace, model: nn.Module, dense: nn.Module, text: _Text) -> surgery.HealReport:
    sequences = text.feed.sequences(text.rest, args.heal_steps * args.batch_size * text.feed.length)
    batches = text.feed.batches(sequences)
    random.Random(args.seed).shuffle(batches)  # they are sorted by length
    return surgery.heal(model, dense, batches, args.heal_steps, lr=args.heal_lr)


def _timed(
    args: argparse.Namespace, report: ModelReport, model: nn.Module, dense: nn.Module, text: _Text | None
) -> ModelReport:
    """The report with times."""
    length = _LATENCY_TOKENS if text is None else min(_LATENCY_TOKENS, text.feed.length)
    slower, latency = surgery.slower_layers(model, tokens=args.batch_size * length), surgery.Speeds()
    if text is not None:
        # Of the longest sequences: the batches are sorted by length.
        batch = {key: value[:, :length] for key, value in text.batches[-1].items()}
        latency = surgery.measure_latency(model, dense, batch, min_run_time=0.1)
        length = batch["input_ids"].shape[1]
    facts = {**report.facts, "Run": [*report.facts["Run"], ("tokens in a sequence when timed", str(length))]}
    return dataclasses.replace(report, facts=facts, slower=slower, latency=latency)


def _facts(args: argparse.Namespace, dense: nn.Module, text: _Text | None, plan: surgery.Allocation) -> dict[str, Rows]:
    parameter = next(dense.parameters())
    where = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"{torch.get_num_threads()} threads"
    run: Rows = [("model", args.model), ("class", type(dense).__name__)]
    run += [("structmat, torch", f"{__version__}, {torch.__version__}"), ("device", f"{parameter.device}, {where}")]
    run += [("dtype", str(parameter.dtype).removeprefix("torch.")), ("seed", str(args.seed))]
    origin = ("structures", args.structures) if args.plan is None else ("from", args.plan)
    spent = f"{plan.spent:,} of {plan.budget:,} {plan.unit}"
    facts = {"Run": run, "Plan": [origin, ("spent", spent), ("file", "plan.json, in the model's folder")]}
    return facts if text is None else {**facts, "Calibration": text.facts}


@contextlib.contextmanager
def _made(folder: Path | None) -> Iterator[None]:
    """Make a folder unless it is there; remove it after an exception."""
    new = folder is not None and not folder.exists()
    try:
        if new:
            folder.mkdir()  # pyright: ignore[reportOptionalMemberAccess]
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)  # pyright: ignore[reportArgumentType]
        raise


def _load(source: Path, config: Any, dtype: str | None) -> Any:
    """The dense model."""
    if list(source.glob(f"*{SUFFIX}")) and Checkpoint(source).layers:
        raise ValueError(f"{source} is compressed already: compress the original, or densify it first")
    cls = model_class(config, source)
    kind = "auto" if dtype is None else DTYPES[dtype]
    try:
        model, info = cls.from_pretrained(source, local_files_only=True, dtype=kind, output_loading_info=True)
    except OSError as error:
        raise ValueError(str(error)) from error
    if missing := sorted(info["missing_keys"]):
        print(f"structmat: warning: {source} lacks {', '.join(missing[:5])}: drawn at random", file=sys.stderr)
    return model.eval()
