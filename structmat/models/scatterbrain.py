"""Attention that is exact on a mask of blocks and of low rank elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat._autocast import autocast_dtype
from structmat._checks import check_int, check_tensor
from structmat.models.attention import BlockSparseAttention


class ScatterbrainAttention(BlockSparseAttention):
    """Softmax attention with exact scores in the blocks of a mask, and positive random features for all other pairs.

    With s_ij = q_i k_j^T / sqrt(d), the output is ``A v`` over the row sums of A, where A_ij = exp(s_ij) if the mask
    allows the blocks of i and j, and else A_ij = phi(q_i) phi(k_j)^T, the features' estimate of exp(s_ij):
    ``phi(x) = exp(w x / d^(1/4) - |x|^2 / (2 sqrt(d))) / sqrt(f)`` for f directions w. So every position sees every
    other (of those up to it, if causal). The estimate is unbiased, and its variance grows as
    ``exp(|q + k|^2 / sqrt(d))``: it is made for moderate scores, and large ones belong to the mask. A full mask gives
    softmax attention exactly.

    Far blocks are summed by themselves, each with scales of its own: nothing is subtracted, and nothing overflows.

    Args:
        mask: as for :class:`BlockSparseAttention`.
        block_size: positions in a block.
        head_dim: d, the size of a head.
        features: f, how many random features.
        causal: whether, besides, a position sees only itself and those before it.
        seed: of the directions, which are orthogonal in groups of d. They are structure, as the mask is, and no part of
            the state dict.

    Raises:
        TypeError: if mask is not a boolean tensor.
        ValueError: if a size is not positive, or the mask is not as :class:`BlockSparseAttention` wants it.

    Shape:
        q, k, v (batch, heads, length, d), length at most g ``block_size``, to the same. Half precision is computed in
        float32.

    Cost: 4 d operations a score in the mask, counted with rows padded to the fullest one; 8 f d a position, and 2 f d a
    pair of blocks, with f numbers of memory. ``pairs`` counts the mask's scores only.

    Source: Chen, Dao et al. 2021, "Scatterbrain: Unifying sparse and low-rank attention approximation"; Choromanski et
    al. 2021, "Rethinking attention with Performers", for the features.

    Example:
        >>> import torch
        >>> from structmat.models import ScatterbrainAttention
        >>> attention = ScatterbrainAttention(torch.eye(4).bool(), block_size=8, head_dim=16, features=64)
        >>> q, k, v = torch.randn(3, 2, 1, 32, 16, generator=torch.Generator().manual_seed(0)).unbind()
        >>> q, k = q / 3, k / 3
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> bool((attention(q, k, v) - exact).norm() < 0.2 * exact.norm())
        True
    """

    far: Tensor
    directions: Tensor

    def __init__(
        self, mask: Tensor, block_size: int, head_dim: int, features: int, causal: bool = False, seed: int = 0
    ) -> None:
        # Before the base class makes the buffers, which need them.
        self.head_dim, self.features = check_int("head_dim", head_dim), check_int("features", features)
        self.seed = check_int("seed", seed, 0)
        super().__init__(mask, block_size, causal, "gather")

    def _make(self, device: torch.device) -> None:
        super()._make(device)
        far = ~self.grid
        self.register_buffer("far", (far.tril() if self.causal else far).to(device), persistent=False)
        d, f = self.head_dim, self.features
        generator = torch.Generator("cpu").manual_seed(self.seed)
        groups = -(-f // d)
        square = torch.randn(groups, d, d, generator=generator, device="cpu")
        lengths = torch.randn(groups, d, d, generator=generator, device="cpu").norm(dim=-1, keepdim=True)
        q, r = torch.linalg.qr(square)
        q = q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)  # uniformly distributed
        self.register_buffer("directions", (lengths * q).flatten(0, 1)[:f].to(device), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        check_tensor("q", q, 3)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(f"q and k must have one length, got {q.shape[-2]} and {k.shape[-2]}")
        if q.shape[-1] != self.head_dim:
            raise ValueError(f"q must have heads of size {self.head_dim}, got {q.shape[-1]}")
        self._check_length(q.shape[-2])
        region = autocast_dtype(q.device)
        with torch.autocast(q.device.type, enabled=False):  # exponents of rounded scores would be worth nothing
            half = (torch.float16, torch.bfloat16)
            wide = (t.float() if t.dtype in half else t for t in (q, k, v))
            return self._attend(*wide).to(q.dtype if region is None else region)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, block, d = q.shape[-2], self.block_size, q.shape[-1]
        g = -(-n // block)
        # Of the last block only the first positions may be there: the rest is filled up and not seen.
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, g * block - n)) for t in (q, k, v))
        there = (torch.arange(g * block, device=q.device) < n).view(g, block)
        q, k, v = (t.unflatten(-2, (g, block)) for t in (q * d**-0.25, k * d**-0.25, v))
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
        index = self.index[:g].clamp_max(g - 1)
        seen = (self.index[:g] < g)[..., None] & there[index]
        allowed = self.allowed[:g] & seen.flatten(1)[:, None]
        keys, values = (t[..., index, :, :].flatten(-3, -2) for t in (k, v))
        scores = (q @ keys.mT).masked_fill(~allowed, -torch.inf)  # (batch, heads, g, block, widest block)
        w = self.directions.to(q.dtype)
        log_q, log_k = (t @ w.mT - t.square().sum(-1, keepdim=True) / 2 for t in (q, k))  # (batch, heads, g, block, f)
        log_k = log_k.masked_fill(~there[..., None], -torch.inf)
        # Scales by features, which cancel in the result: of every block of keys, and of those far from a block of
        # queries. With the scale of a query, the largest term of its sums is 1: none vanishes or overflows.
        far = self.far[:g, :g, None]
        own = log_k.detach().amax(-2)  # (batch, heads, g, f)
        base = own.unsqueeze(-3).masked_fill(~far, -torch.inf).amax(-2)
        some = far.any(1)
        base = base.masked_fill(~some, 0)
        log_q = (log_q + base.unsqueeze(-2)).masked_fill(~some[..., None], -torch.inf)
        top = torch.maximum(scores.detach().amax(-1, keepdim=True), log_q.detach().amax(-1, keepdim=True))
        sums = torch.exp(log_k - own.unsqueeze(-2)).mT @ v / self.features  # (batch, heads, g, f, d + 1)
        mix = torch.exp((own.unsqueeze(-3) - base.unsqueeze(-2)).masked_fill(~far, -torch.inf))
        states = torch.einsum("...ghf,...hfe->...gfe", mix, sums)
        out = torch.exp(scores - top) @ values + torch.exp(log_q - top) @ states
        out = out[..., :-1] / out[..., -1:]
        return out.flatten(-3, -2)[..., :n, :]

    def extra_repr(self) -> str:
        return f"{super().extra_repr().removesuffix(', backend=' + repr(self.backend))}, features={self.features}"
