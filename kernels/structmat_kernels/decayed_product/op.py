"""The decayed product as an operation: the kernel where it runs, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.decayed_product import reference

#: Whether "auto" may choose the kernel, which no device has timed yet.
MEASURED = False
#: The fewest entries of the result for which "auto" chooses the kernel.
FEWEST = 1 << 18


@torch.library.custom_op("structmat::decayed_product", mutates_args=())
def _forward(weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float) -> Tensor:
    if _backend.runs_kernels(weight):
        from structmat_kernels.decayed_product import kernel

        return kernel.decayed_product(weight, h, times, rates, shift)
    return reference.decayed_product(weight, h, times, rates, shift)


@_forward.register_fake
def _(weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float) -> Tensor:
    return weight.new_empty((*weight.shape[:2], h.shape[2]))


@torch.library.custom_op("structmat::decayed_product_backward", mutates_args=())
def _backward(
    grad: Tensor, weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float, needs: list[bool]
) -> list[Tensor]:
    found: list[Tensor | None] = [None] * 4
    with _backend.launching(weight):
        if needs[0] or needs[1]:
            inner = grad * reference.decay(times, rates, shift)
            found[0] = torch.bmm(inner, h.mT) if needs[0] else None
            found[1] = torch.bmm(weight.mT, inner) if needs[1] else None
        if needs[2] or needs[3]:
            slope = (grad * torch.bmm(weight, h)).sum(0) * -reference.decay(times, rates, 0.0)
            found[2], found[3] = (slope * rates.unsqueeze(-1)).sum(0), (slope * times).sum(1)
    pairs = zip(found, needs, strict=True)
    return [t.contiguous() if need and t is not None else weight.new_empty(0) for t, need in pairs]


@_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, shift: float, needs: list[bool]
) -> list[Tensor]:
    pairs = zip((weight, h, times, rates), needs, strict=True)
    return [t.new_empty(t.shape if need else (0,)) for t, need in pairs]


def _vmap(op: Any) -> None:
    """One call after another: each is large."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        def at(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return op(*(a if not isinstance(a, Tensor) or d is None else a.select(d, i) for a, d in pairs))

        outs = [at(i) for i in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return [torch.stack(some) for some in zip(*outs, strict=True)], [0] * len(outs[0])

    op.register_vmap(rule)


_vmap(_forward)
_vmap(_backward)
_differentiable = differentiable(_forward, _backward, reference.decayed_product, 4)


def _runs(backend: str | None, weight: Tensor, h: Tensor) -> bool:
    if not _backend.use_triton(backend, weight, h):
        return False
    if weight.dtype != torch.float32:
        if backend == "triton":
            raise TypeError(f"decayed_product: the kernel takes float32, got {weight.dtype}; use another backend")
        return False
    asked = backend == "triton" or _backend._DEFAULT == "triton"
    size = weight.shape[0] * weight.shape[1] * h.shape[2]
    # torch.compile makes one kernel of the decay and the multiplication, and can choose the product.
    return asked or (MEASURED and not torch.compiler.is_compiling() and size >= FEWEST)


def decayed_product(
    weight: Tensor, h: Tensor, times: Tensor, rates: Tensor, *, shift: float = 0.0, backend: str | None = None
) -> Tensor:
    """Products whose entries decay along the columns: ``(weight @ h)[d, c, i] * (exp(-rates[c] times[i]) + shift)``.

    The kernel takes float32 and writes the result once; products are of float32 grade, or of TF32 where
    ``torch.set_float32_matmul_precision`` allows it for dense ones.

    Args:
        weight: shape (directions, channels, width).
        h: shape (directions, width, length).
        times: shape (length,).
        rates: shape (channels,).
        shift: what the decay tends to.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        Shape (directions, channels, length), dtype of the operands. Cost: 2 width operations an entry, one read of the
        operands and one write.

    Raises:
        ValueError: if shapes or devices do not agree, or backend is unknown or cannot run.
        TypeError: if dtypes do not agree, or backend is "triton" and they are not float32.

    Example:
        >>> import torch
        >>> from structmat_kernels.decayed_product import decayed_product
        >>> weight, h = torch.ones(1, 2, 3), torch.ones(1, 3, 2)
        >>> decayed_product(weight, h, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.6931472]))
        tensor([[[3.0000, 3.0000],
                 [3.0000, 1.5000]]])
    """
    if weight.ndim != 3 or h.ndim != 3 or weight.shape[0] != h.shape[0] or weight.shape[2] != h.shape[1]:
        raise ValueError(
            "decayed_product: weight and h must have shapes (directions, channels, width) and (directions, width, "
            f"length), got {tuple(weight.shape)} and {tuple(h.shape)}"
        )
    for name, t, size in (("times", times, h.shape[2]), ("rates", rates, weight.shape[1])):
        if t.ndim != 1 or t.shape[0] != size:
            raise ValueError(f"decayed_product: {name} must have shape ({size},), got {tuple(t.shape)}")
    for name, t in (("h", h), ("times", times), ("rates", rates)):
        if t.dtype != weight.dtype:
            raise TypeError(f"decayed_product: {name} must have the dtype of weight, {weight.dtype}, got {t.dtype}")
        if t.device != weight.device:
            raise ValueError(
                f"decayed_product: {name} must be on the device of weight, {weight.device}, got {t.device}"
            )
    if not _runs(backend, weight, h):
        return reference.decayed_product(weight, h, times, rates, shift)
    return _differentiable(weight, h, times, rates, float(shift))
