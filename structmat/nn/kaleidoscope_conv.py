"""A two-dimensional convolution whose Fourier transforms are learnable kaleidoscope matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structmat._autocast import autocast_dtype
from structmat._checks import check_int, check_tensor
from structmat.kaleidoscopes._build import kaleidoscope, kernel
from structmat.matrices._kaleidoscope_radices import admissible_size
from structmat.matrices.kaleidoscope import Kaleidoscope
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.transforms._build import choice, turns


class KaleidoscopeConv2d(nn.Module):
    """The operation ``Re K2[(K1 x) (Kd w)]`` with three learnable kaleidoscopes, at the start exactly ``nn.Conv2d``.

    K1, Kd and K2 are a pair of complex kaleidoscopes of width 1 each, one along the rows and one along the columns of
    an image. They start as the Fourier transforms of the image and of the kernel and as the inverse one, so that the
    layer starts as a convolution and learns what to be instead. All channels share them; the kernel is real, of the
    shape and the distribution of ``nn.Conv2d``'s.

    A transform of size S costs O(S log S) numbers, and as many operations for every row and column of every channel;
    the channels are mixed by in_channels * out_channels * S^2 complex multiplications an image.

    Source: Roberts, Khodak, Dao, Li, Re and Talwalkar 2021, "Rethinking neural operations for diverse tasks"
    (XD-operations); Dao et al. 2020 for the matrices.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernel, one integer or two.
        input_size: rows and columns of the input, one integer or two.
        padding: on every side, one integer or (rows, columns).
        bias: whether there is a bias.
        padding_mode: "zeros", or "circular" with at most (kernel_size - 1) / 2 of padding.
        device: where the parameters are made.
        dtype: floating point, of the kernel, the bias and the real and imaginary parts of the factors.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, the kernel exceeds the padded input, padding_mode is unknown or dtype is
            not real.

    Shape:
        ``(N, in_channels, *input_size)`` to ``(N, out_channels, *output_size)``, both also without N, where output_size
        is input_size + 2 padding - kernel_size + 1.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.KaleidoscopeConv2d(3, 8, 3, (10, 12), padding=1)
        >>> x = torch.randn(2, 3, 10, 12)
        >>> expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        >>> torch.allclose(layer(x), expected, atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        input_size: int | Sequence[int],
        padding: int | Sequence[int] = 0,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be real floating point, got {dtype}: images are real, transforms are complex")
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.kernel_size = _two("kernel_size", kernel_size, 1)
        self.input_size = _two("input_size", input_size, 1)
        self.padding = _two("padding", padding, 0)
        self.padding_mode = choice("padding_mode", padding_mode, ("zeros", "circular"))
        sizes = list(zip(self.input_size, self.kernel_size, self.padding, strict=True))
        self.output_size = tuple(n + 2 * p - k + 1 for n, k, p in sizes)
        if min(self.output_size) < 1:
            raise ValueError(f"kernel_size must be at most input_size + 2 padding, got {self.kernel_size} and {sizes}")
        if padding_mode == "circular" and any(2 * p > k - 1 or k > n for n, k, p in sizes):
            raise ValueError(
                f'padding_mode="circular" needs padding <= (kernel_size - 1) / 2 and kernel_size <= input_size, got '
                f"padding {self.padding}, kernel_size {self.kernel_size} and input_size {self.input_size}"
            )
        self.input_transform, self.kernel_transform, self.output_transform = self._start(dtype, device)
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self._reset()

    def _start(self, dtype: torch.dtype, device: Any) -> list[nn.ModuleList]:
        sizes = zip(self.input_size, self.kernel_size, self.padding, strict=True)
        axes = [_transforms(n, k, p, self.padding_mode == "circular", dtype, device) for n, k, p in sizes]
        return [nn.ModuleList(pair) for pair in zip(*axes, strict=True)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fourier transforms again, and a new kernel and bias."""
        fresh = self._start(self.weight.dtype, self.weight.device)
        for old, new in zip((self.input_transform, self.kernel_transform, self.output_transform), fresh, strict=True):
            for p, q in zip(old.parameters(), new.parameters(), strict=True):
                p.copy_(q)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for p in (self.weight, self.bias):
            if p is not None:
                p.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operation to x of shape ``(N, in_channels, *input_size)``, or without N."""
        check_tensor("x", x)
        if x.ndim not in (3, 4) or x.shape[-3:] != (self.in_channels, *self.input_size):
            wanted = (self.in_channels, *self.input_size)
            raise ValueError(f"x must have shape {wanted} or {('N', *wanted)}, got {tuple(x.shape)}")
        region = autocast_dtype(x.device)
        if x.dtype != self.weight.dtype and region is None:
            raise TypeError(f"x has dtype {x.dtype} but the layer has {self.weight.dtype}; convert one with .to(dtype)")
        images = _both(self.input_transform, x if x.ndim == 4 else x.unsqueeze(0))  # (N, in, columns, rows)
        filters = _both(self.kernel_transform, self.weight)
        # One product of matrices for every frequency.
        spectrum = images.permute(2, 3, 0, 1) @ filters.permute(2, 3, 1, 0)
        y = _both(self.output_transform, spectrum.permute(2, 3, 1, 0)).real.mT
        y = y if self.bias is None else y + self.bias[:, None, None]
        return (y if x.ndim == 4 else y.squeeze(0)).to(x.dtype if region is None else region)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, input_size={self.input_size}, "
            f"padding={self.padding}, bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


def _two(name: str, value: Any, low: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one integer or (rows, columns), got {value!r}")
    return check_int(name, pair[0], low), check_int(name, pair[1], low)


class _Transform(nn.Module):
    """A complex kaleidoscope whose parameters are real and imaginary parts: a change of the dtype keeps both."""

    def __init__(self, K: Kaleidoscope, dtype: torch.dtype) -> None:
        super().__init__()
        parts = (torch.view_as_real(f.values).to(dtype) for f in K.factors)
        self.factors = nn.ParameterList(map(nn.Parameter, parts))
        self._context = K.nrows, K.ncols

    def forward(self) -> Kaleidoscope:
        """The matrix, in complex64 where the parameters are of half precision."""
        parts = (p if p.dtype == torch.float64 else p.float() for p in self.factors)
        return Kaleidoscope._rebuild((tuple(KroneckerSparse(torch.view_as_complex(p)) for p in parts),), self._context)

    def extra_repr(self) -> str:
        return f"{self._context}"


def _both(transforms: nn.ModuleList, x: Tensor) -> Tensor:
    """Transform (..., rows, columns) along both, to (..., columns', rows')."""
    rows, columns = (t() for t in transforms)
    with torch.autocast(x.device.type, enabled=False):  # complex numbers have no lower precision
        return rows.linear(columns.linear(x.to(columns.dtype)).mT)


def _transforms(
    n: int, k: int, p: int, circular: bool, dtype: torch.dtype, device: Any
) -> tuple[_Transform, _Transform, _Transform]:
    """The transforms of the input, the kernel and the output along an axis.

    ``y[i] = sum_j x[i + j - p] w[j]`` modulo a size that holds all of it: outputs meet entries -p to n + p - 1.
    """
    out = n + 2 * p - k + 1
    size = n if circular else admissible_size(max(n + p, out, k))
    f = torch.arange(size)
    inverse = torch.full((out,), 1 / size, dtype=torch.complex128)
    first = kaleidoscope(kernel(size, size, n), torch.complex128, device, size, n)
    second = kaleidoscope(kernel(size, size, k, turns(-f * p, size), conj=True), torch.complex128, device, size, k)
    third = kaleidoscope(kernel(size, out, size, inverse, conj=True), torch.complex128, device, out, size)
    return _Transform(first, dtype), _Transform(second, dtype), _Transform(third, dtype)
