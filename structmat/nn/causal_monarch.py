"""The causal Monarch convolution with learned bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from structmat._checks import check_int
from structmat.matrices.causal import CausalMonarch
from structmat.matrices.causal.causal_monarch import resolve_radix

#: The smallest entry of a softplus diagonal.
FLOOR = 0.1


class CausalMonarchConv(nn.Module):
    """y[t] of a kernel and an input up to time t, by polynomial products in learned bases (:class:`CausalMonarch`).

    It starts at identity blocks: of scheme "fourier" the plain causal convolution. Parameters are the strict triangles
    of the blocks from zero on, without those of the top digit's values that the map never reads (of "chebyshev" most
    of them). The diagonals are bounded away from zero, so that every step of training leaves the bases invertible:
    "unit" fixes them at 1, which makes all determinants 1; "softplus" learns them, 0.1 + 0.9 softplus(r) / log 2 from
    r = 0 on. ``layer.map().conditioning()`` reports condition numbers.

    Args:
        n: length of kernels and inputs.
        channels: a basis for each of so many channels, (*, channels, n) in and out; None for one that all share.
        radix: n_0, ..., n_{p-1}; see :meth:`CausalMonarch.identity`.
        order: p, where radix is None.
        scheme: "fourier" or "chebyshev".
        shared: one basis for M_0, M_1 and M_2 in place of three.
        diagonal: "unit" or "softplus".
        device: where the parameters are made.
        dtype: their dtype, floating point.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if the product of the radices is too small, scheme or diagonal is unknown, or dtype is complex.

    Example:
        >>> import torch, structmat
        >>> from structmat.nn import CausalMonarchConv
        >>> layer = CausalMonarchConv(100, channels=16, order=2)
        >>> u, k = torch.randn(4, 16, 100), torch.randn(16, 100)
        >>> plain = structmat.CausalToeplitz(k).matvec(u)
        >>> torch.allclose(layer(u, k), plain, atol=1e-4), sorted(layer.state_dict())[:2]
        (True, ['strict.0.0', 'strict.0.1'])
    """

    def __init__(
        self,
        n: int,
        channels: int | None = None,
        radix: Sequence[int] | None = None,
        order: int = 2,
        scheme: str = "fourier",
        shared: bool = False,
        diagonal: str = "unit",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if diagonal not in ("unit", "softplus"):
            raise ValueError(f"diagonal must be 'unit' or 'softplus', got {diagonal!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {dtype}")
        self.n, self.scheme, self.diagonal = check_int("n", n), scheme, diagonal
        self.channels = None if channels is None else check_int("channels", channels)
        self.radix = resolve_radix(n, radix, order, scheme)
        batch = () if channels is None else (channels,)
        parts = CausalMonarch.identity(n, self.radix, scheme=scheme, device="meta")
        # Per basis the values of the top digit that occur: the rest of its blocks is never read.
        places = [p.places for p in (parts.output, parts.kernel, parts.input)]
        self.places = [(0, places[0][1])] if shared else places

        def parameters(count: Callable[[int], int]) -> nn.ModuleList:
            made = nn.ModuleList(nn.ParameterList() for _ in self.places)
            for basis, (first, last) in zip(made, self.places, strict=True):
                for a, r in enumerate((*self.radix[:-1], last - first)):
                    shape = (*batch, math.prod(self.radix[:a]), count(r))
                    # Without entries there is no gradient, for which DDP would wait.
                    values = torch.zeros(shape, device=device, dtype=dtype)
                    basis.append(nn.Parameter(values, requires_grad=count(r) > 0))  # pyright: ignore
            return made

        self.strict = parameters(lambda r: r * (r - 1) // 2)
        if diagonal == "softplus":
            self.raw = parameters(lambda r: r)

    def reset_parameters(self) -> None:
        """Back to identity blocks."""
        for p in self.parameters():
            nn.init.zeros_(p)

    def _block(self, basis: int, a: int) -> Tensor:
        strict: Tensor = self.strict[basis][a]  # pyright: ignore[reportIndexIssue]
        top = a == len(self.radix) - 1
        first, last = self.places[basis] if top else (0, self.radix[a])
        r = last - first
        places = torch.tril if self.scheme == "fourier" else torch.triu
        mask = places(torch.ones(r, r, device=strict.device), -1 if self.scheme == "fourier" else 1)
        # Entry (i, j) of the strict triangle is the number of its ones before it, row by row.
        index = (mask.flatten().cumsum(0).long() - 1).clamp(min=0)
        if strict.shape[-1]:
            block = (strict.index_select(-1, index) * mask.flatten().to(strict.dtype)).unflatten(-1, (r, r))
        else:
            block = strict.new_zeros(*strict.shape[:-1], r, r)
        if self.diagonal == "unit":
            block = block + torch.eye(r, dtype=strict.dtype, device=strict.device)
        else:
            raw: Tensor = self.raw[basis][a]  # pyright: ignore[reportIndexIssue]
            block = block + torch.diag_embed(FLOOR + (1 - FLOOR) / math.log(2) * softplus(raw))
        after = self.radix[a] - last
        if not (first or after):
            return block
        # The values of the digit that do not occur: the identity.
        digit = torch.arange(self.radix[a], device=strict.device)
        rest = torch.diag(((digit < first) | (digit >= last)).to(strict.dtype))
        return pad(block, (first, after, first, after)) + rest

    def map(self) -> CausalMonarch:
        """The causal map of the parameters as they are now."""
        blocks = [[self._block(basis, a) for a in range(len(self.radix))] for basis in range(len(self.strict))]
        return CausalMonarch.from_blocks(blocks, self.n, self.scheme)

    def forward(self, u: Tensor, k: Tensor) -> Tensor:
        """Apply the map; see :meth:`CausalMonarch.conv`.

        Args:
            u: inputs, shape (*, n), or (*, channels, n).
            k: kernels, shape (*, n), or (*, channels, n); leading dimensions broadcast.

        Returns:
            Shape (*, n), or (*, channels, n).
        """
        return self.map().conv(k, u)

    def extra_repr(self) -> str:
        return (
            f"n={self.n}, channels={self.channels}, radix={self.radix}, scheme={self.scheme}, {self.diagonal} diagonal"
        )
