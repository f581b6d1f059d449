"""Permute the hidden units of a model, which changes nothing that it computes, so that its weights have structure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from structmat.calibrated import _OF_CLASS
from structmat.config import Config
from structmat.lazy import Sum
from structmat.permutation_search import Member, head_order, permuted_moments, search_order
from structmat.projecting import project
from structmat.projection.moments import Moments
from structmat.projection.truncated import work_dtype
from structmat.surgery.calibration import Calibration
from structmat.surgery.healing.models import kept
from structmat.surgery.hidden_units import HiddenUnits, check_units, find_units
from structmat.surgery.selection import Configs, check_model, dense_weight, patterns_of
from structmat.surgery.spec import is_conv1d

# How far outputs may move, relative to their norm, by the bytes of their numbers: sums are taken in another order.
_TOLERANCE = {8: 1e-9, 4: 1e-4, 2: 5e-2}


@dataclass(frozen=True)
class UnitsRow:
    """What the search found for one set of hidden units.

    Attributes:
        units: the layers.
        errors: relative errors of the layers' projections before and after: with a calibration calibrated ones.
        order: the units by their new places, None if no better order than the old one was found.
    """

    units: HiddenUnits
    errors: Mapping[str, tuple[float, float]]
    order: Tensor | None = field(repr=False, default=None)


@dataclass(frozen=True)
class PermuteReport:
    """What :func:`permute_hidden_` did.

    Attributes:
        rows: one for each set of hidden units.
        calibration: what was given, with the inputs and outputs of the layers in their new order: for what follows, in
            place of the old one, which is of the model as it was.
        left_alone: why other known blocks were not permuted, a line for each.
    """

    rows: tuple[UnitsRow, ...]
    calibration: Any = field(repr=False, default=None)
    left_alone: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            kept = "" if row.order is not None else "  as it was"
            lines += [f"{name:<48} {old:.4f} -> {new:.4f}{kept}" for name, (old, new) in row.errors.items()]
        return "\n".join(lines + [f"left alone: {line}" for line in self.left_alone])


@torch.no_grad()
def permute_hidden_(
    model: nn.Module,
    config: Configs,
    pairs: Iterable[Any] | None = None,
    calibration: Mapping[str, Moments] | None = None,
    damping: float = 0.1,
    batch: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> PermuteReport:
    """Permute hidden units, in place, so that the structure of ``config`` fits the weights better.

    The rows and the bias of a layer and the columns of the next one are put into one order: the model computes what it
    did, to rounding. In an attention the values' units change places within their heads, and whole heads do with their
    queries and keys (attention weights that a model returns are then in another order). So a structure that depends on
    the order, such as Monarch, block-diagonal, block-sparse and Pixelfly matrices and sums with them, comes nearer at
    no cost; to low rank all orders are the same. Use it before :func:`compress_`, with ``report.calibration`` if there
    is one. How much is gained depends on the model: a structure that its order hides is found; where there is none, a
    few per cent of the error.

    The search makes the sum of the squared relative errors of the layers small, by spectral clustering and by k-spaces
    clustering from there and from the old order; see :mod:`structmat.permutation_search`. An order is taken only if the
    projections' errors, as the report gives them, have a smaller sum of squares with it.

    Args:
        model: any module; its layers are dense.
        config: as for :func:`compress_`: what the layers are to become. Layers without one are permuted, and do not
            count.
        pairs: names of layers (first, second), or (names, second) for the two of a gated MLP, or
            :class:`HiddenUnits`. None finds the MLPs and attentions of BERT, GPT-2 (MLP), Llama, OPT, ViT, DistilBERT,
            and the MLPs of ``nn.TransformerEncoderLayer`` and its like, by the names of their layers.
        calibration: from :func:`calibrate`, for the errors that count, or None for plain ones.
        damping: of the moments, as for :func:`compress_`.
        batch: a mapping, tuple or tensor for the model, which is run on it before and after, in evaluation mode: the
            proof that nothing but the order has changed. Give one for pairs that you name.
        seed: of the search.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The errors before and after by layer, the calibration in the new order, and what was left alone.

    Raises:
        TypeError: if an argument has the wrong type, or ``config`` is of a structure that is no sum of blocks.
        ValueError: if there is nothing to permute, a pair does not fit, the calibration lacks a layer, or the outputs
            for ``batch`` changed: the pairs that did it are named. After any exception the model is as it was.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> g, config = torch.Generator().manual_seed(0), structmat.MonarchConfig(nblocks=4, rank=2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        >>> order = torch.randperm(64, generator=g)  # which hides the structure
        >>> _ = model[0].weight.data.copy_(config.random((64, 32), generator=g).to_dense()[order])
        >>> _ = model[2].weight.data.copy_(config.random((32, 64), generator=g).to_dense()[:, order])
        >>> report = surgery.permute_hidden_(model, config, [("0", "2")], batch=torch.randn(5, 32, generator=g))
        >>> [(round(before, 1), round(after, 3)) for before, after in report.rows[0].errors.values()]
        [(0.5, 0.0), (0.5, 0.0)]
    """
    check_model(model)
    patterns = patterns_of(config)
    units, left = find_units(model) if pairs is None else ([], [])
    units = check_units(model, units if pairs is None else pairs)
    modules = dict(model.named_modules(remove_duplicate=False))
    configs = {name: c for u in units for name in u.names if (c := _config_of(name, patterns)) is not None}
    units = [u for u in units if any(name in configs for name in u.names)]
    if not units:
        raise ValueError(
            "there are no hidden units to permute: no block of a known kind has a layer with a config; name pairs"
            + "".join(f"\n  left alone: {line}" for line in left)
        )
    for name, chosen in configs.items():
        _check_config(name, chosen, modules[name])
    if calibration is not None and not isinstance(calibration, Mapping):
        raise TypeError(f"calibration must be what calibrate returned, got {type(calibration).__name__}")
    moments = {name: _moments(calibration, name, modules[name]) for name in configs} if calibration is not None else {}
    before = None if batch is None else _outputs(model, batch)
    rows: list[UnitsRow] = []
    try:
        for u in tqdm(units, "permuting", disable=None if progress is None else not progress):
            order, errors = _search(u, modules, configs, moments, damping, seed)
            rows.append(UnitsRow(u, errors, order))
            if order is not None:
                _apply(u, modules, order)
                _follow(u, moments, order)
        wrong = None if before is None else _difference(before, _outputs(model, batch))
    except BaseException:
        _undo(rows, modules)
        raise
    if wrong:
        assert before is not None
        _undo(rows, modules)
        named = list(_culprits(model, rows, modules, before, batch))
        raise ValueError(
            f"the model's outputs for batch changed ({wrong}): between the layers of {'; '.join(named) or 'the pairs'} "
            "lies something that does not treat all units alike. The model is as it was"
        )
    return PermuteReport(tuple(rows), _reordered(calibration, rows), tuple(left))


def _search(
    units: HiddenUnits,
    modules: Mapping[str, nn.Module],
    configs: Mapping[str, Config],
    moments: Mapping[str, Moments],
    damping: float,
    seed: int,
) -> tuple[Tensor | None, dict[str, tuple[float, float]]]:
    names = [name for name in units.names if name in configs]
    members = []
    for name in names:
        weight, metric = dense_weight(modules[name]), moments.get(name)
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of {name} has NaN or infinite entries")
        if metric is not None and modules[name]._parameters.get("bias") is not None:
            metric = metric.centred()
        columns, whole = name == units.second, name in units.queries
        members.append(Member(weight.to(work_dtype(weight)), metric, configs[name], columns, whole))
    found = search_order(members, units.heads, bool(units.queries), damping, seed)
    before = [_error(member, damping) for member in members]
    if torch.equal(found, torch.arange(len(found))):
        return None, {name: (e, e) for name, e in zip(names, before, strict=True)}
    after = [_error(member.permuted(_own(found, units, n)), damping) for member, n in zip(members, names, strict=True)]
    if sum(e * e for e in after) >= sum(e * e for e in before):
        return None, {name: (e, e) for name, e in zip(names, before, strict=True)}
    return found, {name: pair for name, *pair in zip(names, before, after, strict=True)}  # pyright: ignore[reportReturnType]


def _error(member: Member, damping: float) -> float:
    found = project(member.weight, member.config, member.moments, damping)
    return found.error if found.calibrated_error is None else found.calibrated_error


# ---------------------------------------------------------------- what is permuted
def _own(order: Tensor, units: HiddenUnits, name: str) -> Tensor:
    """The order of one of the layers: that of the heads for queries and keys."""
    return head_order(order, units.heads) if name in units.queries and units.heads else order


def _apply(units: HiddenUnits, modules: Mapping[str, nn.Module], order: Tensor) -> None:
    new: list[tuple[Tensor, Tensor]] = []
    for name in units.names:
        layer, columns = modules[name], name == units.second
        weight: Any = layer._parameters["weight"]
        bias = layer._parameters.get("bias")
        own = _own(order, units, name).to(weight.device)
        new.append((weight, weight.index_select(int(columns != is_conv1d(layer)), own)))
        if bias is not None and not columns:
            new.append((bias, bias[own]))
    # In place, because optimizers hold these parameters; and only once there was memory for all.
    for parameter, value in new:
        parameter.copy_(value)


def _undo(rows: list[UnitsRow], modules: Mapping[str, nn.Module]) -> None:
    for row in reversed(rows):
        if row.order is not None:
            _apply(row.units, modules, row.order.argsort())


def _follow(units: HiddenUnits, moments: dict[str, Moments], order: Tensor) -> None:
    for name in units.names:
        if name in moments:
            moments[name] = permuted_moments(moments[name], _own(order, units, name), name == units.second)


def _reordered(calibration: Any, rows: list[UnitsRow]) -> Any:
    if calibration is None:
        return None
    names = calibration.aliases if isinstance(calibration, Calibration) else {}
    moments = dict(calibration)
    for row in rows:
        if row.order is not None:
            for name in row.units.names:
                first = names.get(name, name)
                if first in moments:
                    own = _own(row.order, row.units, name)
                    moments[first] = permuted_moments(moments[first], own, name == row.units.second)
    return replace(calibration, moments=moments) if isinstance(calibration, Calibration) else moments


def _config_of(name: str, patterns: Mapping[str, Config]) -> Config | None:
    return next((c for pattern, c in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _check_config(name: str, config: Config, layer: nn.Module) -> None:
    stack: list[Any] = [config.random(dense_weight(layer).shape, device="meta")]
    while stack:
        value = stack.pop()
        if isinstance(value, Sum):
            stack += value.terms
        elif type(value) not in _OF_CLASS:
            known = ", ".join(cls.__name__ for cls in _OF_CLASS)
            raise TypeError(
                f"config of {name} makes a {type(value).__name__}; orders are searched for {known} and sums"
            )


def _moments(calibration: Mapping[str, Moments], name: str, layer: nn.Module) -> Moments:
    if name not in calibration and not (isinstance(calibration, Calibration) and name in calibration.aliases):
        raise ValueError(f"the calibration has no moments of {name}: it is of another model, or the layer saw no input")
    moments, (m, n) = calibration[name], dense_weight(layer).shape
    if len(moments.mean) != n or (moments.outputs is not None and len(moments.outputs) != m):
        raise ValueError(f"the calibration is of another model: {name} has {n} inputs, not {len(moments.mean)}")
    return moments


# ---------------------------------------------------------------- the proof
def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with kept(model):
        model.eval()
        if isinstance(batch, Mapping):
            result = model(**batch)
        else:
            result = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    found = [t.clone() for t in _tensors(result) if t.is_floating_point() or t.is_complex()]
    if not found:
        raise ValueError(f"the model returned no floating-point tensor for batch, but a {type(result).__name__}")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _difference(before: list[Tensor], after: list[Tensor]) -> str | None:
    for a, b in zip(before, after, strict=True):
        a, b = a.to(work_dtype(a)), b.to(work_dtype(b))
        moved = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a).clamp_min(1e-300)).item()
        allowed = _TOLERANCE[min(before[0].dtype.itemsize, 8)]
        if not moved <= allowed:
            return f"by {moved:.1e} of their norm, allowed is {allowed:.0e}"
    return None


def _culprits(
    model: nn.Module, rows: list[UnitsRow], modules: Mapping[str, nn.Module], before: list[Tensor], batch: Any
) -> Iterator[str]:
    """The pairs that change the outputs each on its own."""
    for row in rows:
        if row.order is None:
            continue
        _apply(row.units, modules, row.order)
        changed = _difference(before, _outputs(model, batch))
        _apply(row.units, modules, row.order.argsort())
        if changed:
            yield f"{', '.join(row.units.first)} and {row.units.second}"
