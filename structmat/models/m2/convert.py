"""From the weights of the m2 repository to ours, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structmat.config import BlockDiagonalConfig
from structmat.models.m2._base import M2PreTrainedModel
from structmat.models.m2._config import check_options
from structmat.models.m2.configuration import M2BertConfig

_PREFIX = "model."
_LAYER = "bert.encoder.layer."
#: In every file, and made anew by every model.
_IGNORED = "bert.embeddings.position_ids"


class _Entry(NamedTuple):
    """One tensor: its name there, its name here, its shape in both."""

    theirs: str
    ours: str
    shape: tuple[int, ...]


def convert_m2_state_dict(
    state: Mapping[str, Any], max_position_embeddings: int | None = None, w_mod: float = 1.0, **options: Any
) -> tuple[M2BertConfig, dict[str, Tensor]]:
    """The configuration and the weights of a released M2-BERT.

    Sizes, directions, the residual convolution and the layer norm of the mixer are read from names and shapes. Learned
    positions of the filters (``pos_emb.z``), their times and decays are taken as they are.

    A longer ``max_position_embeddings`` does what the released loader is for: position embeddings and ``pos_emb.z`` are
    repeated, and the times of the filters run from 0 to 1 over the new length. (That loader leaves the first repetition
    of ``pos_emb.z`` at 0; here it is like the others.) The taps are others than the short model's: train on.

    Args:
        state: the state dict of the released ``BertForMaskedLM`` or ``BertForSequenceClassification``, with or without
            the prefix ``model.``, or the checkpoint that has it under ``["state"]["model"]``.
        max_position_embeddings: longest sequence; that of the checkpoint if None.
        w_mod: the factor ``hyena_w_mod`` of the sines that the model was trained with, where it was not 1: no weight
            tells. It is multiplied into the frequencies.
        **options: for :class:`M2BertConfig`: what the weights do not tell, such as ``pooling="mean"`` (its
            ``pool_all``), ``legacy_padding=True`` for exactly the released outputs, or ``intermediate_size`` where the
            number of blocks does not divide it, as blocks are padded then.

    Returns:
        The configuration, and the state dict of :class:`M2BertForMaskedLM` or, of a checkpoint with a classifier, of
        :class:`M2BertForSequenceClassification`. Tensors that need no change are shared, not copied.

    Raises:
        TypeError: if :class:`M2BertConfig` has no such option.
        ValueError: if names are missing or unknown, shapes do not fit, weights that must be tied differ, or the new
            length is shorter than the old one; the message lists them. Also if blocks may be padded, as hidden_size is
            no multiple of their number, and intermediate_size is not given.

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2BertConfig, M2BertForMaskedLM, convert_m2_state_dict, export_m2_state_dict
        >>> size = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        >>> released = export_m2_state_dict(M2BertForMaskedLM(M2BertConfig(**size)))
        >>> config, weights = convert_m2_state_dict(released, max_position_embeddings=512)
        >>> model = M2BertForMaskedLM(config)
        >>> model.load_state_dict(weights)
        <All keys matched successfully>
        >>> config.num_hidden_layers, model(torch.ones(1, 512, dtype=torch.long)).logits.shape
        (2, torch.Size([1, 512, 100]))
    """
    if isinstance(state.get("state"), Mapping):
        state = state["state"]["model"]
    plain: dict[str, Tensor] = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    plain.pop(_IGNORED, None)
    found = _config(plain, options)
    entries = list(_entries(found, _heads(plain)))
    _check_names(plain, entries, found)
    new: dict[str, Tensor] = {}
    for entry in entries:
        value = plain[entry.theirs]
        if entry.ours in new and not torch.equal(new[entry.ours], value):
            raise ValueError(f"{entry.theirs} must be equal to the weight that it is tied to: both are {entry.ours}")
        new.setdefault(entry.ours, value)
    if w_mod != 1:
        new = {name: value * w_mod if name.endswith(".filter.frequency") else value for name, value in new.items()}
    if max_position_embeddings is not None:
        new = _lengthen(new, found.max_position_embeddings, max_position_embeddings)
        found.max_position_embeddings = max_position_embeddings
    if "head.dense.weight" in new and not torch.equal(
        new["head.decoder.weight"], new["model.embeddings.tokens.weight"]
    ):
        found.tie_word_embeddings = False
    return found, new


def export_m2_state_dict(model: M2PreTrainedModel) -> dict[str, Tensor]:
    """The weights of an M2-BERT by the names of the m2 repository; the inverse of :func:`convert_m2_state_dict`.

    Args:
        model: an M2-BERT with a head: for masked tokens, or a classifier.

    Raises:
        TypeError: if model is no M2-BERT with a head.
        ValueError: if the m2 repository has no such model: projections are structured, the MLP is neither dense nor
            block-diagonal, or filters have another depth or the short ones another size than 3.
    """
    config, ours = model.config, model.state_dict()
    if not isinstance(config, M2BertConfig) or not hasattr(model, "model"):
        raise TypeError(f"model must be an M2-BERT with a head, got {type(model).__name__}")
    mlp = config.mlp_structure
    if config.projection_structure is not None or (mlp is not None and mlp["structure"] != "blockdiagonal"):
        raise ValueError("the m2 repository has dense projections, and dense or block-diagonal MLPs only")
    for name in ("filter_depth", "short_filter_size"):
        if getattr(config, name) != 3:
            raise ValueError(f"{name} must be 3, as in the m2 repository, got {getattr(config, name)}")
    heads = tuple(name for name in _HEADS if any(key.startswith(_HEADS[name]) for key in ours))
    new = {entry.theirs: ours[entry.ours] for entry in _entries(config, heads)}
    new[_IGNORED] = torch.arange(config.max_position_embeddings)[None]
    return {_PREFIX + name: value for name, value in new.items()}


#: What stands after the encoder, by the beginning of its names there, with those here.
_HEADS = {"cls.predictions.": "head.", "bert.pooler.": "model.pooler.", "classifier.": "classifier."}


def _heads(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(head for head in _HEADS if any(name.startswith(head) for name in state))


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from."""
    if name not in state:
        raise ValueError(f"{name!r} is missing: this is no state dict of an M2-BERT of the m2 repository")
    if state[name].ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(state[name].shape)}")
    return tuple(state[name].shape)


