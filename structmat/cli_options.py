"""The options of ``structmat compress --model``, and what is checked before anything is read."""

from __future__ import annotations

import argparse
import errno
import fnmatch
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structmat.config import Config, config_from_dict
from structmat.surgery.pretrained import WEIGHTS
from structmat.surgery.selection import is_linear_like
from structmat.surgery.shards import SUFFIX

ABOUT = """\
With --model DIR a transformers model is compressed as a whole: the budget goes
to the layers and structures that keep its outputs best on a text, and a report
tells what is left of its quality on the text's last tenth, which nothing is
fitted to. The text has a passage in each paragraph (without blank lines: in
each line). OUT is a folder, by default REPORT/model, with config.json,
tokenizer, plan.json and model.safetensors. One call loads it, and does not
need the original weights:

    model = structmat.surgery.load_pretrained("OUT")

REPORT is then a folder too, for report.html, report.md, report.json and plots."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
DEFAULTS: dict[str, Any] = {
    "structures": "monarch,lowrank",
    "sensitivity": "measured",
    "calibrate_tokens": 32768,
    "batch_size": 8,
    "damping": 0.1,
    "heal_steps": 0,
    "heal_lr": 3e-5,
    "seed": 0,
}
_MODEL_ONLY = (*DEFAULTS, "calibrate", "plan", "length", "compensate", "device", "dtype")
_CHECKPOINT_ONLY = ("rank", "max_params", "conv1d", "plot", "structure", "output")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that go with ``--model``; None or False where they are not given."""
    add = parser.add_argument_group("models, with --model (the first positional argument is then OUT)").add_argument
    add("--model", metavar="DIR", help="the folder of a transformers model")
    add("--calibrate", metavar="FILE", help="text on which the model's outputs are to be kept")
    add("--structures", metavar="NAMES", help="to choose from, separated by commas (monarch,lowrank)")
    add("--plan", metavar="FILE", help="a plan.json, in place of --ratio and --structures")
    add(
        "--sensitivity",
        choices=("measured", "fisher", "none"),
        metavar="HOW",
        help="what an error in a layer does to the model: measured (a forward pass for each layer; the default), "
        "fisher (a backward pass; language models), or none",
    )
    add("--calibrate-tokens", type=int, metavar="N", help="tokens to calibrate on (32768)")
    add("--length", type=int, metavar="N", help="tokens in a sequence (the model's length, but 512 at most)")
    add("--batch-size", type=int, metavar="N", help="sequences in a batch (8)")
    add("--damping", type=float, metavar="X", help="of the calibration (0.1)")
    add("--compensate", action="store_true", help="layers in order, each for what the compressed ones before it give")
    add("--heal-steps", type=int, metavar="N", help="steps of distillation from the dense model (0)")
    add("--heal-lr", type=float, metavar="X", help="their learning rate (0.00003)")
    add("--device", metavar="NAME", help="where to compute (cuda if there is one, else cpu)")
    add("--dtype", choices=list(DTYPES), metavar="NAME", help="of the model (as it was saved)")
    add("--seed", type=int, metavar="N", help="of the choice of passages (0)")


def check_mode(args: argparse.Namespace) -> None:
    """Raise if an option for models is given without ``--model``, or one for checkpoints with it."""
    for name in _MODEL_ONLY if args.model is None else _CHECKPOINT_ONLY:
        if getattr(args, name) not in (None, False, []):
            option = "a second positional argument" if name == "output" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {'needs' if args.model is None else 'does not go with'} --model")


def check_arguments(args: argparse.Namespace) -> list[Config]:
    """Fill in defaults, raise for what is known to be wrong before anything is read; the structures to choose from."""
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.plan is not None:
        given = [name for name in ("ratio", "nblocks") if getattr(args, name) is not None]
        given += [name for name in ("include", "exclude") if getattr(args, name)]
        if given:
            raise ValueError(f"--{given[0]} does not go with --plan, which says all of it")
        structures = []
    elif args.ratio is None:
        raise ValueError("--model needs --ratio, or a --plan")
    else:
        structures = [_structure(name.strip(), args) for name in args.structures.split(",")]
    for name, least in (("calibrate_tokens", 2), ("batch_size", 1), ("heal_steps", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("heal_steps", "compensate"):
        if getattr(args, name) and args.calibrate is None:
            raise ValueError(f"--{name.replace('_', '-')} needs the text of --calibrate")
    return structures


def _structure(name: str, args: argparse.Namespace) -> Config:
    blocks = {"nblocks": args.nblocks} if args.nblocks is not None and name in ("monarch", "blockdiagonal") else {}
    try:
        return config_from_dict({"structure": name, "ratio": args.ratio, **blocks})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--structures {name}: {error}") from error


def layer_filter(args: argparse.Namespace, model: Any) -> Callable[[str, nn.Module], bool]:
    """Which layers to compress: those of the patterns, without the output head where no --include asks for it."""
    names = [name for name, module in model.named_modules() if is_linear_like(module)]

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(key, p) for p in patterns for key in (name, f"{name}.weight"))

    for option in ("include", "exclude"):
        for pattern in getattr(args, option):
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(f"--{option} {pattern!r} matches no linear layer of the model, such as {names[0]}")
    head = model.get_output_embeddings()

    def chosen(name: str, module: nn.Module) -> bool:
        wanted = matches(name, args.include) if args.include else module is not head
        return wanted and not matches(name, args.exclude)

    return chosen


def check_places(args: argparse.Namespace, source: Path) -> tuple[Path, Path | None]:
    """The folders of the model and of the report, checked before hours of work."""
    told = None if args.report is None else Path(args.report)
    if args.input is None and told is None:
        raise ValueError("name OUT, the folder to write, or --report FOLDER, or give --dry-run")
    out = Path(args.input) if args.input is not None else told / "model"  # pyright: ignore[reportOptionalOperand]
    for folder in filter(None, (told, out if told is None or out.parent != told else None)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder to write")
        parent = folder if folder.is_dir() else folder.resolve().parent
        if not parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(parent))
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out} is a file: name a folder to write")
        if out.samefile(source):
            raise ValueError(f"{out} is the model's own folder: name another one")
        if any(out.iterdir()) and not args.force:
            raise ValueError(f"{out} exists; give --force to replace the model in it")
        if foreign := sorted(p.name for p in out.glob(f"*{SUFFIX}") if p.name != WEIGHTS):
            raise ValueError(f"{out} holds {', '.join(foreign)}, which would stay; remove it, or name another folder")
    return out, told


def find_device(name: str | None) -> torch.device:
    """The device of this name, or a GPU if there is one; raise ValueError unless tensors can be made there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
