"""The file from which healing goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structmat.surgery.atomic import atomic_write

_FORMAT = "structmat.heal/1"
_SAMPLES = 256  # entries of each tensor that tell two models apart


def fingerprint(
    compressed: nn.Module, dense: nn.Module, chosen: dict[str, nn.Parameter], arguments: dict[str, Any]
) -> dict[str, str]:
    """What has to be equal for a run to go on: arguments, the trained parameters' sizes, and all that is not trained.

    Of the tensors that are not trained, some entries evenly spread.
    """
    ids = {id(p) for p in chosen.values()}
    frozen = [(name, p) for name, p in compressed.named_parameters() if id(p) not in ids]
    # A structure's own tensors; floating-point ones are left out, which in user's models may be running statistics.
    frozen += [(name, b) for name, b in compressed.named_buffers() if not (b.is_floating_point() or b.is_complex())]
    return {key: repr(value) for key, value in arguments.items()} | {
        "the trained parameters": json.dumps([(n, list(p.shape), str(p.dtype)) for n, p in chosen.items()]),
        "the compressed model's other parameters": _digest(frozen),
        "the dense model": _digest(dense.named_parameters()),
    }


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.device.type != "meta" and type(tensor.data) is Tensor and tensor.numel():
            flat = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)]
            total.update(flat.resolve_conj().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


def write(path: str | os.PathLike[str], expected: dict[str, str], state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    with atomic_write(path) as file:
        torch.save({"format": _FORMAT, "fingerprint": expected, **state}, file)


def read(path: str | os.PathLike[str], expected: dict[str, str]) -> dict[str, Any] | None:
    """The state that :func:`write` wrote, or None if there is no such file.

    Raises:
        ValueError: if it is no such file, or of another run.
    """
    if not os.path.exists(path):
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of what is no such file torch.load raises nearly anything
        raise ValueError(f"{os.fspath(path)} is no checkpoint of heal: {error}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)} is no checkpoint of heal ({_FORMAT})")
    theirs = found["fingerprint"]
    different = [key for key in expected if theirs.get(key) != expected[key]]
    if different:
        details = "".join(
            f"\n  {key}: {_short(theirs.get(key))} there, {_short(expected[key])} here" for key in different
        )
        raise ValueError(
            f"{os.fspath(path)} is the checkpoint of another run; nothing was changed. Give another path, or remove "
            f"the file to begin anew. What differs:{details}"
        )
    return found


def _short(text: str | None) -> str:
    return "missing" if text is None else text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
