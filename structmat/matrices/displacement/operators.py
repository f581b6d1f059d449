"""Displacement operators: the f-circulant shift. Diagonal operators are :class:`structmat.Diagonal`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix, matrix, static


def check_number(name: str, value: Any) -> float | complex:
    """A finite Python number; a complex one without an imaginary part becomes real."""
    if isinstance(value, bool) or not isinstance(value, (int, float, complex)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    number = complex(value)
    if not (math.isfinite(number.real) and math.isfinite(number.imag)):
        raise ValueError(f"{name} must be finite, got {value}")
    return number if number.imag else number.real


@matrix
class Shift(StructuredMatrix):
    """The f-circulant down-shift Z_f, ones below the diagonal and f in the top right corner; or its transpose.

    ``(Z_f x)[0] = f x[n - 1]`` and ``(Z_f x)[i] = x[i - 1]``; ``Z_f^n = f I``. Of size 1 it is [f]. No parameters; n
    multiplications at most. It has no tensors of its own, so that ``dtype`` and ``device`` say what it multiplies.

    Args:
        n: the size.
        f: the corner, a Python number.
        up: the transpose instead.
        dtype: floating point or complex, by default torch's default; complex for a complex f.
        device: the CPU by default.

    Raises:
        TypeError: if n is not an integer, f not a number, or the dtype real while f is complex.
        ValueError: if n < 1, or f is not finite.

    Example:
        >>> import torch
        >>> from structmat.matrices.displacement import Shift
        >>> Shift(3, f=-1.0) @ torch.tensor([1.0, 2.0, 3.0])
        tensor([-3.,  1.,  2.])
    """

    n: int = static()
    f: float | complex = static(default=1.0)
    up: bool = static(default=False)
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]
    place: str = static(default="cpu")

    def __post_init__(self) -> None:
        check_int("n", self.n)
        object.__setattr__(self, "f", check_number("f", self.f))
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.get_default_dtype())
        object.__setattr__(self, "place", str(torch.device(self.place)))
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise TypeError(f"dtype must be floating point or complex, got {self.dtype}")
        if isinstance(self.f, complex) and not self.dtype.is_complex:
            raise TypeError(f"dtype must be complex for f = {self.f}, got {self.dtype}")

    @property
    def device(self) -> torch.device:
        return torch.device(self.place)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.n))

    def _to(self, device: Any, dtype: torch.dtype | None) -> Self:
        if dtype is not None and self.dtype.is_complex and not dtype.is_complex:
            raise TypeError(f"converting {self.dtype} to {dtype} would lose the imaginary part")
        place = self.place if device is None else str(torch.device(device))
        return self._rebuild((), (self.n, self.f, self.up, self.dtype if dtype is None else dtype, place))

    def __repr__(self) -> str:
        return f"Shift({self.n}, f={self.f}{', up=True' if self.up else ''})"

    def conj(self) -> Self:
        f = self.f.conjugate() if isinstance(self.f, complex) else self.f
        return self._rebuild((), (self.n, f, self.up, self.dtype, self.place))

    @property
    def mT(self) -> Shift:
        return self._rebuild((), (self.n, self.f, not self.up, self.dtype, self.place))

    def _linear(self, x: Tensor) -> Tensor:
        if self.up:
            return torch.cat([x[..., 1:], self.f * x[..., :1]], -1)
        return torch.cat([self.f * x[..., -1:], x[..., :-1]], -1)

    @property
    def flops(self) -> int:
        return 1

    @property
    def _solve_flops(self) -> int:
        return 1

    def _solve(self, b: Tensor) -> Tensor:
        return self.inverse()._linear(b.mT).mT

    def inverse(self) -> Shift:
        """The inverse, a transposed shift of corner 1/f.

        Raises:
            ValueError: if f is zero.
        """
        if self.f == 0:
            raise ValueError("the shift with f = 0 is singular")
        return self._rebuild((), (self.n, 1 / self.f, not self.up, self.dtype, self.place))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        value = torch.as_tensor(self.f, dtype=self.dtype, device=self.device) * (-1) ** (self.n - 1)
        return value.sgn(), value.abs().log()

    def diagonal(self) -> Tensor:
        corner = [self.f] if self.n == 1 else [0.0] * self.n
        return torch.tensor(corner, dtype=self.dtype, device=self.device)
