"""Run a model on data and collect the moments of what its linear layers are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from structmat.nn import StructuredLinear
from structmat.surgery.batches import call, device_of, to_device
from structmat.surgery.calibration import Calibration
from structmat.surgery.collect import Collector, Layer
from structmat.surgery.selection import (
    FilterFn,
    check_model,
    dense_shape,
    is_linear_like,
    module_names,
    owners_of,
    refusal,
    ties,
)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    filter_fn: FilterFn | None = None,
    gradients: bool = False,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Calibration:
    """Run a model on data, and collect the second moments E[x x^H] and the means of what its linear layers are given.

    Watched are the layers that :func:`compress_` would replace (exact ``nn.Linear`` and transformers' ``Conv1D``,
    untied), structured linear layers, and convolutions (``nn.Conv1d``, ``nn.Conv2d``) that are linear layers at every
    position: kernel 1, one group, no padding, whatever stride. (These :func:`compress_` leaves alone: their moments are
    for :func:`structmat.project`.) A layer that is called several times gathers all its
    inputs. The model runs in evaluation mode, uncompiled, and is left as it was, after an exception too.

    Of a mapping with an ``attention_mask`` of shape (B, T), positions where it is zero are left out of inputs of shape
    (B, T, ...) and of their gradients; other inputs count whole.

    With ``gradients``, E[g g^H] of the gradients of the loss by the layers' outputs are collected too (a factor of the
    empirical Fisher information, Martens & Grosse 2015). What is differentiated is the sum of a batch's losses: so the
    result does not depend on how the data are cut into batches. Only the ratios of its entries matter to a projection.
    Parameters need not require gradients, and their ``grad`` is not touched. A layer that no gradient reaches has none:
    see :attr:`Calibration.without_gradients`.

    Cost: n^2 operations a token beside the layer's own 2 m n (half of the symmetric product is left out; layers that
    are given the same tensor, such as query, key and value projections, share it), and m^2 with gradients, in float64.
    Memory: 8 n^2 bytes for each different input, 8 m^2 for each layer's gradients (a language model's head has an m of
    its whole vocabulary: leave it out by ``filter_fn``), and during a batch three inputs' sums and 64 MiB of rows.

    Args:
        model: any module that contains such layers.
        batches: mappings (``model(**batch)``), tuples or lists (``model(*batch)``), or tensors (``model(batch)``);
            their tensors are moved to the device of the model's first parameter.
        filter_fn: called with name and module; layers for which it returns false are not watched.
        gradients: whether to collect the moments of the output gradients.
        loss_fn: called with what the model returned and the batch, returns the losses of what the batch holds, summed
            or not (a mean would make the weight of an item depend on the size of its batch). By default the ``loss``
            of a transformers model, times the number of labels of which it is the mean.
        forward: called with the model and the batch in place of ``model(...)``, for batches of any type; tensors,
            tuples, lists and mappings (as dicts) have been moved, and what else has a method ``to``.
        progress: whether to show a progress bar; None shows it on a terminal.
        dtype: in which rows are multiplied: float64 by default, and float32 where the device has no other. Float32 is
            far faster on GPUs without float64 tensor cores; TF32 is used if torch is told so. Sums over batches are
            in float64 in any case, or in float32 with the rounding errors kept beside.

    Returns:
        The moments by layer name. Layers that saw no input are in :attr:`Calibration.unseen`.

    Raises:
        TypeError: if an argument or a batch has the wrong type.
        ValueError: if there are no batches or no layers, a layer's inputs or gradients have NaN or infinite entries
            (layer and batch are named), the model is on the meta device or wrapped for distributed training, or no
            loss is found.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> calibration = surgery.calibrate(model, [torch.randn(100, 32) for _ in range(4)])
        >>> calibration
        Calibration(2 layers, 400 inputs each)
        >>> report = surgery.compress_(model, structmat.LowRankConfig(rank=8), calibration=calibration)
    """
    _check_arguments(model, batches, loss_fn, gradients, dtype)
    layers, aliases = _find(model, filter_fn)
    collector = Collector(layers, gradients, dtype)
    device = device_of(model)
    hidden = None if progress is None else not progress  # None: shown on a terminal only
    index = -1
    with undisturbed(model, gradients), collector:
        for index, batch in enumerate(tqdm(batches, "calibrating", disable=hidden)):
            batch = to_device(batch, device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            known = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
            collector.mask = mask != 0 if known else None
            outputs = call(model, batch) if forward is None else forward(model, batch)
            collector.end_forward(index)
            if gradients:
                collector.backward(_loss(model, outputs, batch, loss_fn, index), index)
            del outputs
    if index < 0:
        raise ValueError("batches is empty: there is nothing to calibrate on")
    return Calibration(collector.moments(), {layer.name: layer.shape for layer in layers}, aliases, gradients)


def _check_arguments(model: Any, batches: Any, loss_fn: Any, gradients: bool, dtype: Any) -> None:
    check_model(model)
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got a {type(batches).__name__}; put one in a list")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float64, torch.float32 or None, got {dtype}")
    if loss_fn is not None and not gradients:
        raise ValueError("loss_fn is given, but gradients is False: nothing would be differentiated")


# ---------------------------------------------------------------- the layers
def _find(model: nn.Module, filter_fn: FilterFn | None) -> tuple[list[Layer], dict[str, str]]:
    """The layers to watch, and the first name for every other name of theirs."""
    layers: list[Layer] = []
    aliases: dict[str, str] = {}
    owners = owners_of(model)
    for module, (name, *others) in module_names(model).items():
        layer = _layer(name, module)
        if layer is None or (not isinstance(module, StructuredLinear) and ties(module, [name, *others], owners)):
            continue
        if filter_fn is None or filter_fn(name, module):
            layers.append(layer)
            aliases |= dict.fromkeys(others, name)
    if not layers:
        wanted = "torch.nn.Linear, transformers' Conv1D, structured linear layer or convolution of kernel 1"
        filtered = "" if filter_fn is None else " and that filter_fn accepts"
        raise ValueError(f"there is nothing to calibrate: the model has no {wanted} that could be replaced{filtered}")
    meta = [layer.name for layer in layers if any(p.is_meta for p in layer.module.parameters())]
    if meta:
        raise ValueError(f"the model is on the meta device ({meta[0]}): it cannot run; load its weights first")
    return layers, aliases


def _layer(name: str, module: nn.Module) -> Layer | None:
    if isinstance(module, StructuredLinear):
        shape = (module.out_features, module.in_features)
        return Layer(name, module, shape) if module.matrix_batch is None else None
    if is_linear_like(module):
        return Layer(name, module, dense_shape(module)) if refusal(module) is None else None
    if type(module) not in (nn.Conv1d, nn.Conv2d) or "forward" in vars(module) or not _pointwise(module):
        return None
    conv: Any = module
    return Layer(name, module, (conv.out_channels, conv.in_channels), conv.stride)


def _pointwise(conv: Any) -> bool:
    plain = set(conv._parameters) == {"weight", "bias"} and not conv._buffers and conv._parameters["weight"] is not None
    padded = conv.padding not in ("same", "valid") and any(conv.padding)  # of a kernel of 1 these two pad nothing
    return plain and set(conv.kernel_size) == {1} and conv.groups == 1 and not padded


# ---------------------------------------------------------------- the passes
@contextlib.contextmanager
def undisturbed(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Evaluation mode, frozen parameters and no compiled or fused paths around the layers' hooks; restored at the end.

    Frozen, because the activations that the weights' gradients would need are then not kept.
    """
    training = {module: module.training for module in model.modules()}
    free = [p for p in model.parameters() if p.requires_grad and p.is_leaf] if gradients else []
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            torch.inference_mode(False),  # what is made in there could not be used for anything else later
            torch.set_grad_enabled(gradients),
            torch.compiler.set_stance("force_eager"),
        ):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter in free:
                parameter.requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in free:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode  # not train(mode), which some models override


def _loss(model: nn.Module, outputs: Any, batch: Any, loss_fn: Callable[[Any, Any], Any] | None, index: int) -> Tensor:
    """The sum of a batch's losses."""
    if loss_fn is not None:
        loss = loss_fn(outputs, batch)
    else:
        loss = getattr(outputs, "loss", None)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(loss, Tensor) or not isinstance(labels, Tensor):
            raise ValueError(
                "gradients need a loss: give loss_fn, or to a transformers model batches that are mappings with labels"
            )
        name = type(model).__name__
        if labels.ndim > 1 and ("CausalLM" in name or "LMHead" in name):
            labels = labels[..., 1:]  # the first token is not predicted
        loss = loss * (labels.numel() if labels.is_floating_point() else (labels != -100).sum())
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got a {type(loss).__name__}")
    if not loss.isfinite().all():
        raise ValueError(f"the loss of batch {index} (counted from 0) is NaN or infinite")
    return loss.sum()
