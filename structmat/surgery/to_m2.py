"""An M2-BERT in place of a BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structmat.nn.longconv import ImplicitFilter

if TYPE_CHECKING:
    from structmat.models.m2 import M2PreTrainedModel

#: Names of a BERT's modules that M2-BERT has too, with their names there.
_KEPT = {
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.token_types",
    "embeddings.LayerNorm": "embeddings.norm",
    "pooler.dense": "pooler",
}
_HEADS = {
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.decoder": "head.decoder",
    "classifier": "classifier",
}


def to_m2(model: nn.Module, **options: Any) -> M2PreTrainedModel:
    """A new M2-BERT that has a BERT's embeddings, pooler and head, and M2 layers in place of attention and MLPs.

    The M2 layers are fresh, as there is no projection of attention onto convolutions: train the model, for example
    with :func:`distillation_loss` and the BERT as a teacher. To keep trained MLPs (and the attention), project them
    with :func:`compress_` onto Monarch or block-diagonal matrices. Weights are copied; the BERT stays as it is.

    Args:
        model: transformers' ``BertModel``, ``BertForMaskedLM`` or ``BertForSequenceClassification``.
        **options: of :class:`structmat.models.M2BertConfig`, such as ``mlp_structure`` or a smaller
            ``max_position_embeddings``, of which the first are kept; sizes, dropout and labels are the BERT's.

    Returns:
        An ``M2BertModel``, ``M2BertForMaskedLM`` or ``M2BertForSequenceClassification`` of the BERT's dtype, device
        and mode; filters are never below float32.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: if model is none of these, or there is no such option.
        ValueError: if the BERT is a decoder, its head's activation is not the exact GELU, or an option is out of range
            or asks for sizes that the kept weights do not have.

    Example:
        >>> import torch, transformers
        >>> from structmat import surgery
        >>> config = transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=2, intermediate_size=64)
        >>> m2 = surgery.to_m2(transformers.BertForMaskedLM(config), max_position_embeddings=128)
        >>> type(m2).__name__, m2(torch.ones(1, 50, dtype=torch.long)).logits.shape
        ('M2BertForMaskedLM', torch.Size([1, 50, 100]))
    """
    # transformers is optional, and structmat.models imports structmat.surgery.
    from transformers.models.bert import modeling_bert

    from structmat.models import m2

    classes: Mapping[type[nn.Module], type[M2PreTrainedModel]] = {
        modeling_bert.BertModel: m2.M2BertModel,
        modeling_bert.BertForMaskedLM: m2.M2BertForMaskedLM,
        modeling_bert.BertForSequenceClassification: m2.M2BertForSequenceClassification,
    }
    if type(model) not in classes:
        names = ", ".join(cls.__name__ for cls in classes)
        raise TypeError(f"model must be one of transformers' {names}, got {type(model).__name__}")
    config: Any = model.config
    if getattr(config, "is_decoder", False):
        raise ValueError("model must be an encoder, got a BERT with is_decoder=True")
    if config.hidden_act != "gelu":
        raise ValueError(f"model must have hidden_act='gelu', as M2-BERT has, got {config.hidden_act!r}")
    base = type(model) is modeling_bert.BertModel
    ours = _config(m2.M2BertConfig, config, options, type(model) is modeling_bert.BertForSequenceClassification)
    reference: Tensor = next(model.parameters())
    with torch.device(reference.device):
        if base:
            new: Any = m2.M2BertModel(ours, add_pooling_layer=getattr(model, "pooler", None) is not None)
        else:
            new = classes[type(model)](ours)
    new.to(reference.dtype)
    if reference.dtype.itemsize < 4:
        for module in new.modules():
            if isinstance(module, ImplicitFilter):  # its positions and frequencies need more than half precision
                module.float().reset_parameters()
    kept = {name if base else f"bert.{name}": here if base else f"model.{here}" for name, here in _KEPT.items()}
    _copy(model, new, {**kept, **_HEADS}, ours.max_position_embeddings)
    return new.train(model.training)


def _config(cls: Any, config: Any, options: Mapping[str, Any], classifier: bool) -> Any:
    from structmat.models.m2._config import check_options

    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
        *("type_vocab_size", "hidden_dropout_prob", "classifier_dropout", "layer_norm_eps", "initializer_range"),
        *("pad_token_id", "tie_word_embeddings", "problem_type", "id2label", "label2id"),
    )
    sizes = {name: getattr(config, name) for name in names if hasattr(config, name)}
    fixed = ("vocab_size", "hidden_size", "type_vocab_size")
    for name in fixed:
        if options.get(name, sizes[name]) != sizes[name]:
            raise ValueError(f"{name} must be the BERT's, {sizes[name]}, got {options[name]}: its embeddings are kept")
    check_options(cls, options)
    ours = cls(**{**sizes, **options})
    if classifier and ours.num_labels != config.num_labels:
        raise ValueError(f"num_labels must be the BERT's, {config.num_labels}, got {ours.num_labels}: its head is kept")
    if ours.max_position_embeddings > sizes["max_position_embeddings"]:
        raise ValueError(
            f"max_position_embeddings must be at most the BERT's, {sizes['max_position_embeddings']}, got "
            f"{ours.max_position_embeddings}"
        )
    return ours


@torch.no_grad()
def _copy(model: nn.Module, new: nn.Module, names: Mapping[str, str], positions: int) -> None:
    theirs, state = model.state_dict(), {}
    for there, here in names.items():
        for kind in ("weight", "bias"):
            if f"{there}.{kind}" in theirs and f"{here}.{kind}" in new.state_dict():
                value = theirs[f"{there}.{kind}"]
                state[f"{here}.{kind}"] = value[:positions] if here.endswith("positions") else value
    new.load_state_dict(state, strict=False)
