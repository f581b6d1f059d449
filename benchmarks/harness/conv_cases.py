"""Convolutions to be measured: cases, what each has to move and to compute at least, and the ways to compute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.problem import DTYPES, FORWARD, TRAINING, seeded
from structmat_kernels import backend
from structmat_kernels.fft_conv import fft_conv
from structmat_kernels.fft_conv.op import LONGEST
from structmat_kernels.short_conv import short_conv

#: Taps of the short convolutions; those of the long ones are as many as the input has times.
TAPS = 3
#: Tokens in the batches of the layers.
TOKENS = 2**15
#: The longest sequences that are also convolved by dense matrices.
DENSE = 1024
NEED_CUDA = "left out: the kernels need CUDA"
CHANNELS_LAST, GATES = "channels last", "gates"
#: Names of operands of shape (channels, ...); the others have shape (batch, channels, length).
BY_CHANNEL = ("k", "weight", "bias")

Tensors = dict[str, Tensor]
#: Operands by name, which are the ones to differentiate by; the output's gradient; the function of the operands.
Built = tuple[Tensors, Tensor | None, Callable[..., Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation ("long", "short" or "layer") at one size, in one dtype and direction."""

    operation: str
    batch: int
    channels: int
    length: int
    dtype: str = "bf16"
    direction: str = FORWARD
    variant: str = ""

    @property
    def key(self) -> str:
        """A name that no other case of a run has."""
        size = f"{self.operation}/{self.batch}x{self.channels}x{self.length}/{self.dtype}/{self.direction}"
        return f"{size}/{self.variant}" if self.variant else size

    @property
    def training(self) -> bool:
        return self.direction == TRAINING

    @property
    def bytes_moved(self) -> int | None:
        """Every operand read once and every result written once, forwards and backwards; None of layers."""
        if self.operation == "layer":
            return None
        size = DTYPES[self.dtype].itemsize
        rows = size * self.batch * self.channels * self.length
        gates = 2 if self.variant == GATES else 0
        taps = 4 * self.channels * self.length if self.operation == "long" else size * self.channels * (TAPS + 1)
        forward, backward = (2 + gates) * rows + taps, (3 + 2 * gates) * rows + 2 * taps
        return forward + (backward if self.training else 0)

    @property
    def operations(self) -> int | None:
        """Operations of the kernels' products, where there are kernels and products.

        A stage of N of M points multiplies M / N rows of 2 N numbers by a 2 N x 2 N matrix: 8 M N operations. In the
        first stage of a forward transform half the rows are zeros and left out; in the last one of an inverse half the
        columns are not wanted, and left out in float32: 8 M (N1 / 2 + N2 + N3), N3 absent in order 2, else a whole one,
        of N1. It holds a pair of sequences. Forwards there are two; backwards, in float32, of the gradients, back to
        those of u, and of u, and a fourth, y again, for the gate behind; in half precision two each for the gradients
        of u, of the filter and of that gate. Transforms of filters, one a channel and pass, are whole. Longer inputs go
        block by block: backwards the gradients and u are transformed once, and every block of a filter twice.
        """
        if self.operation != "long" or self.length > LONGEST:
            return None
        from structmat_kernels.fft_conv import half, kernel, long, transforms

        short = DTYPES[self.dtype].itemsize == 2
        if self.length > (half if short else kernel).LONGEST:
            n1, n2, n3 = long.RADICES[short]
            blocks = -(-self.length // (n1 * n2 * n3 // 2))
            some, whole = (8 * n1 * n2 * n3 * (n + n2 + n3) for n in (n1 // 2, n1))
            back, more = whole if short else some, self.training * (1 + (self.variant == GATES))
            pairs = -(-self.batch // 2) * ((1 + 2 * self.training) * some + (1 + more) * back)
            return self.channels * blocks * (pairs + (1 + 2 * self.training) * whole)
        points = (half if short else kernel).points_of(self.length)
        n1, n2, n3 = (half if short else transforms).RADICES[points]
        others = n2 + (n3 if n3 > 1 else 0)
        some, whole = 8 * points * (n1 // 2 + others), 8 * points * (n1 + others)
        gates = self.variant == GATES
        if not short:
            transforms_, filters = (2 + 3 + gates, 3) if self.training else (2, 1)
            return self.channels * (-(-self.batch // 2) * transforms_ * some + filters * whole)
        ahead, back, filters = (2 + 2 + gates, 1 + 1 + gates, 3 + gates) if self.training else (1, 1, 1)
        return self.channels * (-(-self.batch // 2) * (ahead * some + back * whole) + filters * whole)


def cases(smoke: bool = False) -> list[Case]:
    """All cases, the most telling ones first."""
    both = (FORWARD, TRAINING)
    if smoke:
        found = [Case("long", *size, dtype, d) for size, dtype in SMOKE for d in both]
        found += [Case("long", 3, 2, 37, "fp32", d, GATES) for d in both]
        found += [Case("short", 2, 6, 33, "fp32", d, v) for v in ("", CHANNELS_LAST) for d in both]
        return [*found, *(Case("layer", 3, 64, 24, "bf16", d) for d in both)]
    found = [Case("long", 64, 768, n, "bf16", d) for d in both for n in (4096, 1024)]
    found += [Case("short", 64, 2304, n, "bf16", d, v) for d in both for v in ("", CHANNELS_LAST) for n in (512, 4096)]
    found += [Case("layer", TOKENS // n, 768, n, "bf16", d) for d in both for n in (4096, 512, 2048, 1024, 8192, 32768)]
    sizes = [(64, 768, 256), (64, 768, 512), (64, 768, 1000), (8, 768, 1024), (1, 768, 4096)]
    found += [Case("long", *size, "bf16", d) for d in both for size in sizes]
    found += [Case("long", 64, 768, n, "bf16", d, GATES) for d in both for n in (1024, 4096)]
    found += [Case("long", 64, 768, n, "fp32", d) for d in both for n in (1024, 4096)]
    longer = ((16, 768, 16384), (4, 768, 65536), (8, 768, 32768))
    found += [Case("long", *size, "bf16", d) for d in both for size in longer]
    # The least and the largest number of sequences, and lengths beyond what a page of memory or the kernels take.
    others = ((1, 64, 4096), (128, 768, 512), (1, 768, 262144), (1, 64, 1048576))
    return [
        *found,
        *(Case("long", *size, "bf16") for size in others),
        Case("long", 16, 768, 16384, "bf16", variant=GATES),
    ]


SMOKE = [((3, 2, 16), "bf16"), ((2, 3, 37), "fp32"), ((1, 1, LONGEST + 1), "bf16")]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to compute a case.

    Attributes:
        name: what a reader sees.
        build: makes the operands of the i-th set, and the call.
        ours: whether it runs the kernels that are measured here.
        missing: why it cannot run; nothing is built then.
        check: cells about the errors, of the output "y" and of the gradients by their operands' names.
    """

    name: str
    build: Callable[[int], Built]
    ours: bool = False
    missing: str = ""
    check: Callable[[Tensors], dict[str, Any]] | None = None


def alternatives(case: Case, device: torch.device, compiled: bool) -> list[Alternative]:
    """The ways to compute a case; the first one is what the others are compared with, the kernels are the last."""
    if case.operation == "layer":
        from harness.conv_layers import layers  # needs transformers

        return layers(case, device)
    made = Operands(case, device)
    why = "" if device.type == "cuda" or backend.INTERPRETED else NEED_CUDA
    if case.operation == "short":
        options: dict[str, Any] = {"check": made.check}
        ours = Alternative("ours", made.calling(by_kernel_short), True, why, **options)
        return [Alternative("F.conv1d", made.calling(by_conv1d), **options), ours]
    found = [Alternative("torch.fft", made.calling(by_fft), check=made.check)]
    if case.length <= DENSE and case.dtype == "bf16":
        found.append(Alternative("dense Toeplitz", made.dense, check=made.check))
    if compiled:
        function = torch.compile(by_fft, dynamic=False)
        found.append(Alternative("torch.fft, compiled", made.calling(function), check=made.check))
    why = "left out: longer than the kernels take" if case.length > LONGEST else why
    return [*found, Alternative("ours", made.calling(by_kernel), True, why, check=made.check)]


# ---------------------------------------------------------------- the ways
def by_fft(u: Tensor, k: Tensor, pre: Tensor | None = None, post: Tensor | None = None) -> Tensor:
    """The causal convolution as most write it: real FFTs in float32 at least, gates outside."""
    n, wide = u.shape[-1], torch.promote_types(u.dtype, torch.float32)
    x = u if pre is None else u * pre
    spectrum = torch.fft.rfft(x.to(wide), n=2 * n) * torch.fft.rfft(k, n=2 * n)
    y = torch.fft.irfft(spectrum, n=2 * n)[..., :n].to(u.dtype)
    return y if post is None else y * post


def by_kernel(u: Tensor, k: Tensor, pre: Tensor | None = None, post: Tensor | None = None) -> Tensor:
    return fft_conv(u, k, None, None, pre, post, backend="triton")


def by_matrix(u: Tensor, matrix: Tensor, pre: Tensor | None = None, post: Tensor | None = None) -> Tensor:
    """A dense product a channel; its output has the batch innermost, a copy to u's order is not counted."""
    x = u if pre is None else u * pre
    y = torch.bmm(matrix, x.permute(1, 2, 0)).permute(2, 0, 1)
    return y if post is None else y * post


def toeplitz(k: Tensor) -> Tensor:
    """The lower triangular matrices (channels, n, n) of causal filters (channels, n)."""
    n = k.shape[-1]
    return F.pad(k.flip(-1), (0, n - 1)).unfold(-1, n, 1).flip(-2)


def by_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The causal depthwise convolution as most write it."""
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return y[..., : x.shape[-1]]


def by_kernel_short(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return short_conv(x, weight, bias, backend="triton")


# ---------------------------------------------------------------- operands and errors
class Operands:
    """Operands of a long or a short convolution, shared by all ways, and results in float64 of a few channels."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self._sets: dict[int, tuple[Tensors, Tensor | None]] = {}
        self._wanted: Tensors = {}

    def __getitem__(self, i: int) -> tuple[Tensors, Tensor | None]:
        """Set number i: operands by name, and the output's gradient in training."""
        if i not in self._sets:
            case = self.case
            draw = seeded(1000 + i, self.device, DTYPES[case.dtype])
            size = (case.batch, case.channels, case.length)
            if case.operation == "short":
                last = case.variant == CHANNELS_LAST
                x = draw(case.batch, case.length, case.channels).mT if last else draw(*size)
                found = {"x": x, "weight": draw(case.channels, TAPS), "bias": draw(case.channels)}
            else:
                taps = seeded(2000 + i, self.device, torch.float32)(*size[1:], std=case.length**-0.5)
                found = {"u": draw(*size), "k": taps}
                found |= {"pre": draw(*size), "post": draw(*size)} if case.variant == GATES else {}
            found = {name: t.requires_grad_(case.training) for name, t in found.items()}
            self._sets[i] = found, draw(*size) if case.training else None
        return self._sets[i]

    def calling(self, function: Callable[..., Tensor]) -> Callable[[int], Built]:
        """What builds calls of a function of all operands."""
        return lambda i: (*self[i], function)

    def dense(self, i: int) -> Built:
        """Matrices, made beforehand, in place of taps; the gradient is theirs too."""
        operands, grad = self[i]
        matrix = toeplitz(operands["k"].detach().to(operands["u"].dtype)).requires_grad_(self.case.training)
        named = {("matrix" if name == "k" else name): matrix if name == "k" else t for name, t in operands.items()}
        return named, grad, by_matrix

    def check(self, found: Tensors) -> dict[str, Any]:
        """Relative errors against float64 of the output, of the worst gradient, and of the output rounded alone."""
        errors = self.errors(found)
        cells: dict[str, Any] = {"error": f"{errors.pop('y'):.2e}"}
        exact = self._wanted["y"]
        cells["rounding"] = f"{relative(exact.to(DTYPES[self.case.dtype]), exact):.2e}"
        return cells | ({"error_grads": f"{max(errors.values()):.2e}"} if errors else {})

    def errors(self, found: Tensors) -> dict[str, float]:
        """Relative errors of results of the first set, by their names; those of other names are left out."""
        if not self._wanted:
            operands, grad = self[0]
            doubles = {name: self._part(name, t.detach()).double() for name, t in operands.items()}
            doubles = {name: t.requires_grad_(self.case.training) for name, t in doubles.items()}
            with torch.set_grad_enabled(self.case.training):
                y = (by_conv1d if self.case.operation == "short" else by_fft)(*doubles.values())
            self._wanted = {"y": y.detach()}
            if grad is not None:
                gradients = torch.autograd.grad(y, list(doubles.values()), self._part("y", grad).double())
                self._wanted |= dict(zip(doubles, gradients, strict=True))
        known = {name: t for name, t in found.items() if name in self._wanted}
        return {name: relative(self._part(name, t), self._wanted[name]) for name, t in known.items()}

    def _part(self, name: str, t: Tensor) -> Tensor:
        """The first, a middle and the last channel."""
        some = sorted({0, self.case.channels // 2, self.case.channels - 1})
        return t[some] if name in BY_CHANNEL else t[:, some]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative Frobenius error; NaN is infinite."""
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)}, the reference has {tuple(wanted.shape)}")
    error = (torch.linalg.vector_norm(found.detach().double() - wanted) / torch.linalg.vector_norm(wanted)).item()
    return error if error == error else float("inf")
