"""The command ``structmat``: compress, inspect and densify safetensors checkpoints without the model."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from structmat import __version__
from structmat.cli_model import compress_model
from structmat.cli_options import ABOUT, add_model_options, check_mode
from structmat.config import CONFIGS, Config, config_from_dict
from structmat.surgery.contents import inspect_checkpoint
from structmat.surgery.files import compress_checkpoint, densify_checkpoint
from structmat.surgery.plot import check_plot

_ABOUT = """\
Replace the weights of linear layers in a safetensors checkpoint by structured
matrices, which hold fewer numbers and multiply faster, without loading the
model. Load the result into a model of the original architecture:

    from structmat import surgery
    surgery.load_file(model, "OUT")

IN is a safetensors file, a folder that holds one, or a checkpoint in shards:
its folder or its *.safetensors.index.json. For a folder or an index OUT is a
folder, to which configuration and tokenizer files are copied."""

_STATUS = """\
Exit status: 0 on success; 2 on an error, told in one line on standard error;
130 when interrupted. OUT is written under a temporary name and renamed when it
is complete: after an error or an interruption it is as it was before."""

_COMPRESS = f"""\
Project weights to a structure. Every two-dimensional floating-point tensor
X.weight is taken for the weight of a linear layer, unless its name is that of
an embedding or output head. It becomes X.weight.left and X.weight.right (or
X.weight.blocks), of the same dtype; biases and all other tensors stay as they
are. The result is the matrix of the structure that is nearest in the Frobenius
norm; the report gives each layer's relative error and the bound that proves it.

structures, for a weight of m rows and n columns:
  monarch        two block-diagonal factors around a permutation; --nblocks (4),
                 and --rank or a budget: with neither, the widest useful factors
  lowrank        a tall factor times a wide one, r (m + n) numbers; --rank or a
                 budget
  blockdiagonal  the blocks on the diagonal, m n / nblocks numbers; --nblocks (4)
                 or a budget
  pivotedlowrank r of the rows, and the others as their combinations: the same
                 matrices with r (m + n - r) numbers; --rank or a budget
  butterfly      a product of log n sparse factors; the prime factors of m and n
                 set its size, which a budget has to leave room for
  blocksparse    the blocks of 32 x 32 of the largest norms; a budget
  ldr            a Toeplitz-like matrix of low displacement rank, r (m + n)
                 numbers; --rank or a budget
  pixelfly       blocks near to powers of two from the diagonal, and a low-rank
                 matrix; --rank, or a budget, a quarter or more of which
                 is low rank

Patterns (GLOB) are those of the shell (* ? [abc]), for a tensor's name with or
without .weight; quote them. One that matches no candidate is an error.

