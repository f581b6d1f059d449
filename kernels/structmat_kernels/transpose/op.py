"""The transposing copy as an operation: the kernel where it runs, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import is_plain
from structmat_kernels.transpose import reference

#: Whether "auto" may choose the kernel. Benchmarks switch it off.
MEASURED = True
#: The fewest entries for which "auto" chooses the kernel: below, a copy takes less time than its launch.
FEWEST = 1 << 18


def _none(x: Tensor) -> Tensor:
    """What stands for no second operand."""
    return x.new_empty(0)


def _copy(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """New memory with the result. Here, not before, batches become one: gradients of views would share memory."""
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    if _backend.runs_kernels(x):
        from structmat_kernels.transpose import kernel

        batch = x.shape[:-2].numel()
        x, *more = (t.reshape(batch, *t.shape[-2:]) for t in (x, other) if t is not None)
        return kernel.transpose(x, more[0] if more else None, dtype).view(shape)
    total = x if other is None else x + other
    return torch.empty(shape, dtype=dtype, device=x.device).copy_(total.mT)


@torch.library.custom_op("structmat::transpose", mutates_args=())
def _transpose(x: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    return _copy(x, None if other.ndim == 1 else other, dtype)


@_transpose.register_fake
def _(x: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), dtype=dtype)


@_transpose.register_vmap
def _(info: Any, in_dims: tuple, x: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    def full(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    absent = other.ndim == (1 if in_dims[1] is None else 2)
    return _transpose(full(x, in_dims[0]), _none(other) if absent else full(other, in_dims[1]), dtype), 0


# torch.compile cannot guard on the object that defines the operator.
_operator = getattr(_transpose, "_opoverload", _transpose)


class _Traced(Function):
    """Every derivative is a transposing copy again, of one operand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        return _operator(x, other, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, other, dtype = inputs
        ctx.dtype, ctx.out, ctx.add = x.dtype, dtype, other.ndim > 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        g = _call(grads[0], None, ctx.dtype)
        return g, g if ctx.add else None, None


class _Eager(_Traced):
    """With forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        some = [t for t in tangents[: 1 + ctx.add] if t is not None]
        return _call(some[0], some[1] if len(some) > 1 else None, ctx.out)


class _Plain(Function):
    """For eager calls that nothing but autograd looks at: without the operator and its cost on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.add = x.dtype, other is not None
        return _copy(x, other, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        g = _call(grads[0], None, ctx.dtype)
        return g, g if ctx.add else None, None


def _call(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    needed = torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad))
    if is_plain((x, other)):
        return _Plain.apply(x, other, dtype) if needed else _copy(x, other, dtype)
    some = _none(x) if other is None else other
    if not torch.compiler.is_compiling():
        return _Eager.apply(x, some, dtype)
    # Some versions of dynamo do not trace a Function where gradients are off.
    return _Traced.apply(x, some, dtype) if needed else _operator(x, some, dtype)


def supported(x: Tensor, dtype: torch.dtype | None = None, *, backend: str | None = None) -> bool:
    """Whether :func:`transpose` of x runs the kernel: "auto" takes it on CUDA from 262144 entries on.

    Args:
        x: shape (*batch, rows, columns).
        dtype: of the result, None for that of x.
        backend: "auto", "torch" or "triton"; None is the default.
    """
    able = _backend.use_triton(backend, x) and (dtype is None or dtype in _backend.DTYPES)
    asked = backend == "triton" or _backend._DEFAULT == "triton"
    return able and (asked or (MEASURED and x.numel() >= FEWEST))


def transpose(
    x: Tensor, other: Tensor | None = None, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """The transposed matrices of ``x + other``, contiguous: ``(x + other).mT.to(dtype).contiguous()`` in one pass.

    Reads and writes are 16 bytes wide where rows and columns are multiples of 8 (4 of float32), in whatever dimension x
    is contiguous. The sum is rounded to the dtype of x. The gradient is a transposing copy too; nothing is kept for it.

    Args:
        x: shape (*batch, rows, columns). The kernel takes bfloat16, float16 and float32.
        other: shape, dtype and device of x, or None for nothing to add.
        dtype: of the result, None for that of x.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        Shape (*batch, columns, rows). Cost: one read of the operands and one write; nothing, and memory of x, where
        ``x.mT`` is contiguous as it is and neither other nor another dtype is asked for.

    Raises:
        ValueError: if x has fewer than two dimensions, other has another shape or device, or backend is unknown or
            cannot run.
        TypeError: if other has another dtype, or backend is "triton" and a dtype has no kernel.

    Example:
        >>> import torch
        >>> from structmat_kernels.transpose import transpose
        >>> x = torch.arange(6.0).view(2, 3)
        >>> transpose(x, torch.ones_like(x))
        tensor([[1., 4.],
                [2., 5.],
                [3., 6.]])
    """
    if x.ndim < 2:
        raise ValueError(f"transpose: x must have shape (*batch, rows, columns), got {tuple(x.shape)}")
    if other is not None:
        if other.shape != x.shape:
            raise ValueError(f"transpose: other must have the shape of x, {tuple(x.shape)}, got {tuple(other.shape)}")
        if other.dtype != x.dtype:
            raise TypeError(f"transpose: other must have the dtype of x, {x.dtype}, got {other.dtype}")
        if other.device != x.device:
            raise ValueError(f"transpose: other must be on the device of x, {x.device}, got {other.device}")
    out = x.dtype if dtype is None else dtype
    if backend == "triton" and out not in _backend.DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _backend.DTYPES)
        raise TypeError(f"transpose: the kernel writes {names}, got dtype={out}; use another backend")
    free = other is None and out == x.dtype and x.mT.is_contiguous()
    if not supported(x, out, backend=backend) or free:
        return reference.transpose(x, other, out)
    return _call(x, other, out)
