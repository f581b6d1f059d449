"""Compressed transformers models as folders that one call loads."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structmat.surgery.checkpoint import load_file, save_file
from structmat.surgery.healing.feed import is_transformers
from structmat.surgery.output import staging

WEIGHTS = "model.safetensors"
"""The file of the weights; its header says what the structured layers are."""


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Save a transformers model with structured layers as a folder, which :func:`load_pretrained` loads.

    The folder holds ``config.json``, ``generation_config.json`` where the model has one, the tokenizer's files, and
    ``model.safetensors`` as :func:`save_file` writes it. It is made under a temporary name and renamed; in a folder
    that exists, files of these names are replaced, and shards of a checkpoint there are removed. transformers' own
    ``from_pretrained`` knows nothing of structured layers: to it they are missing weights.

    Args:
        model: a transformers model of a class that transformers itself has.
        directory: the folder to make or to write in.
        tokenizer: the model's tokenizer or processor, saved with it; None for none.

    Raises:
        OSError: if the folder that would hold ``directory`` does not exist or cannot be written.
        TypeError: if the model is not one of transformers'.
        ValueError: if transformers has no class of its name, ``directory`` is a file, or the weights cannot be saved:
            see :func:`save_file`.

    Example:
        >>> import os, tempfile, transformers, structmat
        >>> from structmat import surgery
        >>> config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> report = surgery.compress_(model, structmat.LowRankConfig(ratio=0.5))
        >>> folder = os.path.join(tempfile.mkdtemp(), "small")
        >>> surgery.save_pretrained(model, folder)
        >>> type(surgery.load_pretrained(folder).transformer.h[0].attn.c_attn).__name__
        'LowRankLinear'
    """
    if not is_transformers(model):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}; save_file saves any module's weights"
        )
    _class_named(type(model).__name__, "the model")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a folder to write")
    with staging(directory) as stage:
        write_pretrained(model, stage, tokenizer)


def write_pretrained(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write the files of :func:`save_pretrained` into a folder that is there."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_file(model, folder / WEIGHTS)


def load_pretrained(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the folder of :func:`save_pretrained` or of ``structmat compress --model``; nothing is downloaded.

    The architecture is that of ``config.json``; its weights are not drawn, and the original ones are not needed. A
    folder without structured layers, such as transformers' own, is loaded likewise. The tokenizer is loaded as ever:
    ``transformers.AutoTokenizer.from_pretrained(directory)``.

    Args:
        directory: the folder, with ``config.json`` and one safetensors file or an index of shards.
        device: where the model shall be; the CPU by default.
        dtype: of the model; by default that in which it was saved.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        ImportError: if transformers is not installed.
        OSError: if a file cannot be read.
        ValueError: if the folder is not such a one, or its weights do not fit the architecture.

    Example:
        >>> import tempfile, torch, transformers
        >>> from structmat import surgery
        >>> config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
        >>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.arange(9)[None]
        >>> folder = tempfile.mkdtemp()
        >>> surgery.save_pretrained(model, folder)
        >>> torch.equal(surgery.load_pretrained(folder)(tokens).logits, model(tokens).logits)
        True
    """
    folder = Path(directory)
    model = undrawn_model(read_config(folder), folder, dtype)
    load_file(model, folder)
    return model.to(device).eval() if device is not None else model.eval()


def read_config(folder: str | os.PathLike[str]) -> Any:
    """The transformers config of a model's folder.

    Raises:
        ImportError: if transformers is not installed.
        OSError: if there is no such folder, or no ``config.json`` in it.
        ValueError: if it is damaged, or of a model that transformers does not know.
    """
    transformers: Any = import_transformers()
    folder = Path(folder)
    with open(folder / "config.json", "rb"):
        pass  # transformers would take the name of a folder that is not there for one on the hub
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except OSError as error:  # what it makes of damaged JSON
        raise ValueError(str(error)) from error


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs transformers: pip install transformers") from error


def model_class(config: Any, folder: str | os.PathLike[str]) -> Any:
    """The class that a config names, or of none the one that transformers' ``AutoModel`` takes.

    Raises:
        ValueError: if the config names several, or one that transformers does not have.
    """
    names, where = getattr(config, "architectures", None) or [], str(Path(folder) / "config.json")
    if len(names) > 1:
        raise ValueError(f"{where} must name one class under architectures, got {', '.join(names)}")
    if names:
        return _class_named(names[0], where)
    mapping = import_transformers().MODEL_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"{where} names no class under architectures")
    return mapping[type(config)]


def undrawn_model(config: Any, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """The model of a config, its parameters uninitialised where transformers can do that; see :func:`model_class`."""
    cls = model_class(config, folder)
    with torch.random.fork_rng(devices=[]), _undrawn():
        model = cls._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    model.tie_weights()  # which the constructor leaves out with the initialisation
    return model


def _class_named(name: str, where: str) -> Any:
    cls = getattr(import_transformers(), name, None)
    if cls is None or not hasattr(cls, "_from_config"):
        raise ValueError(f"{where}: transformers has no model class {name}; custom code is not run")
    return cls


def _undrawn() -> Any:
    """While entered, constructors leave parameters uninitialised, where transformers can do that."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):  # of 5 and of 4
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(module).no_init_weights()
    return contextlib.nullcontext()
