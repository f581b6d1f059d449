"""Softmax attention, between all positions or between the pairs of blocks that a mask allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor

# Share of the scores up to which "auto" gathers blocks: on a CPU that is faster from there on (docs/models.md).
_GATHER_BELOW = 0.3


class DotProductAttention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v`` over all positions, or over those up to the query's.

    Args:
        causal: whether a position sees only itself and those before it.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v of shape (batch, heads, length, d) to the same shape."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def pairs(self, length: int) -> int:
        """How many scores of a head the mask allows in a sequence of this length."""
        return length * (length + 1) // 2 if self.causal else length**2

    def extra_repr(self) -> str:
        return f"causal={self.causal}"


class BlockSparseAttention(DotProductAttention):
    """``softmax(q k^T / sqrt(d)) v`` over the pairs of blocks of positions that a mask allows.

    The mask is structure: it is no part of the state dict, so that weights trained with one load with another. A
    sequence shorter than the mask uses the mask's upper left part.

    Args:
        mask: boolean, shape (g, g): entry (i, j) says whether queries of block i see keys of block j; for example
            ``structmat_kernels.block_sparse.flat_butterfly_mask(g, g, max_stride=s)``.
        block_size: positions in a block.
        causal: whether, besides, a position sees only itself and those before it. Blocks that no query of theirs
            can see are then left out; the diagonal of the mask must be set.
        backend: "dense" computes all scores and masks them. "gather" computes those of allowed blocks only, every
            row of blocks padded to as many as the fullest one has: one full row, as a global block has, and it saves
            nothing. "flex" calls ``torch.nn.attention.flex_attention`` with a ``BlockMask``: compile the model for
            it, and mind that it wants a GPU to train. "auto" is gather where that computes at most 0.3 of the scores
            and the sequence has full length, else dense.

    Raises:
        TypeError: if mask is not a boolean tensor.
        ValueError: if mask is not square, is on the meta device or has an empty row, or backend is unknown; when
            called, if a sequence is too long, or so short that a query of it sees none of its keys.

    Shape:
        q, k, v (batch, heads, length, d), length at most g ``block_size``, to the same.

    Cost:
        4 d flops a score and head; memory of length g_row ``block_size`` a head for "gather" with g_row blocks in the
        fullest row, length² for "dense".

    Source: Chen, Dao et al. 2021, "Pixelated Butterfly", for flat butterfly masks; Zaheer et al. 2020, "Big Bird".

    Example:
        >>> import torch
        >>> from structmat.models import BlockSparseAttention
        >>> near = torch.eye(8).bool()
        >>> attention = BlockSparseAttention(near | near.roll(1, 0), block_size=4)
        >>> q = torch.ones(2, 3, 32, 5)
        >>> attention(q, q, q).shape, attention.pairs(32), 32 * 32
        (torch.Size([2, 3, 32, 5]), 256, 1024)
    """

    mask: Tensor
    index: Tensor
    allowed: Tensor

    def __init__(self, mask: Tensor, block_size: int, causal: bool = False, backend: str = "auto") -> None:
        super().__init__(causal)
        self.block_size = check_int("block_size", block_size)
        if backend not in ("auto", "dense", "gather", "flex"):
            raise ValueError(f"backend must be 'auto', 'dense', 'gather' or 'flex', got {backend!r}")
        self.backend = backend
        self.grid = _check_mask(mask, causal).cpu()
        self.widest = int(self.grid.sum(1).max())
        # How many blocks of a shorter sequence leave a query without keys: none of them if causal.
        furthest = self.grid.int().argmax(1).cummax(0).values.tolist()
        self._too_few = frozenset(g for g, key in enumerate(furthest, 1) if key >= g)
        self._make(mask.device)

    def _make(self, device: torch.device) -> None:
        """Make the tensors of the mask; allowed blocks come first, the rest of a row repeats blocks and masks them."""
        grid, block = self.grid, self.block_size
        g = len(grid)
        index = grid.int().argsort(dim=1, descending=True, stable=True)[:, : self.widest]
        seen = torch.arange(self.widest, device="cpu") < grid.sum(1, keepdim=True)
        inner = torch.arange(block, device="cpu")
        allowed = seen[:, None, :, None].expand(g, block, self.widest, block)
        if self.causal:
            queries = torch.arange(g, device="cpu")[:, None] * block + inner
            keys = index[:, :, None] * block + inner
            allowed = allowed & (keys[:, None] <= queries[:, :, None, None])
        self._pairs = int(allowed.sum())
        for name, value in (("mask", grid), ("index", index), ("allowed", allowed.reshape(g, block, -1))):
            self.register_buffer(name, value.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseAttention:
        super()._apply(fn, recurse)
        self._make(self.mask.device)  # to_empty has left memory without values, which no checkpoint will fill
        return self

    @property
    def length(self) -> int:
        """How many positions the mask covers."""
        return len(self.grid) * self.block_size

    def pairs(self, length: int) -> int:
        if length == self.length:
            return self._pairs
        block = torch.arange(self._check_length(length), device="cpu") // self.block_size
        dense = self.grid[block[:, None], block]
        return int((dense.tril() if self.causal else dense).sum())

    def dense_mask(self, length: int | None = None) -> Tensor:
        """Which keys each query sees: boolean, shape (length, length)."""
        length = self.length if length is None else self._check_length(length)
        position = torch.arange(length, device=self.mask.device)
        block = position // self.block_size
        dense = self.mask[block[:, None], block]
        return dense & (position <= position[:, None]) if self.causal else dense

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        check_tensor("q", q, 3)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(f"q and k must have one length, got {q.shape[-2]} and {k.shape[-2]}")
        length = self._check_length(q.shape[-2])
        if self._too_few and -(-length // self.block_size) in self._too_few:
            raise ValueError(self._blind(length))
        backend = self.backend
        if backend == "auto":
            pays = length == self.length and self.widest <= _GATHER_BELOW * len(self.grid)
            backend = "gather" if pays else "dense"
        if backend == "flex":
            return self._flex(q, k, v)
        if backend == "dense":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.dense_mask(length))
        if length != self.length:
            raise ValueError(f"backend 'gather' needs sequences of length {self.length}, got {length}; use 'auto'")
        return self._gather(q, k, v)

    def _gather(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = (len(self.grid), self.block_size)
        # (batch heads, g, block, d) queries against (batch heads, g, widest block, d) keys: with more than four
        # dimensions PyTorch has no fused kernel on a GPU.
        keys, values = (t.unflatten(-2, sizes)[..., self.index, :, :].flatten(-3, -2).flatten(0, -4) for t in (k, v))
        queries = q.unflatten(-2, sizes).flatten(0, -4)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.allowed)
        return out.unflatten(0, q.shape[:-2]).flatten(-3, -2)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, block, causal = self.mask, self.block_size, self.causal

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = mask[i // block, j // block]
            return seen & (j <= i) if causal else seen

        length = q.shape[-2]
        blocks: Any = create_block_mask(visible, None, None, length, length, device=q.device)
        out: Any = flex_attention(q, k, v, block_mask=blocks)
        return out

    def _blind(self, length: int) -> str:
        g = -(-length // self.block_size)
        blocks = (~self.grid[:g, :g].any(1)).nonzero().flatten().tolist()
        return f"queries of blocks {blocks[:5]} see no key of a sequence of {length} positions; make it longer"

    def _check_length(self, length: int) -> int:
        if length > self.length:
            raise ValueError(
                f"the mask covers {self.length} positions, {len(self.grid)} blocks of {self.block_size}, got a "
                f"sequence of {length}"
            )
        return length

    def extra_repr(self) -> str:
        text = f"{len(self.grid)} blocks of {self.block_size}, density={self.grid.double().mean():.3f}"
        return f"{text}, causal={self.causal}, backend={self.backend!r}"


def _check_mask(mask: Any, causal: bool) -> Tensor:
    """The mask without the blocks that lie after their queries if causal."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}; convert it with mask != 0")
    if mask.is_meta:
        raise ValueError("mask must have values, got one on the meta device; make it with device='cpu'")
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or len(mask) == 0:
        raise ValueError(f"mask must have shape (g, g), got {tuple(mask.shape)}")
    if causal:
        blind = (~mask.diagonal()).nonzero().flatten().tolist()
        if blind:
            raise ValueError(
                f"the diagonal of mask must be set where causal=True, or a block's first query sees nothing; it is "
                f"not in rows {blind[:5]}"
            )
        return mask.tril()
    if empty := (~mask.any(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"every row of mask must have an entry, or its queries see nothing; rows {empty[:5]} have none"
        )
    return mask.clone()


def attention_core(mask: Tensor | None, length: int, causal: bool, device: Any = None) -> DotProductAttention:
    """The attention of a model for sequences of up to ``length``: full, or of a mask of blocks that divide it.

    Raises:
        TypeError: if mask is not a boolean tensor.
        ValueError: if the mask's blocks do not divide the length, or it is not square or has an empty row.
    """
    if mask is None:
        return DotProductAttention(causal)
    check_tensor("attention_mask", mask, 2)
    if len(mask) == 0 or length % len(mask):
        raise ValueError(
            f"attention_mask must have a number of rows that divides the {length} positions, got shape "
            f"{tuple(mask.shape)}"
        )
    return BlockSparseAttention(mask, length // len(mask), causal).to(device or torch.get_default_device())
