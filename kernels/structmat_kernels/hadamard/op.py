"""The Walsh-Hadamard transform as an operation: the kernel where it runs, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from structmat_kernels import backend as _backend
from structmat_kernels.hadamard import reference

#: The largest size of the kernel; larger ones run the reference.
LARGEST = 32768


@torch.library.custom_op("structmat::hadamard", mutates_args=())
def _hadamard(x: Tensor, scale: float) -> Tensor:
    if _backend.runs_kernels(x) and x.shape[-1] <= LARGEST:
        from structmat_kernels.hadamard import kernel

        return kernel.hadamard(x.reshape(-1, x.shape[-1]), scale).reshape(x.shape)
    y = reference.hadamard(x, scale).contiguous()
    return y.clone() if x.shape[-1] == 1 else y  # an op's output is never its input


@_hadamard.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@_hadamard.register_vmap
def _(info: Any, in_dims: tuple, x: Tensor, scale: float) -> tuple[Tensor, int]:
    return _hadamard(x.movedim(in_dims[0], 0), scale), 0


class _Traced(Function):
    """H is symmetric: the transform is its own adjoint, so every derivative is the transform again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return _hadamard(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply(grads[0], ctx.scale), None


class _Hadamard(_Traced):
    """With forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Hadamard.apply(tangents[0], ctx.scale)


def _apply(x: Tensor, scale: float) -> Tensor:
    return (_Traced if torch.compiler.is_compiling() else _Hadamard).apply(x, scale)


def hadamard(x: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """``scale * H x`` over the last dimension, H the Hadamard matrix in Sylvester's (natural) order.

    ``H[i, j] = (-1)^popcount(i & j)``; H is symmetric and ``H H = n I``.

    Args:
        x: shape (..., n), n a power of two. The kernel takes bfloat16, float16 and float32 up to n = 32768 and
            accumulates in float32; everything else is plain PyTorch.
        scale: factor of the result; 1 / sqrt(n) makes the transform orthogonal.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        The shape and dtype of x. Cost: n log2(n) operations and one read and one write of a row.

    Raises:
        ValueError: if n is not a power of two, or x has no dimension.
    """
    if x.ndim == 0:
        raise ValueError("hadamard: x must have at least one dimension, got a scalar")
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        below = 1 << max(n.bit_length() - 1, 0)
        raise ValueError(
            f"hadamard: x's last dimension must be a power of two (1, 2, 4, 8, ...), got {n}; "
            f"the nearest sizes are {below} and {2 * below}"
        )
    if not _backend.use_triton(backend, x):
        return reference.hadamard(x, scale)
    if n > LARGEST:
        if backend == "triton":
            raise ValueError(f"hadamard: the kernel takes sizes up to {LARGEST}, got {n}; use another backend")
        return reference.hadamard(x, scale)
    return _apply(x, float(scale))
