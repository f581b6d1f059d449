"""A transformer of GPT-2's shape, and the way from GPT-2's weights to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor
from structmat.models._build import Device, Structure, check_dropout, finish
from structmat.models.attention import attention_core
from structmat.models.blocks import TransformerBlock


class GPT(nn.Module):
    """A causal transformer of GPT-2's shape; the defaults are those of its smallest size.

    The embedding of the tokens is also the matrix of the output. The linear layers of a block are
    ``blocks.N.attention.qkv``, ``.attention.out``, ``.mlp.fc1`` and ``.mlp.fc2``.

    Args:
        vocab_size: number of different tokens.
        context: longest sequence.
        dim: channels of a token.
        depth: number of blocks.
        heads: of the attention; divides dim.
        hidden: hidden units of the MLPs; four times dim if None.
        dropout: probability, after the embedding, after attention and in the MLPs.
        attention_mask: None for full causal attention, or a boolean grid (g, g) of blocks of positions that see each
            other, g dividing context, the diagonal set; see :class:`BlockSparseAttention`. What lies after a position
            is masked in any case.
        structure: as for :class:`MLPMixer`; here there is no head to reach, and the embeddings stay dense.
        device: where the parameters are made. Structured layers are made directly: no dense weight of theirs exists.
        dtype: their dtype.

    Linear layers, structured and dense, start with ``nn.Linear``'s variance, 1 / (3 dim): GPT-2's own 0.02² at dim
    833. Its smaller variance of the layers before a residual sum is not used.

    Raises:
        structmat.BudgetError: if a budget of the structure is too small for a layer.
        TypeError: if structure is not a config or a mapping to configs, or the mask is not boolean.
        ValueError: if heads does not divide dim, the mask does not fit, a structure does not exist for a layer's size,
            or a pattern matches no layer.

    Shape:
        tokens (batch, length), integers, length at most context, to logits (batch, length, vocab_size).

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners".

    Example:
        >>> import torch, structmat
        >>> from structmat.models import GPT
        >>> gpt = GPT(65, context=32, dim=64, depth=2, heads=4, structure=structmat.MonarchConfig(nblocks=4))
        >>> tokens = torch.randint(65, (3, 20))
        >>> gpt(tokens).shape, gpt.generate(tokens, 5).shape
        (torch.Size([3, 20, 65]), torch.Size([3, 25]))
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        context: int = 1024,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        dropout: float = 0.0,
        attention_mask: Tensor | None = None,
        structure: Structure | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context = check_int("context", context)
        hidden = 4 * check_int("dim", dim) if hidden is None else hidden
        core = attention_core(attention_mask, context, causal=True, device=device)
        with torch.device("meta"):
            # Parameters of the model, not embedding modules: these would start with unit variance.
            self.tokens = nn.Parameter(torch.empty(check_int("vocab_size", vocab_size), dim))
            self.positions = nn.Parameter(torch.empty(context, dim))
            self.dropout = nn.Dropout(check_dropout(dropout))
            self.blocks = nn.Sequential(
                *(
                    TransformerBlock(dim, heads, hidden, core, dropout, approximate="tanh")
                    for _ in range(check_int("depth", depth))
                )
            )
            self.norm = nn.LayerNorm(dim)
        finish(self, structure, device, dtype)

    def reset_parameters(self) -> None:
        """Draw new embeddings of tokens and positions; no other parameter changes."""
        nn.init.normal_(self.tokens, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape (batch, length) to the logits of their successors, (batch, length, vocab_size)."""
        check_tensor("tokens", tokens)
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens must have shape (batch, length) with length at most {self.context}, got {tuple(tokens.shape)}"
            )
        x = F.embedding(tokens, self.tokens) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(self.dropout(x))), self.tokens)

    def own_flops(self, tokens: Tensor) -> int:
        """Operations of the product with the output matrix."""
        return 2 * tokens.numel() * self.tokens.numel()

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Continue sequences, token by token, each drawn from the model's distribution.

        Nothing is cached: every token costs a pass over the sequence, of which the model sees the last ``context``
        tokens. Call ``eval()`` first where there is dropout.

        Args:
            tokens: shape (batch, length), length at least 1.
            count: how many tokens to add.
            generator: for the draws, on the model's device.
            temperature: divides the logits; 0 takes the likeliest token.

        Returns:
            Shape (batch, length + count): the tokens given and those added.

        Raises:
            ValueError: if there are no tokens to continue, or temperature is negative.
        """
        check_tensor("tokens", tokens)
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (batch, length) with length at least 1, got {tuple(tokens.shape)}"
            )
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        for _ in range(check_int("count", count, 0)):
            logits = self(tokens[:, -self.context :])[:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, new.to(tokens.dtype)), 1)
        return tokens


_NAMES = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_gpt2_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' GPT-2 to those of a dense :class:`GPT`.

    Weights of its ``Conv1D`` are transposed. Stored attention masks and the output matrix, which is that of the
    embedding, are left out. Compress the model after loading, with :func:`structmat.surgery.compress_`.

    Args:
        state: the state dict of ``GPT2LMHeadModel`` or ``GPT2Model``.

    Raises:
        ValueError: if a name is not one of GPT-2's, or the output matrix is not the embedding.

    Example:
        >>> import torch
        >>> from structmat.models import convert_gpt2_state_dict
        >>> new = convert_gpt2_state_dict({"transformer.h.0.mlp.c_fc.weight": torch.ones(8, 32)})
        >>> {name: tuple(value.shape) for name, value in new.items()}
        {'blocks.0.mlp.fc1.weight': (32, 8)}
    """
    plain = {name.removeprefix("transformer."): value for name, value in state.items()}
    head = plain.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in plain and not torch.equal(head, plain["wte.weight"]):
        raise ValueError("lm_head.weight must be equal to wte.weight: a GPT's output matrix is that of its embedding")
    outer = {"wte.weight": "tokens", "wpe.weight": "positions", "ln_f.weight": "norm.weight", "ln_f.bias": "norm.bias"}
    new: dict[str, Tensor] = {}
    for name, value in plain.items():
        if name in outer:
            new[outer[name]] = value
            continue
        first, number, layer, kind = _split(name)
        if layer == "attn" and kind in ("bias", "masked_bias"):  # the causal mask of older files
            continue
        if first != "h" or not number.isdigit() or layer not in _NAMES or kind not in ("weight", "bias"):
            raise ValueError(f"{name!r} is not a name of GPT-2's weights")
        transposed = kind == "weight" and ".c_" in layer
        new[f"blocks.{number}.{_NAMES[layer]}.{kind}"] = value.mT.contiguous() if transposed else value
    return new


def _split(name: str) -> tuple[str, str, str, str]:
    """``h.0.mlp.c_fc.weight`` to ``("h", "0", "mlp.c_fc", "weight")``."""
    parts = name.split(".")
    return (parts[0], parts[1], ".".join(parts[2:-1]), parts[-1]) if len(parts) > 3 else ("", "", "", "")
