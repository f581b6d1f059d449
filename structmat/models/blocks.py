"""The parts that the models are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int
from structmat.models._build import check_dropout
from structmat.models.attention import DotProductAttention


class MLP(nn.Module):
    """``fc2(gelu(fc1(x)))`` with dropout after each.

    Args:
        dim: size of the last dimension of input and output.
        hidden: that in between.
        dropout: probability.
        approximate: of :func:`torch.nn.functional.gelu`.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, check_int("hidden", hidden))
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (*, dim) to the same shape."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x), approximate=self.approximate))))


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come out of one linear layer.

    Args:
        dim: size of the last dimension.
        heads: how many heads; divides dim.
        core: maps queries, keys and values of shape (batch, heads, length, dim / heads) to the same shape:
            :class:`DotProductAttention` or :class:`BlockSparseAttention`.
        dropout: probability, after the output layer.

    Raises:
        ValueError: if heads does not divide dim.
    """

    def __init__(self, dim: int, heads: int, core: DotProductAttention, dropout: float = 0.0) -> None:
        super().__init__()
        if check_int("dim", dim) % check_int("heads", heads):
            raise ValueError(f"heads must divide dim, got {heads} heads for dim {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.core = core
        self.dropout = nn.Dropout(check_dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (batch, length, dim) to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.dropout(self.out(self.core(q, k, v).transpose(1, 2).flatten(2)))

    def own_flops(self, x: Tensor) -> int:
        """Operations of the scores and of their product with the values; the linear layers count for themselves."""
        return 4 * x.shape[0] * x.shape[2] * self.core.pairs(x.shape[1])


class TransformerBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input (pre-norm).

    Args:
        dim: size of the last dimension.
        heads: of the attention.
        hidden: of the MLP.
        core: see :class:`Attention`.
        dropout: probability.
        approximate: of the GELU.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        core: DotProductAttention,
        dropout: float = 0.0,
        approximate: str = "none",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, core, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden, dropout, approximate)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (batch, length, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    """An MLP over the tokens and one over the channels, each after a LayerNorm and added to its input.

    Args:
        tokens: how many there are.
        dim: channels of each.
        token_hidden: hidden units of the MLP over tokens.
        channel_hidden: hidden units of the MLP over channels.
        dropout: probability.
    """

    def __init__(self, tokens: int, dim: int, token_hidden: int, channel_hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = MLP(tokens, token_hidden, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.channels = MLP(dim, channel_hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (batch, tokens, dim) to the same shape."""
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))