def _config(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> M2BertConfig:
    first = f"{_LAYER}0."
    taps = f"{first}attention.filter_fn."
    vocab, dim = _shape(state, "bert.embeddings.word_embeddings.weight", 2)
    kinds, _ = _shape(state, "bert.embeddings.token_type_embeddings.weight", 2)
    length, _ = _shape(state, "bert.embeddings.position_embeddings.weight", 2)
    _, _, features = _shape(state, f"{taps}pos_emb.z", 3)
    width, _ = _shape(state, f"{taps}implicit_filter.0.weight", 2)
    layers = {name.removeprefix(_LAYER).split(".")[0] for name in state if name.startswith(_LAYER)}
    gate = state.get(f"{first}mlp.gated_layers.weight")
    dense = gate is not None and gate.ndim == 2
    sizes = _shape(state, f"{first}mlp.gated_layers.weight", 2 if dense else 3)
    if not dense and dim % sizes[0] and "intermediate_size" not in options:
        raise ValueError(
            f"intermediate_size must be given: {sizes[0]} blocks do not divide hidden_size {dim}, so that they are "
            "padded, and the weights do not tell how much"
        )
    found = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": len(layers),
        "intermediate_size": (sizes[0] if dense else sizes[0] * sizes[1]) // 2,
        "max_position_embeddings": length,
        "type_vocab_size": kinds,
        "mlp_structure": None if dense else BlockDiagonalConfig(nblocks=sizes[0]),
        "filter_features": features,
        "filter_width": width,
        "filter_depth": sum(name.startswith(f"{taps}implicit_filter.") and name.endswith(".freq") for name in state),
        "bidirectional": any(name.startswith(f"{taps}implicit_filter_rev.") for name in state),
        "residual_long_conv": any(name.startswith(f"{first}attention.filter_fn2.") for name in state),
        "mixer_norm": f"{first}attention.layernorm.weight" in state,
    }
    if "classifier.weight" in state:
        found["num_labels"] = len(state["classifier.weight"])
    check_options(M2BertConfig, options)
    return M2BertConfig(**{**found, **options})


def _affine(theirs: str, ours: str, *shape: int) -> Iterator[_Entry]:
    yield _Entry(f"{theirs}.weight", f"{ours}.weight", shape)
    yield _Entry(f"{theirs}.bias", f"{ours}.bias", shape[:1])


