"""Hidden units of a model that can change places: which layers make them, and which read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.surgery.selection import dense_shape, is_linear_like, module_names, owners_of, refusal, ties

# Below one module: layers that make hidden units, and the layer that reads them.
_MLPS = (
    (("intermediate.dense",), "output.dense"),  # BERT
    (("gate_proj", "up_proj"), "down_proj"),  # Llama
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # ViT, OPT
    (("linear1",), "linear2"),  # nn.TransformerEncoderLayer
    (("lin1",), "lin2"),  # DistilBERT
)
# Values, the output projection, and queries and keys.
_ATTENTION = (
    ("self.value", "output.dense", ("self.query", "self.key")),
    ("attention.value", "output.dense", ("attention.query", "attention.key")),
    ("v_proj", "o_proj", ("q_proj", "k_proj")),
    ("v_proj", "out_proj", ("q_proj", "k_proj")),
    ("v_lin", "out_lin", ("q_lin", "k_lin")),
)


@dataclass(frozen=True)
class HiddenUnits:
    """Layers between which the hidden units may change places.

    Between the layers only what treats all units alike may lie: activations, dropout, products of two layers' outputs
    unit by unit; no normalisation with parameters and no residual connection.

    Attributes:
        first: names of the layers that make the units, as outputs; of a gated MLP both.
        second: name of the layer that reads them, as inputs.
        heads: of attention: units stay with the others of their head, so many heads of consecutive units.
        queries: of attention, names of the query and key projections, whose heads move with those of the values;
            without them heads stay where they are.
    """

    first: tuple[str, ...]
    second: str
    heads: int | None = None
    queries: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All layers, the reading one last."""
        return (*self.first, *self.queries, self.second)


def find_units(model: nn.Module) -> tuple[list[HiddenUnits], list[str]]:
    """The hidden units of the blocks that are known, and why others of them are left alone."""
    found, left = [], []
    for parent, aliases in module_names(model).items():
        prefix = f"{aliases[0]}." if aliases[0] else ""
        for first, second in _MLPS:
            layers = [_below(parent, name) for name in (*first, second)]
            if all(layer is not None for layer in layers):
                units = HiddenUnits(tuple(prefix + n for n in first), prefix + second)
                _sort(units, _mlp_reason(parent, layers), found, left)
        for value, output, queries in _ATTENTION:
            layers = [_below(parent, name) for name in (value, *queries, output)]
            if all(layer is not None for layer in layers):
                holder = parent.get_submodule(value.rpartition(".")[0])
                heads, reason = _heads(holder, parent, layers)
                names = tuple(prefix + n for n in queries)
                _sort(HiddenUnits((prefix + value,), prefix + output, heads, names), reason, found, left)
    problems = {units: _problem(model, units) for units in found}
    left += [f"{units.second}: {problem}" for units, problem in problems.items() if problem]
    return [units for units, problem in problems.items() if problem is None], left


def check_units(model: nn.Module, pairs: Iterable[Any]) -> list[HiddenUnits]:
    """Hidden units from pairs of names, or as they are; raise unless the layers can be permuted.

    Raises:
        TypeError: if a pair is neither two names (the first may be several) nor :class:`HiddenUnits`.
        ValueError: if a layer does not exist, cannot be changed, has other sizes than those beside it, or has the same
            side in two of the pairs.
    """
    found = []
    for pair in pairs:
        if not isinstance(pair, HiddenUnits):
            two = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not two or not isinstance(pair[0], (str, tuple, list)) or not isinstance(pair[1], str):
                raise TypeError(f"pairs must hold (first, second) names of layers, or HiddenUnits, got {pair!r}")
            first = (pair[0],) if isinstance(pair[0], str) else tuple(pair[0])
            pair = HiddenUnits(first, pair[1])
        if problem := _problem(model, pair):
            raise ValueError(f"{pair.first} and {pair.second!r} cannot be permuted: {problem}")
        found.append(pair)
    sides = [(name, name == units.second) for units in found for name in units.names]
    for name, columns in sides:
        if sides.count((name, columns)) > 1:
            raise ValueError(f"{name} stands on the same side of two pairs of layers: give each pair once")
    return found


def _sort(units: HiddenUnits, reason: str | None, found: list[HiddenUnits], left: list[str]) -> None:
    if reason is None:
        found.append(units)
    else:
        left.append(f"{units.second}: {reason}")


def _below(parent: nn.Module, name: str) -> nn.Module | None:
    try:
        layer = parent.get_submodule(name)
    except AttributeError:
        return None
    return layer if is_linear_like(layer) else None


def _mlp_reason(parent: nn.Module, layers: list[Any]) -> str | None:
    units = dense_shape(layers[-1])[1]
    return _others(parent, layers, {units}, "hidden units")


def _heads(holder: nn.Module, parent: nn.Module, layers: list[Any]) -> tuple[int | None, str | None]:
    sizes = [getattr(m, name, None) for m in (holder, parent) for name in ("head_dim", "attention_head_size")]
    size = next((s for s in sizes if isinstance(s, int) and s > 0), None)
    units = {dense_shape(layer)[0] for layer in layers[:-1]}
    if size is None or len(units) > 1 or next(iter(units)) % size:
        return None, "queries, keys and values have not the same number of heads (grouped attention), or none is known"
    heads = next(iter(units)) // size
    return heads, _others(holder, layers, {heads * size, heads}, "heads or their units")


def _others(parent: nn.Module, layers: list[Any], sizes: set[int], what: str) -> str | None:
    """Why units are left alone beside which other parameters or buffers lie that may tell them apart."""
    own = {id(t) for layer in layers for t in layer.parameters()}
    tensors = [*parent.named_parameters(), *parent.named_buffers()]
    other = next((n for n, t in tensors if id(t) not in own and sizes & set(t.shape)), None)
    return None if other is None else f"{other} may tell the {what} apart"


def _problem(model: nn.Module, units: HiddenUnits) -> str | None:
    owners, names, modules = owners_of(model), module_names(model), dict(model.named_modules(remove_duplicate=False))
    if not units.first:
        return "there is no layer that makes the units"
    for name in units.names:
        layer: Any = modules.get(name)
        if layer is None:
            return f"the model has no module {name!r}"
        if not is_linear_like(layer):
            return f"{name} is a {type(layer).__name__}, not a dense linear layer"
        reason = refusal(layer)
        if reason is None and (others := ties(layer, names[layer], owners)):
            reason = f"its weight is tied to {', '.join(others)}"
        bias = layer._parameters.get("bias")
        places = sum(p is bias for module in names for p in module._parameters.values())
        if bias is not None and name != units.second and places > 1:
            reason = reason or "its bias is shared"
        if reason is None and layer._parameters["weight"].device.type == "meta":
            reason = "its weight is on the meta device"
        if reason is not None:
            return f"of {name}: {reason}"
    size = dense_shape(modules[units.second])[1]
    made = {name: dense_shape(modules[name])[0] for name in (*units.first, *units.queries)}
    if set(made.values()) != {size}:
        return f"{units.second} reads {size} units, made are " + ", ".join(f"{n} by {name}" for name, n in made.items())
    if units.heads is not None and (units.heads < 1 or size % units.heads):
        return f"heads must divide the {size} units, got {units.heads}"
    if units.queries and units.heads is None:
        return "queries need heads"
    return None
