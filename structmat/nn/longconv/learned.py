"""Convolutions by learned butterfly transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.matrices import Butterfly, KroneckerSparse
from structmat.matrices.displacement._convolution import working
from structmat.nn.longconv._monarch import balanced_radices, product, stage_tables
from structmat.nn.longconv.functional import check_operands, complex_of, cyclic_kernel, gated


class LearnedTransforms(nn.Module):
    """``x, k -> S ((T x) * (T k))``: a cyclic convolution whose Fourier transform and inverse are learned butterflies.

    T and S have ``order`` Kronecker-sparse factors each, complex numbers that are stored as pairs in a last dimension
    of 2 (so that casts, optimizers and communication treat them as real numbers). Initially T is the DFT up to the
    order of the frequencies, S its inverse, and the result is the cyclic convolution. After training it is
    some bilinear map that is not causal.

    Args:
        length: of the longest input; transforms have 2 length - 1 points at least.
        order: number of factors.
        device: where the parameters are made.
        dtype: their dtype, real.
    """

    def __init__(self, length: int, order: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.length = length
        self.radices = balanced_radices(2 * length - 1, order)
        self.size = product(self.radices)
        shapes, before = [], 1
        for n in self.radices:
            shapes.append((before, n, n, self.size // (before * n), 2))
            before *= n
        factory: Any = {"device": device, "dtype": dtype}
        self.forward_factors = nn.ParameterList([nn.Parameter(torch.empty(shape, **factory)) for shape in shapes])
        self.inverse_factors = nn.ParameterList([nn.Parameter(torch.empty(s, **factory)) for s in reversed(shapes)])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make them the DFT and its inverse."""
        first = self.forward_factors[0]
        device = torch.device("cpu") if first.device.type == "meta" else first.device
        tables = stage_tables(self.radices, torch.complex128, device)
        for (block, twiddle), n, values, inverse in zip(
            tables, self.radices, self.forward_factors, reversed(list(self.inverse_factors)), strict=True
        ):
            exact = block.unsqueeze(-1) * twiddle.unsqueeze(1)  # (n, n, rest)
            values.copy_(torch.view_as_real(exact).expand(values.shape))
            exact = exact.transpose(0, 1).conj().resolve_conj() / n
            inverse.copy_(torch.view_as_real(exact).expand(inverse.shape))

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The product for x and kernel of ``size`` points each, complex."""
        T, S = _value(self.forward_factors), _value(self.inverse_factors)
        return S.linear(T.linear(x) * T.linear(kernel))

    def convolution(
        self,
        u: Tensor,
        k: Tensor,
        k_rev: Tensor | None,
        skip: Tensor | None,
        pre_gate: Tensor | None,
        post_gate: Tensor | None,
    ) -> Tensor:
        """:func:`long_convolution` by these transforms, of the real part if everything is real."""
        check_operands(u, k, k_rev, skip, pre_gate, post_gate)
        length = u.shape[-1]
        if length > self.length:
            raise ValueError(f"u must be at most {self.length} long for the learned transforms, got {length}")

        def convolve(x: Tensor) -> Tensor:
            _, kernel = cyclic_kernel(k, k_rev, length, x.dtype)
            dtype = complex_of(x.dtype)
            padded = F.pad(x, (0, self.size - length)).to(dtype)
            y = self(padded, kernel(self.size).to(dtype))[..., :length]
            return y if x.is_complex() else y.real

        return gated(u, convolve, k, k_rev, skip, pre_gate, post_gate)

    def extra_repr(self) -> str:
        return f"size={self.size}, radices={self.radices}"


def _value(factors: nn.ParameterList) -> Butterfly:
    """The last factor applied stands first in a product."""
    values = [torch.view_as_complex(working(f)) for f in factors]
    return Butterfly(tuple(KroneckerSparse(v) for v in reversed(values)))
