"""Compress and densify checkpoints without the model: tensor by tensor, so that little of them is in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.nn import MatrixParameters
from structmat.projecting import project
from structmat.surgery.candidates import Candidate, choose, natural
from structmat.surgery.densify import to_dense
from structmat.surgery.output import check_output, staging
from structmat.surgery.replace import collect
from structmat.surgery.report import LayerRow, Report
from structmat.surgery.shards import Checkpoint
from structmat.surgery.spec import (
    KEY,
    LayerSpec,
    build,
    dump_layers,
    layer_class,
    layer_prefix,
    parse_layers,
    structure_name,
    tensor_names,
)
from structmat.surgery.stream import DTYPES, Entry, TensorFile, tensor_writer


@dataclass
class Job:
    """A layer that is rewritten: which tensors it takes away, which it makes, and how."""

    name: str
    removes: set[str]
    entries: dict[str, Entry]
    make: Callable[[], dict[str, Tensor]]
    layer: LayerSpec | None = None


def compress_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    config: Config,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    conv1d: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Project the weights of a safetensors checkpoint; the result is what ``save_file`` of the model would write.

    ``X.weight`` becomes ``X.weight.left`` and so on; every other tensor and the metadata are carried over. Tensors are
    read, projected and written one at a time.

    Args:
        source: a safetensors file, or the folder or index of a checkpoint in shards.
        out: the file to write, or the folder if source is a folder or an index; None for a dry run only.
        config: the structure.
        include: patterns (:mod:`fnmatch`) of names to compress, with or without ``.weight``; by default every
            two-dimensional floating-point ``*.weight`` but embeddings and output heads, judged by their names.
        exclude: patterns of names to leave alone.
        conv1d: patterns of weights that are stored as (in, out), as GPT-2's are.
        force: replace an existing ``out``.
        dry_run: read headers, compute sizes, write nothing.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        One row for each candidate.

    Raises:
        structmat.BudgetError: if a budget is too small for a tensor; all such tensors are named.
        OSError: if a file cannot be read or written.
        ValueError: if the input is damaged, no tensor or none of a pattern is found, a structure does not exist for
            a size, a tensor has NaN or infinite entries, or ``out`` exists.
    """
    checkpoint = Checkpoint(source)
    if not dry_run:
        if out is None:
            raise ValueError("name an output, or ask for a dry run")
        check_output(checkpoint, Path(out), force)
    chosen, others = choose(checkpoint, include, exclude, conv1d)
    sketches = collect(
        [(c.name, lambda c=c: config.random(c.shape, dtype=c.dtype, device="meta")) for c in chosen],
        "Exclude them with --exclude, or choose another structure or budget",
        most=3,  # the command's errors are one line
    )
    rows = {c.name: _row(c, sketch) for c, sketch in zip(chosen, sketches, strict=True)}
    if not dry_run:
        assert out is not None
        hidden = None if progress is None else not progress
        _check_finite(checkpoint, chosen, hidden)
        jobs = [_compress_job(checkpoint, c, config, sketch, rows) for c, sketch in zip(chosen, sketches, strict=True)]
        rewrite(checkpoint, jobs, Path(out), hidden)
    total = _params(checkpoint)
    change = sum(row.params_after - row.params_before for row in rows.values())
    every = sorted([*rows.values(), *others], key=lambda row: natural(row.name))
    return Report(tuple(every), total, total + change, dry_run)


def densify_checkpoint(
    source: str | os.PathLike[str], out: str | os.PathLike[str], force: bool = False, progress: bool | None = None
) -> Report:
    """Multiply the structured layers of a checkpoint out: dense tensors under their original names and layouts.

    Args:
        source: as for :func:`compress_checkpoint`.
        out: the file or folder to write.
        force: replace an existing ``out``.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        One row for each structured layer.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the input is damaged or has no structured layer, or ``out`` exists.
    """
    checkpoint = Checkpoint(source)
    check_output(checkpoint, Path(out), force)
    if not checkpoint.layers:
        raise ValueError(f"{checkpoint.path} has no structured layer")
    rows: dict[str, LayerRow] = {}
    jobs = [_densify_job(checkpoint, name, spec, rows) for name, spec in checkpoint.layers.items()]
    rewrite(checkpoint, jobs, Path(out), None if progress is None else not progress)
    before, after = _params(checkpoint), _params(Checkpoint(out))
    return Report(tuple(sorted(rows.values(), key=lambda row: natural(row.name))), before, after)


# ---------------------------------------------------------------- jobs
def _compress_job(
    checkpoint: Checkpoint, found: Candidate, config: Config, sketch: StructuredMatrix, rows: dict[str, LayerRow]
) -> Job:
    prefix = layer_prefix(found.name)
    entries = {prefix + k: Entry.of(prefix + k, t) for k, t in MatrixParameters(sketch).state_dict().items()}
    for name in entries:
        if name in checkpoint.where:
            raise ValueError(f"{checkpoint.path} has both {found.tensor} and {name}")

    def make() -> dict[str, Tensor]:
        start = time.perf_counter()
        result = project(found.read(checkpoint), config)
        seconds = time.perf_counter() - start
        rows[found.name] = dataclasses.replace(
            rows[found.name], error=result.error, bound=result.bound, seconds=seconds
        )
        return {prefix + k: t for k, t in MatrixParameters(result.matrix).state_dict().items()}

    bias = f"{found.name}.bias" in checkpoint.where
    return Job(
        found.name,
        {found.tensor},
        entries,
        make,
        LayerSpec.of(layer_class(sketch), sketch, bias, found.conv1d),
    )


