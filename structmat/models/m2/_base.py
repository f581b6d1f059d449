"""What the M2 models share: initial values, checkpointing over layers, checks of their inputs, losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from structmat.models.m2._config import M2Config
from structmat.models.m2.mixer import M2SequenceMixer
from structmat.models.m2.mlp import M2MLP
from structmat.nn.linear import StructuredLinear
from structmat.nn.longconv import ImplicitFilter, LongConv, ShortConv

EMBEDDING_STD = 0.02


def mixer_of(config: M2Config, causal: bool, norm: bool = False) -> M2SequenceMixer:
    """The sequence mixer that a configuration describes."""
    return M2SequenceMixer(
        config.hidden_size,
        config.sequence_length,
        mode="causal" if causal else "bidirectional",
        residual=config.residual_long_conv,
        norm=norm,
        short_filter_size=config.short_filter_size,
        structure=config.projection_structure,
        features=config.filter_features,
        width=config.filter_width,
        depth=config.filter_depth,
        frequency=config.filter_frequency,
    )


def mlp_of(config: M2Config) -> M2MLP:
    """The MLP that a configuration describes."""
    return M2MLP(config.hidden_size, config.intermediate_size, config.mlp_structure, config.hidden_dropout_prob)


class M2Block(nn.Module):
    """A layer of M2-GPT and M2-ViT: sequence mixer and MLP, each after a layer norm and added to its input."""

    def __init__(self, config: M2Config, causal: bool) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = mixer_of(config, causal)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = mlp_of(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x of shape (batch, length, dim) to the same shape; mask (batch, length) is 0 at padding."""
        x = x + self.dropout(self.mixer(self.mixer_norm(x), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def extend(self, x: Tensor, mask: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The same of the inputs that follow those in the state, None at the start, and the state after them."""
        y, state = self.mixer.extend(self.mixer_norm(x), mask, state)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state


class M2PreTrainedModel(PreTrainedModel):
    """Base class of the M2 models: initial values, gradient checkpointing, saving and loading."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    #: Of weights that are loaded in half precision: positions and frequencies need more than 8 bits.
    _keep_in_fp32_modules_strict: ClassVar[Any] = ["filter"]
    _no_split_modules: ClassVar[list[str]] = ["M2Block", "M2BertLayer"]

    def __init__(self, config: M2Config, *args: Any, **kwargs: Any) -> None:
        config._check()  # what from_pretrained is given becomes attributes of a configuration that was checked before
        super().__init__(config, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: transformers skips a module of custom code that has no missing tensors of its own.

        A :class:`StructuredLinear` has none but its bias, as its factors are its child's. What is loaded is kept here.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        std: float | None = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD if std is None else std)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and std is not None:
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, (StructuredLinear, ImplicitFilter, LongConv, ShortConv)):
            _reset(module)

    def _run(
        self, layers: Iterable[nn.Module], x: Tensor, mask: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Apply layers, recomputing them in the backward pass if so enabled; the inputs of all if ``keep``."""
        inputs: list[Tensor] = []
        for layer in layers:
            if keep:
                inputs.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask)
            else:
                x = layer(x, mask)
        return x, inputs

    @staticmethod
    def _states(inputs: list[Tensor], x: Tensor, keep: bool) -> tuple[Tensor, ...] | None:
        """What is returned as hidden states: the inputs of all layers and the output."""
        if not keep:
            return None
        inputs.append(x)
        return tuple(inputs)

    def _keep(self, output_hidden_states: bool | None) -> bool:
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    """New initial values of all tensors of a module but those that ``from_pretrained`` has loaded."""
    tensors = (*module.parameters(), *module.buffers())
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    module.reset_parameters()  # pyright: ignore[reportCallIssue]
    for tensor, value in loaded:
        tensor.copy_(value)


def check_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, config: Any, seen: int = 0
) -> tuple[int, int]:
    """Batch and length of a text; raise unless exactly one of its forms is given, it fits, and so does the mask."""
    longest = config.max_position_embeddings
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
        batch, length = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3:
            raise ValueError(f"inputs_embeds must have shape (batch, length, dim), got {tuple(inputs_embeds.shape)}")
        batch, length, dim = inputs_embeds.shape
        if dim != config.hidden_size:
            raise ValueError(f"inputs_embeds must have hidden_size {config.hidden_size} at the end, got {dim}")
    if length == 0:
        behind = f" behind the {seen} that the cache has seen" if seen else ""
        raise ValueError(f"a sequence must have at least one token{behind}, got none")
    if seen + length > longest:
        raise ValueError(
            f"the sequence has {seen + length} tokens, more than config.max_position_embeddings = {longest}; "
            "truncate it, or make a model with longer filters"
        )
    if attention_mask is not None and tuple(attention_mask.shape) not in ((batch, length), (batch, seen + length)):
        raise ValueError(
            f"attention_mask must have shape ({batch}, {seen + length}), got {tuple(attention_mask.shape)}"
        )
    return batch, length


def label_loss(logits: Tensor, labels: Tensor, config: Any) -> Tensor:
    """The loss of a classifier, by ``config.problem_type`` or, without one, by the labels, as in transformers."""
    kind = config.problem_type
    if kind is None:
        if config.num_labels == 1:
            kind = "regression"
        else:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if kind == "regression":
        return F.mse_loss(logits.view_as(labels).float(), labels.float())
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float().view(-1, config.num_labels), labels.view(-1))
