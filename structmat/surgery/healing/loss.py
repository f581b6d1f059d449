"""How far a compressed model's outputs are from its dense original's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structmat.surgery.training import distillation_loss

HEADS = (None, "kl", "mse")
Parts = tuple[dict[str, Tensor], dict[str, Tensor]]


def healing_loss(
    compressed_outputs: Any,
    dense_outputs: Any,
    mask: Tensor | None = None,
    *,
    hidden_weight: float = 1.0,
    output_weight: float = 1.0,
    temperature: float = 1.0,
    head: str | None = None,
) -> Tensor:
    """The weighted sum of two means: over the hidden states both models return, and over their other outputs.

    Of a hidden state h the term is ``mean |h_dense - h|^2 / var(h_dense)``, mean and variance over all its entries at
    the positions that the mask keeps; so every layer counts alike, whatever its scale. Of logits it is the divergence
    of :func:`distillation_loss`, ``T^2 KL(dense / T | compressed / T)`` over the last dimension; of other outputs it is
    that of a hidden state. Matching hidden states beside logits is the way of TinyBERT (Jiao et al. 2020).

    What counts as what, by the keys of a mapping such as transformers' ``ModelOutput``: ``*hidden_states``,
    ``*hidden_state`` and every sequence of tensors are hidden states, ``*logits`` with more than one class are logits,
    all other tensors outputs. Losses, attentions, caches and integers are left out, and so is what one model alone
    returns. Of a tuple, tensors are outputs and nested sequences hidden states.

    Args:
        compressed_outputs: a tensor, a mapping, or a sequence.
        dense_outputs: the same of the dense model; gets no gradient, and may be on another device.
        mask: integers or booleans; positions where it is 0 do not count. It applies to tensors of shape
            (*mask.shape, ...) with at least one more dimension, or (mask.numel(), ...); others count as a whole.
        hidden_weight: of the mean over hidden states.
        output_weight: of the mean over outputs.
        temperature: T > 0, for logits.
        head: "kl" takes all outputs for logits, "mse" none; None goes by the keys.

    Returns:
        A real scalar with a gradient, float64 where an output is, else float32.

    Raises:
        TypeError: if outputs hold no tensors.
        ValueError: if the models have nothing in common, shapes differ, the mask keeps nothing, or a number is out of
            range.

    Example:
        >>> import torch
        >>> from structmat import surgery
        >>> dense = {"logits": torch.randn(2, 5, 10), "hidden_states": (torch.randn(2, 5, 8), torch.randn(2, 5, 8))}
        >>> surgery.healing_loss(dense, dense, mask=torch.ones(2, 5)).abs().item() < 1e-6
        True
    """
    check_weights(hidden_weight, output_weight, temperature, head)
    parts = (split("compressed_outputs", compressed_outputs), split("dense_outputs", dense_outputs))
    return combine(*parts, mask, hidden_weight, output_weight, temperature, head)


def check_weights(hidden_weight: float, output_weight: float, temperature: float, head: str | None) -> None:
    """Raise unless the numbers of :func:`healing_loss` are in their ranges."""
    for name, value in (("hidden_weight", hidden_weight), ("output_weight", output_weight)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if hidden_weight == output_weight == 0:
        raise ValueError("hidden_weight and output_weight are both 0: there is nothing to learn from")
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    if head not in HEADS:
        raise ValueError(f"head must be one of {HEADS}, got {head!r}")


# ---------------------------------------------------------------- what a model returned
def split(name: str, outputs: Any) -> Parts:
    """Hidden states and other outputs, by keys."""
    if isinstance(outputs, Tensor):
        items: list[tuple[str, Any]] = [("output", outputs)]
    elif isinstance(outputs, Mapping):
        items = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, (tuple, list)):
        items = [(f"output.{i}", value) for i, value in enumerate(outputs)]
    else:
        raise TypeError(f"{name} must be a tensor, a mapping or a sequence of tensors, got {type(outputs).__name__}")
    hidden: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in items:
        if key.endswith(("loss", "attentions")) or key.startswith("past"):
            continue
        if isinstance(value, (tuple, list)):
            hidden |= {f"{key}.{i}": t for i, t in enumerate(value) if _counts(t)}
        elif _counts(value):
            (hidden if key.endswith(("hidden_state", "hidden_states")) else heads)[key] = value
    # transformers returns the last of the hidden states under its own name too.
    listed = {id(t) for key, t in hidden.items() if "." in key}
    hidden = {key: t for key, t in hidden.items() if "." in key or id(t) not in listed}
    if not (hidden or heads):
        raise TypeError(f"{name} holds no tensor of floating-point or complex numbers")
    return hidden, heads


def _counts(value: Any) -> bool:
    # A loss or another number has no dimension: it is no output that could be matched position by position.
    return isinstance(value, Tensor) and value.ndim > 0 and (value.is_floating_point() or value.is_complex())


# ---------------------------------------------------------------- the terms
def combine(
    compressed: Parts,
    dense: Parts,
    mask: Tensor | None,
    hidden_weight: float,
    output_weight: float,
    temperature: float,
    head: str | None,
) -> Tensor:
    """The loss of outputs that are split already."""
    keep = Mask(mask)
    total: list[Tensor] = []
    for index, weight in ((0, hidden_weight), (1, output_weight)):
        common = [key for key in compressed[index] if key in dense[index]]
        if weight == 0 or not common:
            continue
        terms = []
        for key in common:
            student, teacher = compressed[index][key], dense[index][key]
            if student.shape != teacher.shape:
                raise ValueError(
                    f"{key} has shape {tuple(student.shape)} in the compressed model and {tuple(teacher.shape)} in the "
                    "dense one"
                )
            logits = head == "kl" or (head is None and key.endswith("logits") and student.shape[-1] > 1)
            if index and logits and not student.is_complex():
                student, teacher = keep(_work(student)), keep(_work(teacher.detach().to(student.device)))
                terms.append(distillation_loss(student, teacher, temperature=temperature, alpha=1))
            else:
                terms.append(relative_error(student, teacher, keep))
        total.append(weight * torch.stack([t.to(terms[0].device) for t in terms]).mean())
    if not total:
        raise ValueError(
            "the two models return nothing in common that has a weight: the compressed one "
            f"{', '.join([*compressed[0], *compressed[1]])}; the dense one {', '.join([*dense[0], *dense[1]])}"
        )
    return total[0] if len(total) == 1 else total[0] + total[1].to(total[0].device)


def relative_error(student: Tensor, teacher: Tensor, keep: Mask) -> Tensor:
    """``mean |teacher - student|^2 / var(teacher)`` over the kept positions; the mean square where that is 0."""
    student, teacher = keep(_work(student)), keep(_work(teacher.detach().to(student.device)))
    teacher = teacher.to(student.dtype)
    if student.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(student.shape)} has no entries to match")
    if student.is_complex():
        student, teacher = torch.view_as_real(student), torch.view_as_real(teacher)
    variance, square = teacher.var(correction=0), teacher.square().mean()
    # What is constant up to rounding has a variance of rounding.
    scale = torch.where(variance > 1e3 * torch.finfo(teacher.dtype).eps * square, variance, square)
    return (student - teacher).square().mean() / torch.where(scale > 0, scale, torch.ones_like(scale))


def _work(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class Mask:
    """Keeps the positions at which a mask is not 0.

    Args:
        mask: integers or booleans, or None to keep all.

    Raises:
        TypeError: if the mask is no tensor.
        ValueError: if it keeps nothing.
    """

    def __init__(self, mask: Tensor | None) -> None:
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
        self.shape = () if mask is None else tuple(mask.shape)
        self.index: Tensor | None = None
        if mask is not None:
            index = mask.reshape(-1).nonzero().reshape(-1)
            if index.numel() == 0:
                raise ValueError(f"mask of shape {self.shape} keeps no position")
            self.index = None if index.numel() == mask.numel() else index

    def __call__(self, value: Tensor) -> Tensor:
        """The kept positions as (kept, ...), or ``value`` itself where the mask does not apply."""
        if self.index is None or value.ndim < 2:
            return value
        ndim = len(self.shape)
        if value.ndim > ndim and tuple(value.shape[:ndim]) == self.shape:
            rows = value.flatten(0, ndim - 1)
        elif value.shape[0] == math.prod(self.shape):
            rows = value
        else:
            return value
        if self.index.device != rows.device:
            self.index = self.index.to(rows.device)
        return rows.index_select(0, self.index)
