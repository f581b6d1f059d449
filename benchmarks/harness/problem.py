"""What is measured: problems (one operation at one size) and the alternatives that solve each of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"

#: Names of the result files' dtypes; tf32 is float32 with `torch.set_float32_matmul_precision("high")`.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call has to do at least, whoever does it.

    Attributes:
        forward: elements that the forward pass reads and writes, each counted once: input, output and factors.
        backward: of the backward pass: the output's gradient, input and factors read, the latter's gradients written.
        flops: of the forward pass.
        backward_flops: of the backward pass, two products for one of the forward where there are factors.
        params: elements of the factors.
    """

    forward: int
    backward: int
    flops: int
    backward_flops: int
    params: int

    @staticmethod
    def linear(tokens: int, inputs: int, outputs: int, params: int, flops: int | None = None) -> Cost:
        """The cost of a linear layer that uses each of its parameters once a token, unless ``flops`` says otherwise."""
        flops = 2 * tokens * params if flops is None else flops
        forward = tokens * (inputs + outputs) + params
        backward = tokens * (2 * inputs + outputs) + 2 * params
        return Cost(forward, backward, flops, 2 * flops, params)

    @staticmethod
    def transform(tokens: int, size: int, flops: int) -> Cost:
        """The cost of a fixed linear map: its backward pass needs neither the input nor any factor."""
        return Cost(2 * tokens * size, 2 * tokens * size, flops, flops, 0)

    def moved(self, direction: str, itemsize: int) -> int:
        """Bytes of a call."""
        return itemsize * (self.forward + (self.backward if direction == TRAINING else 0))

    def operations(self, direction: str) -> int:
        """Floating-point operations of a call."""
        return self.flops + (self.backward_flops if direction == TRAINING else 0)

    def floor_us(self, direction: str, itemsize: int, copy_gb_s: float, tflop_s: float) -> tuple[float, str]:
        """The least time, and what sets it: "memory" or "arithmetic"."""
        memory = self.moved(direction, itemsize) / copy_gb_s * 1e-3
        arithmetic = self.operations(direction) / tflop_s * 1e-6
        return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


#: Factors (the tensors to differentiate by) and the call that uses them.
Built = tuple[list[Tensor], Callable[[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to solve a problem.

    Attributes:
        name: what a reader sees, the same across sizes: plots and tables join on it.
        kind: "dense", "ours", "reference", "compile", "low rank", "copy" or "peer".
        cost: what the call has to do at least; None where a floor says nothing (a dense product beside a transform).
        build: makes factors and call from a seed; called once for every set of operands.
        exact: the same product in float64, called with x and the factors, all float64; None checks nothing.
        missing: why it cannot run here; nothing is built then.
        forward_only: the call has no derivative.
    """

    name: str
    kind: str
    cost: Cost | None
    build: Callable[[int], Built] | None = None
    exact: Callable[..., Tensor] | None = None
    missing: str | None = None
    forward_only: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """One operation at one size, in one dtype and direction, and the ways to solve it.

    Attributes:
        operation: "linear", "decode", "hadamard", "butterfly", "block sparse 64", ...
        inputs: features of the input.
        outputs: features of the output.
        tokens: rows of the input.
        dtype: a key of DTYPES.
        direction: FORWARD or TRAINING.
        alternatives: makes the alternatives for a device. Called in the process that measures.
        eager: whether to time the plain call too, CPU overhead included.
        slow: whether it compiles for long, and is the first to be left out when time is short.
    """

    operation: str
    inputs: int
    outputs: int
    tokens: int
    dtype: str
    direction: str
    alternatives: Callable[[Problem, torch.device], list[Alternative]]
    eager: bool = False
    slow: bool = False

    @property
    def key(self) -> str:
        """A name that no other problem of a run has."""
        return f"{self.operation}/{self.inputs}x{self.outputs}/T{self.tokens}/{self.dtype}/{self.direction}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """float32 products in tf32 for the dtype "tf32", in IEEE float32 for all others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seeded(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function that draws normal tensors of a shape and a standard deviation, the same ones for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(std).to(dtype)

    return draw
