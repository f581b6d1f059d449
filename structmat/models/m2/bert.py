"""M2-BERT: a bidirectional encoder without attention, as released by its authors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from structmat._checks import check_int
from structmat.models.m2._base import M2PreTrainedModel, check_tokens, label_loss, mixer_of, mlp_of
from structmat.models.m2.configuration import M2BertConfig


class M2BertEmbeddings(nn.Module):
    """Sum of the embeddings of tokens, positions and token types; layer norm; dropout."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, d)
        self.token_types = nn.Embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        """Embedded tokens x of shape (batch, length, dim) to the same shape."""
        kinds = self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids)
        return self.dropout(self.norm(x + self.positions(position_ids) + kinds))


class M2BertLayer(nn.Module):
    """``norm(h + mlp(h))`` with ``h = mixer(x)``: as released, nothing is added to the mixer's output."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.mixer = mixer_of(config, causal=not config.bidirectional, norm=config.mixer_norm)
        self.mlp = mlp_of(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x of shape (batch, length, dim) to the same shape; mask (batch, length) is 0 at padding."""
        h = self.mixer(x, mask)
        return self.norm(h + self.mlp(h))


class M2BertModel(M2PreTrainedModel):
    """The encoder of M2-BERT, with a pooler.

    Real tokens' outputs do not depend on the padding: what stands at padding is 0 before every convolution, and
    positions count the tokens that the mask keeps. ``config.legacy_padding`` treats padding as other tokens, as the
    released code does, where embeddings depend on how far a batch is padded.

    Args:
        config: sizes.
        add_pooling_layer: whether the first token (or the mean, by ``config.pooling``) passes a linear layer and tanh
            to become ``pooler_output``.

    Shape:
        input_ids (batch, length), length at most ``config.max_position_embeddings``, to last_hidden_state
        (batch, length, hidden_size) and pooler_output (batch, hidden_size).

    Source: Fu et al. 2023, "Monarch Mixer: a simple sub-quadratic GEMM-based architecture".

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2BertConfig, M2BertModel
        >>> config = M2BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        >>> out = M2BertModel(config)(torch.ones(3, 20, dtype=torch.long))
        >>> out.last_hidden_state.shape, out.pooler_output.shape
        (torch.Size([3, 20, 32]), torch.Size([3, 32]))
    """

    config_class = M2BertConfig

    def __init__(self, config: M2BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = M2BertEmbeddings(config)
        self.layers = nn.ModuleList(M2BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.tokens = value  # pyright: ignore[reportAttributeAccessIssue]

    def _positions(self, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
        if mask is None or self.config.legacy_padding:
            return torch.arange(length, device=device)[None]
        return (mask.long().cumsum(-1) - 1).clamp_min(0)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.pooler is None:
            return None
        if self.config.pooling == "mean":
            weights = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
            pooled = (x * weights).sum(1) / weights.sum(1).clamp_min(1)  # a row may have no tokens
        elif mask is None or self.config.legacy_padding:
            pooled = x[:, 0]
        else:
            pooled = x[torch.arange(len(x), device=x.device), mask.long().argmax(-1)]
        return self.pooler(pooled).tanh()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode texts.

        Args:
            input_ids: tokens (batch, length).
            attention_mask: (batch, length), 1 at tokens and 0 at padding; None keeps all.
            token_type_ids: (batch, length) or (1, length), 0 if None.
            position_ids: (batch, length) or (1, length); counted along the mask if None.
            inputs_embeds: (batch, length, hidden_size), in place of input_ids.
            output_hidden_states: whether to return the embeddings and the outputs of all layers.
            return_dict: whether to return an output object, in place of a tuple.

        Raises:
            ValueError: if not exactly one of input_ids and inputs_embeds is given, the text is empty or longer than
                the configuration allows, or an argument has another shape.
        """
        batch, length = check_tokens(input_ids, inputs_embeds, attention_mask, self.config)
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if ids is not None and tuple(ids.shape) not in ((batch, length), (1, length)):
                raise ValueError(f"{name} must have shape ({batch}, {length}), got {tuple(ids.shape)}")
        x = self.embeddings.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self._positions(attention_mask, length, x.device)
        x = self.embeddings(x, token_type_ids, position_ids)
        keep = self._keep(output_hidden_states)
        x, inputs = self._run(self.layers, x, None if self.config.legacy_padding else attention_mask, keep)
        pooled, states = self._pool(x, attention_mask), self._states(inputs, x, keep)
        if not self._as_dict(return_dict):
            return tuple(v for v in (x, pooled, states) if v is not None)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


class M2BertHead(nn.Module):
    """Linear layer, GELU, layer norm and the output matrix."""

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (*, dim) to logits (*, vocab_size)."""
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class M2BertForMaskedLM(M2PreTrainedModel):
    """M2-BERT with the head that it is pretrained with: it guesses masked tokens.

    Args:
        config: sizes; ``M2BertConfig.preset("80M")`` and so on are those of the published models.

    Shape:
        input_ids (batch, length) to logits (batch, length, vocab_size).

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2BertConfig, M2BertForMaskedLM
        >>> with torch.device("meta"):
        ...     model = M2BertForMaskedLM(M2BertConfig.preset("80M"))
        >>> sum(p.numel() for p in model.parameters())
        80267328
    """

    config_class = M2BertConfig
    _tied_weights_keys: ClassVar[Any] = {"head.decoder.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__(config)
        self.model = M2BertModel(config, add_pooling_layer=False)
        self.head = M2BertHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.decoder = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Guess tokens; arguments as of :meth:`M2BertModel.forward`, and labels.

        labels (batch, length) are the tokens to guess, -100 where there is nothing to guess; the mean cross-entropy
        becomes ``loss``.
        """
        out = self.model(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, True
        )
        logits = self.head(out.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        if not self._as_dict(return_dict):
            return tuple(v for v in (loss, logits, out.hidden_states) if v is not None)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class M2BertForSequenceClassification(M2PreTrainedModel):
    """M2-BERT with a linear classifier of the pooled output.

    Args:
        config: sizes; ``num_labels`` is the number of classes, 1 for a regression.

    Shape:
        input_ids (batch, length) to logits (batch, num_labels).

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2BertConfig, M2BertForSequenceClassification
        >>> size = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        >>> model = M2BertForSequenceClassification(M2BertConfig(num_labels=3, **size))
        >>> model(torch.ones(5, 20, dtype=torch.long)).logits.shape
        torch.Size([5, 3])
    """

    config_class = M2BertConfig

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__(config)
        self.model = M2BertModel(config)
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, check_int("num_labels", config.num_labels))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify texts; arguments as of :meth:`M2BertModel.forward`, and labels.

        labels are classes (batch,), or numbers (batch,) or (batch, num_labels), by ``config.problem_type``; the mean
        loss becomes ``loss``.
        """
        out = self.model(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, True
        )
        logits = self.classifier(self.dropout(out.pooler_output))
        loss = None if labels is None else label_loss(logits, labels, self.config)
        if not self._as_dict(return_dict):
            return tuple(v for v in (loss, logits, out.hidden_states) if v is not None)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