def _densify_job(checkpoint: Checkpoint, name: str, spec: LayerSpec, rows: dict[str, LayerRow]) -> Job:
    keys = [checkpoint.resolve(key) for key in tensor_names(spec.matrix, layer_prefix(name))]
    dtypes = [dtype for k in keys if (dtype := DTYPES.get(checkpoint.entry(k).dtype)) and dtype.is_floating_point]
    tensor = layer_prefix(name).removesuffix(".")
    shape = spec.shape[::-1] if spec.conv1d else spec.shape
    entry = Entry.of(tensor, torch.empty(shape, dtype=dtypes[0] if dtypes else torch.complex64, device="meta"))

    def make() -> dict[str, Tensor]:
        try:
            value = build(spec.matrix, layer_prefix(name), lambda key: read_tensor(checkpoint, key))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{checkpoint.path}: the structured layer {name!r} cannot be made: {error}") from error
        dense = to_dense(value)
        size, words = dense.numel(), f"{structure_name(value)} to dense"
        rows[name] = LayerRow(name, words, spec.shape, value.num_params, size, value.flops, 2 * size)
        return {tensor: dense.mT if spec.conv1d else dense}

    return Job(name, set(keys), {tensor: entry}, make)


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read one tensor, under its own name or an alias."""
    stored = checkpoint.resolve(name)
    return checkpoint.where[stored].read(stored)


def _check_finite(checkpoint: Checkpoint, chosen: list[Candidate], hidden: bool | None) -> None:
    # A pass of its own, which costs little beside the projections, so that no hours are lost to a late surprise.
    bar = tqdm(chosen, "checking", disable=hidden)
    broken = [c.tensor for c in bar if not torch.isfinite(c.read(checkpoint)).all()]
    if broken:
        raise ValueError(f"NaN or infinite entries in {', '.join(broken)}; leave them alone with --exclude")


def _row(found: Candidate, sketch: StructuredMatrix) -> LayerRow:
    size = found.shape[0] * found.shape[1]
    return LayerRow(found.name, structure_name(sketch), found.shape, size, sketch.num_params, 2 * size, sketch.flops)


def _params(checkpoint: Checkpoint) -> int:
    entries = (checkpoint.entry(name) for name in checkpoint.where)
    return sum(e.numel for e in entries if e.dtype.startswith(("F", "BF", "C")))


# ---------------------------------------------------------------- writing
def rewrite(checkpoint: Checkpoint, jobs: Sequence[Job], out: Path, hidden: bool | None = None) -> None:
    """Write a checkpoint with some layers replaced, shard by shard and tensor by tensor.

    Args:
        checkpoint: the source.
        jobs: the layers to rewrite; each goes into the shard of the first tensor that it takes away.
        out: the file or folder, passed by ``check_output``.
        hidden: whether to hide the progress bar; None shows it on a terminal.
    """
    removed = set().union(*(job.removes for job in jobs))
    by_shard: dict[Path, list[Job]] = {file.path: [] for file in checkpoint.files}
    for job in jobs:
        by_shard[checkpoint.where[min(job.removes)].path].append(job)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(jobs), desc="writing", disable=hidden))
        if checkpoint.folder is None:
            file = checkpoint.files[0]
            _write_shard(checkpoint, file, by_shard[file.path], removed, out, bar)
            return
        stage = stack.enter_context(staging(out, checkpoint.folder))
        weight_map: dict[str, str] = {}
        sizes: list[Entry] = []
        for file in checkpoint.files:
            target = stage / file.path.name
            entries = _write_shard(checkpoint, file, by_shard[file.path], removed, target, bar)
            weight_map |= dict.fromkeys(entries, target.name)
            sizes += entries.values()
        if checkpoint.index is not None:
            metadata = {**checkpoint.index_metadata, "total_size": sum(entry.nbytes for entry in sizes)}
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(entry.numel for entry in sizes)
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (stage / checkpoint.index.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    checkpoint: Checkpoint, file: TensorFile, jobs: Sequence[Job], removed: set[str], target: Path, bar: Any
) -> Mapping[str, Entry]:
    kept = {name: entry for name, entry in file.entries.items() if name not in removed}
    entries = {**kept, **{name: entry for job in jobs for name, entry in job.entries.items()}}
    # An alias of a tensor that is gone would promise what the file does not hold.
    metadata = {k: v for k, v in file.metadata.items() if k != KEY and v not in removed}
    old = parse_layers(file.metadata, str(file.path))
    layers = {name: layer for name, layer in old.items() if layer_kept(name, layer, checkpoint, removed)}
    layers |= {job.name: job.layer for job in jobs if job.layer is not None}
    if layers:
        metadata[KEY] = dump_layers(layers)
    with tensor_writer(target, entries, metadata) as writer:
        for name in kept:
            writer.write_chunks(name, file.chunks(name))
        for job in jobs:
            for name, tensor in job.make().items():
                writer.write(name, tensor)
            bar.update()
    return entries


def layer_kept(name: str, layer: LayerSpec, checkpoint: Checkpoint, removed: set[str]) -> bool:
    """Whether the tensors of a structured layer stay in the checkpoint."""
    return not any(checkpoint.resolve(key) in removed for key in tensor_names(layer.matrix, layer_prefix(name)))
