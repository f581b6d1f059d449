"""M2-GPT: a causal language model without attention and without dense MLPs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from structmat.models.m2._base import M2Block, M2PreTrainedModel, check_tokens
from structmat.models.m2.configuration import M2GPTConfig


class M2Cache:
    """What M2-GPT remembers of the tokens that it has seen: one state a layer.

    It stands where a cache of keys and values stands in other models, as ``past_key_values``. The short filters keep
    their last inputs, the long convolutions all of theirs. Reading further tokens moves it on, in place: to go on in
    two ways from one state take a ``copy.deepcopy`` first.

    Args:
        layers: how many layers the model has.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers: int) -> None:
        self.layers: list[Any] = [None] * layers
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens have been seen, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the batch that beam search goes on with, in their new order."""
        self.layers = [None if state is None else state.reorder(beam_idx) for state in self.layers]


class M2GPTModel(M2PreTrainedModel):
    """The blocks of M2-GPT: causal gated long convolutions and gated structured MLPs, each in a pre-norm residual.

    There are no position embeddings: the filters know positions, and only differences count. So padding on the left
    changes nothing. What stands at padding is 0 before every convolution.

    Args:
        config: sizes.

    Shape:
        input_ids (batch, length), length at most ``config.max_position_embeddings``, to last_hidden_state
        (batch, length, hidden_size).

    Source: Fu et al. 2023, "Monarch Mixer: a simple sub-quadratic GEMM-based architecture", section 5.3.

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2GPTConfig, M2GPTModel
        >>> size = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        >>> model = M2GPTModel(M2GPTConfig(max_position_embeddings=64, **size))
        >>> model(torch.ones(3, 20, dtype=torch.long)).last_hidden_state.shape
        torch.Size([3, 20, 32])
    """

    config_class = M2GPTConfig

    def __init__(self, config: M2GPTConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(M2Block(config, causal=True) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: M2Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Read texts, or what follows the texts in a cache.

        Args:
            input_ids: tokens (batch, length).
            attention_mask: 1 at tokens and 0 at padding, (batch, length) or, with the tokens in the cache,
                (batch, seen + length); None keeps all.
            inputs_embeds: (batch, length, hidden_size), in place of input_ids.
            past_key_values: the state after the tokens before these; it moves on by these tokens.
            use_cache: whether to return the state after these tokens. By default ``config.use_cache`` where the model
                is in eval mode. There is none while gradient checkpointing recomputes the blocks.
            output_hidden_states: whether to return the embeddings and the outputs of all blocks.
            return_dict: whether to return an output object, in place of a tuple.

        Raises:
            TypeError: if past_key_values is no :class:`M2Cache`.
            ValueError: if not exactly one of input_ids and inputs_embeds is given, the text is empty or longer than
                the configuration allows, an argument has another shape, or the cache is that of another model.
            RuntimeError: if gradients are asked for behind a cache: it holds no graph. Use ``torch.no_grad()``.
        """
        cache = past_key_values
        if cache is not None and not isinstance(cache, M2Cache):
            raise TypeError(f"past_key_values must be an M2Cache, got {type(cache).__name__}")
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"past_key_values must have {len(self.layers)} layers, got {len(cache.layers)}")
        seen = 0 if cache is None else cache.seen
        _, length = check_tokens(input_ids, inputs_embeds, attention_mask, self.config, seen)
        x = self.dropout(self.tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        mask = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - length :]
        keep = self._keep(output_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and (not use_cache or (self.gradient_checkpointing and self.training)):
            x, inputs = self._run(self.layers, x, mask, keep)
        else:
            cache = M2Cache(len(self.layers)) if cache is None else cache
            x, inputs = self._extend(x, mask, cache, keep)
        x = self.norm(x)
        states = self._states(inputs, x, keep)
        if not self._as_dict(return_dict):
            return tuple(v for v in (x, cache, states) if v is not None)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=states)  # pyright: ignore

    def _extend(self, x: Tensor, mask: Tensor | None, cache: M2Cache, keep: bool) -> tuple[Tensor, list[Tensor]]:
        inputs: list[Tensor] = []
        new = x.shape[1]
        for i, layer in enumerate(self.layers):
            if keep:
                inputs.append(x)
            x, cache.layers[i] = layer.extend(x, mask, cache.layers[i])  # pyright: ignore[reportCallIssue]
        cache.seen += new
        return x, inputs


class M2GPTForCausalLM(M2PreTrainedModel, GenerationMixin):
    """M2-GPT with the output matrix of a language model, which is that of its embedding.

    ``generate`` reads the prompt once and then token by token from the state. A step costs the product of the filters
    with all inputs of the long convolutions, O(length · hidden_size) a layer, and no pass over the text.

    Args:
        config: sizes.

    Shape:
        input_ids (batch, length) to logits (batch, length, vocab_size).

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2GPTConfig, M2GPTForCausalLM
        >>> size = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        >>> model = M2GPTForCausalLM(M2GPTConfig(max_position_embeddings=64, **size)).eval()
        >>> tokens = torch.randint(100, (3, 20))
        >>> model(tokens, labels=tokens).logits.shape
        torch.Size([3, 20, 100])
        >>> model.generate(tokens, max_new_tokens=5, do_sample=False).shape
        torch.Size([3, 25])
    """

    config_class = M2GPTConfig
    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "model.tokens.weight"}
    #: Assisted generation takes tokens back, which a state cannot.
    _is_stateful = True

    def __init__(self, config: M2GPTConfig) -> None:
        super().__init__(config)
        self.model = M2GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: M2Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Guess the successors of tokens; arguments as of :meth:`M2GPTModel.forward`, labels and logits_to_keep.

        labels (batch, length) are the tokens themselves, -100 where nothing is to be guessed; the mean cross-entropy of
        the guesses for their successors becomes ``loss``. logits_to_keep positions at the end get logits; 0 means all.
        """
        out = self.model(
            input_ids, attention_mask, inputs_embeds, past_key_values, use_cache, output_hidden_states, True
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError(f"labels need all logits: logits_to_keep must be 0, got {logits_to_keep}")
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        if not self._as_dict(return_dict):
            return tuple(v for v in (loss, logits, out.past_key_values, out.hidden_states) if v is not None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        past_key_values: M2Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What of the text a step reads: all of it, or what the state has not seen."""
        kept = {k: kwargs[k] for k in ("logits_to_keep", "output_hidden_states") if k in kwargs}
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache, **kept}
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is not None and seen == 0:
            return {**inputs, "inputs_embeds": inputs_embeds}
        # A prompt of embeddings is not in input_ids: generate has a state then, and goes on one by one.
        total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        new = 1 if inputs_embeds is not None else total - seen
        input_ids = input_ids[:, input_ids.shape[1] - new :]
        return {**inputs, "input_ids": input_ids, "past_key_values": past_key_values}

    @staticmethod
    def _reorder_cache(past_key_values: M2Cache, beam_idx: Tensor) -> M2Cache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
