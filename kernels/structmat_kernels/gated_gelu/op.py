"""The gated unit as an operation: the kernel where it runs, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.gated_gelu import reference

#: Whether "auto" may choose the kernel. Benchmarks switch it off.
MEASURED = True


@torch.library.custom_op("structmat::gated_gelu", mutates_args=())
def _gated(x: Tensor) -> Tensor:
    if _backend.runs_kernels(x):
        from structmat_kernels.gated_gelu import kernel

        return kernel.forward(x)
    return reference.gated_gelu(x).contiguous()


@_gated.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("structmat::gated_gelu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, needs: list[bool]) -> list[Tensor]:
    if not needs[0]:
        return [x.new_empty(0)]
    if _backend.runs_kernels(x):
        from structmat_kernels.gated_gelu import kernel

        return [kernel.backward(grad, x)]
    return [torch.func.vjp(reference.gated_gelu, x)[1](grad)[0].contiguous()]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape if needs[0] else (0,))]


@_gated.register_vmap
def _(info: Any, in_dims: tuple, x: Tensor) -> tuple[Tensor, int]:
    return _gated(x.movedim(in_dims[0], 0)), 0


@_backward.register_vmap
def _(info: Any, in_dims: tuple, grad: Tensor, x: Tensor, needs: list[bool]) -> tuple[list[Tensor], list[int]]:
    pairs = zip((grad, x), in_dims, strict=False)
    grad, x = (t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0) for t, d in pairs)
    found = _backward(grad, x, needs)
    return found if needs[0] else [x.new_empty(info.batch_size, 0)], [0]


_differentiable = differentiable(_gated, _backward, reference.gated_gelu, 1)


def gated_gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu(a) * b`` for the halves a and b of the last dimension, by the exact gelu: a gated linear unit's middle.

    Nothing but x is kept for the backward pass. Inside a compiled region "auto" leaves it to the compiler, which fuses
    it with what is around.

    Args:
        x: shape (*batch, 2 h). The kernel takes bfloat16, float16 and float32, computes in float32 and rounds once.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        Shape (*batch, h), dtype of x. Cost: one read of x and one write.

    Raises:
        ValueError: if x has no last dimension of even size, or backend is unknown or cannot run.
        TypeError: if backend is "triton" and the dtype has no kernel.

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units"; Shazeer 2020, "GLU variants improve transformer".

    Example:
        >>> import torch
        >>> from structmat_kernels.gated_gelu import gated_gelu
        >>> gated_gelu(torch.tensor([0.0, 1.0, 5.0, 2.0]))
        tensor([0.0000, 1.6827])
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"gated_gelu: x must have shape (*batch, 2 h), got {tuple(x.shape)}")
    asked = backend == "triton" or _backend._DEFAULT == "triton"
    able = _backend.use_triton(backend, x)
    if not able or not (asked or (MEASURED and not torch.compiler.is_compiling())):
        return reference.gated_gelu(x)
    return _differentiable(x)
