"""Heal a compressed model by its dense original."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from structmat._checks import check_int
from structmat.surgery.healing import saved
from structmat.surgery.healing.feed import Batches, Feed, Forward
from structmat.surgery.healing.loop import Run, Settings
from structmat.surgery.healing.loss import check_weights
from structmat.surgery.healing.methods import Distill, Layerwise, MaskFn, attention_mask
from structmat.surgery.healing.models import (
    Train,
    check_models,
    kept,
    recomputed,
    set_mode,
    set_trainable,
    trained_parameters,
)
from structmat.surgery.healing.report import HealReport
from structmat.surgery.healing.weights import Weights

MODES = ("distill", "layerwise")


def heal(
    compressed: nn.Module,
    dense: nn.Module,
    batches: Batches,
    steps: int,
    *,
    mode: str = "distill",
    lr: float = 3e-5,
    warmup: int | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    train: Train = "structured",
    hidden: Sequence[str] | None = None,
    hidden_weight: float = 1.0,
    output_weight: float = 1.0,
    temperature: float = 1.0,
    head: str | None = None,
    forward: Forward | None = None,
    mask: MaskFn = attention_mask,
    autocast: torch.dtype | None = None,
    dropout: bool = False,
    gradient_checkpointing: bool = False,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool | None = None,
) -> HealReport:
    """Train a compressed model, in place, to compute again what its dense original computes. No labels are needed.

    With ``mode="layerwise"`` each structured layer is fitted to the dense layer of its name: the mean over layers of
    ``|W x + b - (M x' + b')|^2`` over the variance of ``W x + b``, at the inputs x of the dense model. One pass of the
    dense model a batch; each layer's graph is freed at once, and the compressed model is not called. With
    ``mode="distill"`` the loss is :func:`healing_loss` of both models' outputs and hidden states. The first is cheaper
    and a good start of the second, which lets layers make up for each other.

    AdamW without weight decay; ``lr`` rises over ``warmup`` steps and falls to 0 by half a cosine. Of parameters in
    bfloat16 the optimizer steps on float32 copies, so small steps are not lost; other parameters are stepped on in
    their own dtype. The dense model is called in evaluation mode without gradients, and is left as it was; it may be on
    another device or offloaded, and its outputs come to the compressed model's device. Modes, ``requires_grad`` flags
    and gradients of the compressed model are afterwards as before. No seed is set.

    Args:
        compressed: the model with structured layers.
        dense: what it was compressed from.
        batches: a list, a ``DataLoader`` or another iterable, gone through until all steps are done, or a function
            that returns one for each round. An iterator is gone through once, and must last. A batch is a mapping
            (keyword arguments), a tuple or list (positional ones) or a tensor. Labels for transformers models without
            a decoder of their own are not passed on.
        steps: of the optimizer.
        mode: "distill" or "layerwise".
        lr: the highest learning rate. The default is what a language model of 135 million parameters stands, which
            ten times as much ruins; small networks take 1e-3 and more. :func:`learning_rates` tries several.
        warmup: steps of rising rate, by default a tenth of ``steps``.
        clip: the largest norm of all gradients together; None for any.
        accumulate: batches in a step; their losses are averaged.
        train: "structured" for the factors and biases of structured layers, "all", or a function of name and
            parameter. Flags that were set before do not count.
        hidden: names of modules (patterns as in :mod:`fnmatch`) of both models whose outputs are to agree; None takes
            the hidden states that the models return, for which transformers models are asked, and () none.
        hidden_weight: as in :func:`healing_loss`.
        output_weight: as in :func:`healing_loss`.
        temperature: as in :func:`healing_loss`.
        head: as in :func:`healing_loss`.
        forward: a function of model and batch that returns the model's outputs, for models to be called otherwise. It
            is called with the batch on the model's device, and has to ask for hidden states itself.
        mask: a function of the batch that returns which positions count, or None for all; by default the
            ``attention_mask`` of shape (batch, positions) of a mapping.
        autocast: torch.bfloat16 to run both models in an autocast region; losses are computed in float32.
        dropout: train in training mode. By default the compressed model is in evaluation mode too. Batch
            normalisations keep their statistics either way. (cuDNN's recurrent layers need training mode.)
        gradient_checkpointing: compute the activations of a transformers model's layers again in the backward pass.
        validate: a function of the compressed model that returns a number, the smaller the better; called in
            evaluation mode without gradients before the first step, every ``validate_every`` steps and after the last.
            The model ends with the weights of the smallest.
        validate_every: steps from one validation to the next.
        checkpoint: a file, written every ``checkpoint_every`` steps and after the last, under a temporary name first.
            If it is there already, the run goes on from it: with the same models, arguments and batches it ends, on
            deterministic kernels and generators (Python's, NumPy's, PyTorch's, the DataLoader's), at the same bits as
            one that was not interrupted. It holds the trained parameters, the optimizer's state and the best weights.
        checkpoint_every: steps from one checkpoint to the next.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        Losses, validations, seconds.

    Raises:
        TypeError: if an argument has the wrong type, or the models return nothing to compare.
        ValueError: if an argument is out of range, the models do not fit each other, or the checkpoint is of another
            run: nothing is changed then. If an iterator ends too early, which leaves what the finished steps made. If
            a loss or gradient is NaN or infinite: the weights are then the best validated ones, without ``validate``
            those of at most 50 steps earlier. After any other exception they are those of the last finished step.

    Example:
        >>> import copy, torch, structmat
        >>> from structmat import surgery
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> small = copy.deepcopy(dense)
        >>> report = surgery.compress_(small, structmat.MonarchConfig(nblocks=4))
        >>> report = surgery.heal(small, dense, [torch.randn(64, 32) for _ in range(8)], 100, lr=1e-2)
        >>> report.steps, report.final < 0.5 * report.first
        (100, True)
    """
    check_models(compressed, dense)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    settings = Settings(
        steps=check_int("steps", steps),
        lr=lr,
        warmup=steps // 10 if warmup is None else check_int("warmup", warmup, 0),
        clip=clip,
        accumulate=check_int("accumulate", accumulate),
        validate_every=check_int("validate_every", validate_every),
        checkpoint_every=check_int("checkpoint_every", checkpoint_every),
    )
    check_weights(hidden_weight, output_weight, temperature, head)
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast}: float16 would need loss scaling")
    if mode == "layerwise" and (dropout or gradient_checkpointing or hidden is not None):
        raise ValueError(
            'dropout, gradient_checkpointing and hidden are for mode="distill": layerwise healing does not call the '
            "compressed model"
        )
    chosen = trained_parameters(compressed, dense, train)
    options = {
        "hidden_weight": hidden_weight,
        "output_weight": output_weight,
        "temperature": temperature,
        "head": head,
    }
    arguments = {
        "mode": mode,
        **settings.decisive(),
        **(options if mode == "distill" else {}),
        "hidden": None if hidden is None else tuple(hidden),
        "autocast": autocast,
        "dropout": dropout,
        "gradient_checkpointing": gradient_checkpointing,
        "validate": validate is not None,
        "the number of batches": None if isinstance(batches, Iterator) else operator.length_hint(batches, -1),
    }
    expected = saved.fingerprint(compressed, dense, chosen, arguments) if checkpoint is not None else {}
    with contextlib.ExitStack() as stack:
        if mode == "layerwise":
            method: Any = Layerwise(compressed, dense, forward, mask, autocast, chosen)
        else:
            method = Distill(compressed, dense, forward, mask, autocast, hidden, options)
        stack.callback(method.close)
        feed = Feed(batches, method.device)
        state = None if checkpoint is None else saved.read(checkpoint, expected)
        if gradient_checkpointing:
            stack.enter_context(recomputed(compressed))
        stack.enter_context(kept(compressed))
        stack.enter_context(kept(dense))
        stack.enter_context(torch.enable_grad())
        dense.eval()
        set_mode(compressed, dropout)
        set_trainable(compressed, chosen)
        weights = Weights(chosen)
        stack.callback(weights.close)

        def judge() -> float:
            assert validate is not None
            compressed.eval()
            with torch.no_grad():
                value = validate(compressed)
            set_mode(compressed, dropout)
            return float(value)

        def save(content: dict[str, Any]) -> None:
            assert checkpoint is not None
            saved.write(checkpoint, expected, content)

        run = Run(mode, settings, weights, method, feed, validate and judge, None if checkpoint is None else save)
        if state is not None:
            run.restore(state)
        return run.go(progress)