{ABOUT}"""

_EXAMPLES = """\
examples:
  structmat compress model.safetensors small.safetensors --ratio 0.5
  structmat compress model.safetensors --structure lowrank --rank 64 --dry-run
  structmat compress llama/ small/ --ratio 0.4 --include '*.mlp.*' \\
      --report report.json --plot report.png
  structmat compress gpt2.safetensors small.safetensors --conv1d '*.c_*' \\
      --ratio 0.5
  structmat compress --model DIR --calibrate text.txt --ratio 0.5 \\
      --structures monarch,lowrank,pixelfly --heal-steps 500 --report out/"""

_DENSIFY = """\
Write a checkpoint in which every structured layer is a dense X.weight again, in
the layout that it came in, for software that knows nothing of structures. The
dense weight is the approximation, not the original."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, and help at the width of the terminal with examples as they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"structmat: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser("structmat", description=_ABOUT, epilog=_STATUS)
    parser.add_argument("--version", action="version", version=f"structmat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser(
        "compress", help="project weights to a structure", description=_COMPRESS, epilog=_EXAMPLES
    )
    add.add_argument("input", metavar="IN", nargs="?", help="the checkpoint to read; with --model there is none")
    add.add_argument("output", metavar="OUT", nargs="?", help="what to write; may be left out with --dry-run")
    shape = add.add_argument_group("structure")
    shape.add_argument(
        "--structure",
        choices=sorted(set(CONFIGS) - {"sum"}),
        metavar="NAME",
        help="default: monarch; with --model see --structures",
    )
    shape.add_argument("--nblocks", type=_blocks, metavar="N", help="number of blocks; K,L: right blocks, left blocks")
    size = shape.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="R", help="rank of the matrix, or of a Monarch matrix's slices")
    size.add_argument("--ratio", type=float, metavar="X", help="budget: share of each dense weight, above 0, at most 1")
    size.add_argument("--max-params", type=int, metavar="N", help="budget: numbers in each weight")
    which = add.add_argument_group("tensors")
    which.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="compress only these, embeddings and heads included (repeatable)",
    )
    which.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these alone (repeatable)")
    which.add_argument(
        "--conv1d",
        action="append",
        default=[],
        metavar="GLOB",
        help="these are stored as (in, out), as transformers' Conv1D does in GPT-2 (repeatable)",
    )
    told = add.add_argument_group("output")
    told.add_argument("--dry-run", action="store_true", help="read headers, print sizes, write nothing")
    told.add_argument("--report", metavar="FILE", help="write the report as JSON; with --model a folder")
    told.add_argument("--plot", metavar="FILE", help="draw the report (png, svg or pdf); needs matplotlib")
    told.add_argument("--force", action="store_true", help="replace an existing OUT")
    add_model_options(add)

    show = commands.add_parser(
        "inspect",
        help="list the layers of a checkpoint",
        description="List structured layers and dense weights with their sizes. Reads headers only.",
    )
    show.add_argument("input", metavar="FILE", help="a safetensors file, a checkpoint's folder, or an index")
    show.add_argument("--json", action="store_true", help="print JSON")

    undo = commands.add_parser(
        "densify",
        help="multiply structured layers out",
        description=_DENSIFY,
    )
    undo.add_argument("input", metavar="IN", help="a compressed checkpoint")
    undo.add_argument("output", metavar="OUT", help="what to write")
    undo.add_argument("--force", action="store_true", help="replace an existing OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, or 2 after an error that was told on standard error, or 130 after an interruption.

    Raises:
        SystemExit: after ``--help``, ``--version`` and errors of usage, as argparse does.

    Example:
        >>> import os, tempfile, torch, structmat.cli
        >>> from safetensors.torch import save_file
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"fc.weight": torch.ones(8, 8), "fc.bias": torch.ones(8)}, path)
        >>> structmat.cli.main(["inspect", path])
        layer            structure  dtype  shape  params  of dense
        fc               dense      F32      8x8      64    100.0%
        1 other tensors                                8
        total                                         72    100.0%
        0 structured layers, 288 bytes of tensors
        0
    """
    args = build_parser().parse_args(argv)
    try:
        with _terminable():
            {"compress": _compress, "inspect": _inspect, "densify": _densify}[args.command](args)
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone, as in `structmat inspect FILE | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = error.strerror or str(error)
        return _fail(f"{error.filename}: {what}" if error.filename else what)
    except (ValueError, ImportError, NotImplementedError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("structmat: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    # One line: a list of layers follows its introduction after a colon, and its items after semicolons.
    line = message.replace(":\n  ", ": ").replace("\n  ", "; ").replace("\n", " ")
    print(f"structmat: error: {line}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a polite kill, such as a scheduler's at the end of a job's time, clean up as Ctrl-C does."""

    def stop(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _blocks(text: str) -> int | tuple[int, int]:
    """``4`` or ``4,8``."""
    first, comma, second = text.partition(",")
    try:
        return (int(first), int(second)) if comma else int(first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number N nor two numbers K,L") from None


def _config(args: argparse.Namespace) -> Config:
    names = ("nblocks", "rank", "ratio", "max_params")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    structure = args.structure or "monarch"
    if structure == "pixelfly":
        given["split"] = "rule"  # sizes are written before anything is projected
    try:
        return config_from_dict({"structure": structure, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--structure {structure}: {error}") from error


def _check_folder(path: str) -> None:
    """Raise unless a file can be written there: before the work that it is to tell of."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _compress(args: argparse.Namespace) -> None:
    check_mode(args)
    if args.model is not None:
        compress_model(args)
        return
    if args.input is None:
        raise ValueError("name IN, the checkpoint to read, or a --model")
    config = _config(args)
    if args.output is None and not args.dry_run:
        raise ValueError("name OUT, the file or folder to write, or give --dry-run")
    for path in filter(None, (args.report, args.plot)):
        _check_folder(path)
    if args.plot:
        check_plot(args.plot)
    report = compress_checkpoint(
        args.input,
        args.output,
        config,
        args.include,
        args.exclude,
        args.conv1d,
        force=args.force,
        dry_run=args.dry_run,
    )
    print(report)
    if args.report:
        report.save(args.report)
    if args.plot:
        report.plot(args.plot)


def _inspect(args: argparse.Namespace) -> None:
    contents = inspect_checkpoint(args.input)
    print(contents.to_json() if args.json else contents)


def _densify(args: argparse.Namespace) -> None:
    print(densify_checkpoint(args.input, args.output, force=args.force))


if __name__ == "__main__":
    sys.exit(main())