def _entries(config: M2BertConfig, heads: tuple[str, ...]) -> Iterator[_Entry]:
    d, vocab = config.hidden_size, config.vocab_size
    at, to = "bert.embeddings.", "model.embeddings."
    yield _Entry(f"{at}word_embeddings.weight", f"{to}tokens.weight", (vocab, d))
    yield _Entry(f"{at}position_embeddings.weight", f"{to}positions.weight", (config.max_position_embeddings, d))
    yield _Entry(f"{at}token_type_embeddings.weight", f"{to}token_types.weight", (config.type_vocab_size, d))
    yield from _affine(f"{at}LayerNorm", f"{to}norm", d)
    for i in range(config.num_hidden_layers):
        yield from _layer(config, f"{_LAYER}{i}.", f"model.layers.{i}.")
    if "cls.predictions." in heads:
        yield from _affine("cls.predictions.transform.dense", "head.dense", d, d)
        yield from _affine("cls.predictions.transform.LayerNorm", "head.norm", d)
        yield from _affine("cls.predictions.decoder", "head.decoder", vocab, d)
    if "bert.pooler." in heads:
        yield from _affine("bert.pooler.dense", "model.pooler", d, d)
    if "classifier." in heads:
        yield from _affine("classifier", "classifier", config.num_labels or 0, d)


def _layer(config: M2BertConfig, at: str, to: str) -> Iterator[_Entry]:
    d, hidden = config.hidden_size, config.intermediate_size
    for theirs, ours in (("filter_fn", "long"), ("filter_fn2", "residual"))[: 1 + config.residual_long_conv]:
        yield from _filter(config, f"{at}attention.{theirs}.", f"{to}mixer.{ours}.")
    yield from _affine(f"{at}attention.in_linear", f"{to}mixer.project", 3 * d, d)
    yield from _affine(f"{at}attention.short_filter", f"{to}mixer.short", 3 * d, 1, config.short_filter_size)
    yield from _affine(f"{at}attention.out_linear", f"{to}mixer.out", d, d)
    if config.mixer_norm:
        yield from _affine(f"{at}attention.layernorm", f"{to}mixer.norm", d)
    blocks = config.mlp_structure
    for theirs, ours, m, n in (("gated_layers", "gate", 2 * hidden, d), ("wo", "out", d, hidden)):
        if blocks is None:
            yield _Entry(f"{at}mlp.{theirs}.weight", f"{to}mlp.{ours}.weight", (m, n))
        else:
            k = BlockDiagonalConfig(**{key: v for key, v in blocks.items() if key != "structure"}).resolve(m, n)[
                "nblocks"
            ]
            yield _Entry(f"{at}mlp.{theirs}.weight", f"{to}mlp.{ours}.weight.blocks", (k, -(-m // k), -(-n // k)))
    yield _Entry(f"{at}mlp.wo.bias", f"{to}mlp.out.bias", (d,))
    yield from _affine(f"{at}mlp.layernorm", f"{to}norm", d)


def _filter(config: M2BertConfig, at: str, to: str) -> Iterator[_Entry]:
    d, length, width, depth = (
        *(config.hidden_size, config.max_position_embeddings),
        *(config.filter_width, config.filter_depth),
    )
    yield _Entry(f"{at}bias", f"{to}skip", (d,))
    yield _Entry(f"{at}pos_emb.z", f"{to}filter.z", (1, length, config.filter_features))
    yield _Entry(f"{at}pos_emb.t", f"{to}filter.t", (1, length, 1))
    yield _Entry(f"{at}modulation.deltas", f"{to}filter.deltas", (1, 1, d))
    for direction, net in enumerate(("implicit_filter", "implicit_filter_rev")[: 1 + config.bidirectional]):
        inner = f"{to}filter.mlps.{direction}."
        for j in range(depth):  # linear layers and sines alternate there
            yield from _affine(f"{at}{net}.{2 * j}", f"{inner}{j}", width, width if j else config.filter_features)
            yield _Entry(f"{at}{net}.{2 * j + 1}.freq", f"{to}filter.frequency", (1, width))
        yield _Entry(f"{at}{net}.{2 * depth}.weight", f"{inner}{depth}.weight", (d, width))


def _check_names(state: Mapping[str, Tensor], entries: list[_Entry], config: M2BertConfig) -> None:
    expected = {entry.theirs: entry.shape for entry in entries}
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "wrong": wrong,
    }
    text = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(
            f"the state dict is not that of an M2-BERT of {config.num_hidden_layers} layers and hidden_size "
            f"{config.hidden_size}: {text}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _lengthen(state: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    if new < old:
        raise ValueError(f"max_position_embeddings must be at least that of the checkpoint, {old}, got {new}")
    rows = -(-new // old)
    longer: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("embeddings.positions.weight"):
            value = value.repeat(rows, 1)[:new]
        elif name.endswith(".filter.z"):
            value = value.repeat(1, rows, 1)[:, :new]
        elif name.endswith(".filter.t") and new != old:
            value = torch.linspace(0, 1, new, dtype=value.dtype, device=value.device).view(1, -1, 1)
        longer[name] = value
    return longer
