"""The short causal depthwise convolution as an operation: the kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.batching import vmap_over_batch
from structmat_kernels.short_conv import reference

#: The largest number of taps of the kernels; longer filters run the reference.
MOST_TAPS = 8
#: Whether backend="auto" may run the kernels. Benchmarks switch it off.
MEASURED = True


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The reference for x (G, batch, channels, length), weight (G, channels, taps) and bias (G, channels or 0)."""
    rows = x.transpose(0, 1).flatten(1, 2)
    y = reference.short_conv(rows, weight.flatten(0, 1), bias.flatten() if bias.numel() else None)
    return y.unflatten(1, x.shape[::2]).transpose(0, 1)


def _like(x: Tensor) -> Tensor:
    """Memory for the gradient of x: channels next to each other where x has them so, contiguous otherwise."""
    if x.stride(-2) == 1 and x.stride(-1) != 1:
        return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-2])).mT
    return x.new_empty(x.shape)


@torch.library.custom_op("structmat::short_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _backend.runs_kernels(x):
        from structmat_kernels.short_conv import kernel

        return kernel.forward(x, weight, bias)
    return _plain(x, weight, bias).contiguous()


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("structmat::short_conv_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]) -> list[Tensor]:
    gx = _like(x) if needs[0] else x.new_empty(0)
    taps, want_w = weight.shape[2], needs[1] or needs[2]
    if _backend.runs_kernels(x):
        from structmat_kernels.short_conv import kernel

        both = kernel.backward(grad, x, weight, gx if needs[0] else None, want_w)
        pieces = (both[..., :taps], both[..., taps]) if want_w else (both, both)
    else:
        gx_, *pieces = torch.func.vjp(_plain, x, weight, bias)[1](grad)
        gx = gx.copy_(gx_) if needs[0] else gx
    wanted = (needs[1], needs[2] and bias.numel() > 0)
    options = {"dtype": x.dtype, "copy": True, "memory_format": torch.contiguous_format}
    gweight, gbias = (t.to(**options) if want else x.new_empty(0) for t, want in zip(pieces, wanted, strict=True))
    return [gx, gweight, gbias if wanted[1] or not needs[2] else bias.clone()]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, needs: list[bool]) -> list[Tensor]:
    gx = _like(x) if needs[0] else x.new_empty(0)
    rest = zip((weight, bias), needs[1:], strict=True)
    return [gx, *(x.new_empty(t.shape if need else (0,)) for t, need in rest)]


vmap_over_batch(_conv, 3)
vmap_over_batch(_backward, 4)
_differentiable = differentiable(_conv, _backward, _plain, 3)


def _runs(backend: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not _backend.use_triton(backend, x, weight, *([] if bias is None else [bias])):
        return False
    forced = (_backend._DEFAULT if backend is None else backend) == "triton"
    if weight.shape[1] > MOST_TAPS:
        if backend == "triton":
            raise ValueError(
                f"short_conv: the kernels take up to {MOST_TAPS} taps, got {weight.shape[1]}; use another backend"
            )
        return False
    return forced or MEASURED


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The causal convolution of every channel with a few taps.

    ``y[c, t] = bias[c] + sum_j weight[c, j] x[c, t - (taps - 1) + j]``, inputs before the beginning being 0: a
    depthwise ``F.conv1d`` with padding on the left.

    Args:
        x: shape (*batch, channels, length). The kernels take bfloat16, float16 and float32, accumulate in float32 and
            round once. They read and write each entry once, also where channels lie next to each other, as in the
            transposed output of a linear layer; the gradient of such an x lies in memory as x does.
        weight: shape (channels, taps), dtype and device of x. The kernels take up to 8 taps.
        bias: shape (channels,), or None.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        The shape and dtype of x, contiguous where the kernels run. Cost: 2 taps operations an entry.

    Raises:
        ValueError: if sizes or devices do not agree, there is no tap, or backend is unknown or cannot run.
        TypeError: if dtypes do not agree, or backend is "triton" and the dtype has no kernels.

    Example:
        >>> import torch
        >>> from structmat_kernels.short_conv import short_conv
        >>> short_conv(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 1.0]]))
        tensor([[ 1., 12., 23., 34.]])
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(
            f"short_conv: weight must have shape (channels, taps) with taps > 0, got {tuple(weight.shape)}"
        )
    channels = weight.shape[0]
    if x.ndim < 2 or x.shape[-2] != channels:
        raise ValueError(
            f"short_conv: x must have shape (*batch, {channels}, length) to meet weight of shape "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"short_conv: bias must have shape ({channels},) or be None, got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"short_conv: {name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"short_conv: {name} must be on the device of x, {x.device}, got {t.device}")
    if not _runs(backend, x, weight, bias):
        return reference.short_conv(x, weight, bias)
    rows = x.reshape(1, x.shape[:-2].numel(), *x.shape[-2:])
    some = x.new_empty(1, 0) if bias is None else bias.unsqueeze(0)
    return _differentiable(rows, weight.unsqueeze(0), some).reshape(x.shape)
