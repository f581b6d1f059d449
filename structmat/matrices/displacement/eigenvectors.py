"""Eigenvectors of shifts, which take matrices of low displacement rank from one kind to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix, matrix, static
from structmat.matrices.displacement._convolution import good_size
from structmat.matrices.displacement._solve import Eigenbasis, fourier_logdet
from structmat.matrices.displacement.operators import Shift, check_number


@matrix
class ShiftEigenvectors(StructuredMatrix):
    """The unitary U with ``Z_f U = U diag(values)`` for a corner of modulus 1; its transpose or inverse.

    ``U[i, k] = exp(i (2 pi k - arg f) i / n) / sqrt(n)``: a DFT matrix after a diagonal one. For f of another modulus U
    has the rows of that matrix times ``|f|^(-i/n)``, and is not unitary. No parameters; a product takes one FFT of n
    numbers. It has no tensors of its own, so that ``dtype`` and ``place`` say what it multiplies.

    Args:
        n: the size.
        f: the shift's corner, a Python number other than 0.
        transposed: the transpose instead.
        inverted: the inverse instead.
        dtype: complex64 or complex128, by default the complex one of torch's default dtype.
        place: the device.

    Raises:
        TypeError: if n is not an integer, f not a number, or dtype not complex.
        ValueError: if n < 1, or f is 0 or not finite.

    Example:
        >>> import torch
        >>> from structmat.matrices.displacement import Shift, ShiftEigenvectors
        >>> Z, U = Shift(4, f=-1.0, dtype=torch.complex128), ShiftEigenvectors(4, f=-1.0, dtype=torch.complex128)
        >>> torch.allclose((Z @ U).to_dense(), U.to_dense() * U.values())
        True
    """

    n: int = static()
    f: float | complex = static(default=1.0)
    transposed: bool = static(default=False)
    inverted: bool = static(default=False)
    dtype: torch.dtype = static(default=None)  # pyright: ignore[reportIncompatibleMethodOverride]
    place: str = static(default="cpu")

    def __post_init__(self) -> None:
        check_int("n", self.n)
        object.__setattr__(self, "f", check_number("f", self.f))
        if self.f == 0:
            raise ValueError("f must not be 0: that shift has one eigenvector only")
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.get_default_dtype().to_complex())
        if not self.dtype.is_complex:
            raise TypeError(f"dtype must be complex, got {self.dtype}")
        object.__setattr__(self, "place", str(torch.device(self.place)))

    @property
    def device(self) -> torch.device:
        return torch.device(self.place)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.n))

    def __repr__(self) -> str:
        marks = ", transposed=True" * self.transposed + ", inverted=True" * self.inverted
        return f"ShiftEigenvectors({self.n}, f={self.f}{marks})"

    def _with(self, **changes: object) -> ShiftEigenvectors:
        fields = {name: getattr(self, name) for name in self._static} | changes
        return self._rebuild((), tuple(fields[name] for name in self._static))

    def _to(self, device: object, dtype: torch.dtype | None) -> ShiftEigenvectors:
        if dtype is not None and not dtype.is_complex:
            raise TypeError(f"converting {self.dtype} to {dtype} would lose the imaginary part")
        place = self.place if device is None else str(torch.device(device))  # pyright: ignore[reportArgumentType]
        return self._with(place=place, dtype=self.dtype if dtype is None else dtype)

    def _basis(self) -> Eigenbasis:
        return Eigenbasis(Shift._rebuild((), (self.n, self.f, False, self.dtype, self.place)), self.device)

    def values(self) -> Tensor:
        """The eigenvalues of Z_f, in the order of the columns of U."""
        return self._basis().values.to(self.dtype)

    def conj(self) -> ShiftEigenvectors:
        # For |f| = 1 the inverse is the conjugate transpose; in general moduli are inverted with it.
        unit = Shift(1, self.f, dtype=self.dtype).f
        modulus = abs(unit)
        return self._with(f=unit / modulus**2, transposed=not self.transposed, inverted=not self.inverted)

    @property
    def mT(self) -> ShiftEigenvectors:
        return self._with(transposed=not self.transposed)

    def inverse(self) -> ShiftEigenvectors:
        """The inverse, at the same cost."""
        return self._with(inverted=not self.inverted)

    def _linear(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        phase = self._basis().phase.to(x.dtype)
        if self.inverted and not self.transposed:  # U^-1 = F D / sqrt(n)
            return torch.fft.fft(phase * x, norm="ortho")
        if self.inverted:
            return phase * torch.fft.fft(x, norm="ortho")
        if self.transposed:
            return torch.fft.ifft(x / phase, norm="ortho")
        return torch.fft.ifft(x, norm="ortho") / phase

    @property
    def flops(self) -> int:
        size = good_size(self.n) if self.n > 1 else 1
        return int(1.25 * size * max(1, size.bit_length() - 1)) + self.n

    @property
    def _solve_flops(self) -> int:
        return self.flops

    def _solve(self, b: Tensor) -> Tensor:
        return self.inverse()._linear(b.mT).mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        # Of U^-1 = F D / sqrt(n).
        log = fourier_logdet(self.n) - self.n / 2 * math.log(self.n) + self._basis().logdet
        log = log if self.inverted else -log
        phase = torch.tensor(complex(math.cos(log.imag), math.sin(log.imag)), dtype=self.dtype, device=self.device)
        return phase, torch.tensor(log.real, dtype=phase.real.dtype, device=self.device)
