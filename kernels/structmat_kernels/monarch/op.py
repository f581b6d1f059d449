"""The Monarch product as custom ops with derivatives of any order."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable, is_plain, short
from structmat_kernels.batching import merge, vmap_over_batch
from structmat_kernels.monarch import reference


def _plain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str) -> Tensor:
    z = reference.monarch(x, left, right, nrows)
    z = z + bias.unsqueeze(-2) if bias.numel() else z
    return reference.ACTIVATIONS[activation](z) if activation else z


# CUDA allows so many programs along the axes of a grid on which matrices of a batch lie.
MOST_MATRICES = 65535


def _forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, nrows: int, activation: str) -> Tensor:
    """The product of operands (G, ...), or of x (*lead, n) and factors without a batch."""
    with _backend.launching(x):
        if _backend.runs_kernels(x):
            from structmat_kernels.monarch import launch

            y = launch.forward(x, left, right, bias, nrows, activation)
            if y is not None:
                return y
        return _plain(x, left, right, x.new_empty(0) if bias is None else bias, nrows, activation).contiguous()


@torch.library.custom_op("structmat::monarch", mutates_args=())
def _monarch(x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str) -> Tensor:
    if x.shape[0] > MOST_MATRICES:
        pieces = zip(*(t.split(MOST_MATRICES) for t in (x, left, right, bias)), strict=True)
        return torch.cat([_monarch(*piece, nrows, activation) for piece in pieces])
    return _forward(x, left, right, bias, nrows, activation)


@_monarch.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], nrows))


def _gradients(
    gy: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    nrows: int,
    activation: str,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of ``_forward``, None for what is not needed."""
    want_x, want_w, want_bias = needs[0], needs[1] or needs[2], needs[3]
    with _backend.launching(x):
        if activation:
            gy = reference.activation_backward(gy, _forward(x, left, right, bias, nrows, ""), activation)
        want_bias = want_bias and bias is not None and bias.numel() > 0
        if _backend.runs_kernels(x) and (want_x or want_w):
            from structmat_kernels.monarch import launch_backward

            grads = launch_backward.backward(gy, x, left, right, x.shape[-1], want_x, want_w, want_b=want_bias)
        else:
            three = _reference_gradients(gy, x, left, right) if want_x or want_w else (None, None, None)
            gbias = (gy.flatten(0, -2).sum(0) if left.ndim == 3 else gy.sum(-2)) if want_bias else None
            grads = (*three, gbias)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]


def _reference_gradients(gy: Tensor, x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if left.ndim == 4:
        gx, gleft, gright = reference.monarch_backward(gy, x, left, right)
    else:
        gx, gleft, gright = reference.monarch_backward(gy.flatten(0, -2), x.flatten(0, -2), left, right)
        gx = gx.view(x.shape)
    return gx.contiguous(), gleft.contiguous(), gright.contiguous()


@torch.library.custom_op("structmat::monarch_backward", mutates_args=())
def _monarch_backward(
    gy: Tensor, x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str, needs: list[bool]
) -> list[Tensor]:
    if x.shape[0] > MOST_MATRICES:
        pieces = zip(*(t.split(MOST_MATRICES) for t in (gy, x, left, right, bias)), strict=True)
        found = [_monarch_backward(*piece, nrows, activation, needs) for piece in pieces]
        return [
            torch.cat(grads) if need else grads[0] for grads, need in zip(zip(*found, strict=True), needs, strict=True)
        ]
    grads = _gradients(gy, x, left, right, bias, nrows, activation, needs)
    none = bias if needs[3] else x.new_empty(0)  # a bias without entries
    return [(none.clone() if i == 3 else x.new_empty(0)) if g is None else g for i, g in enumerate(grads)]


@_monarch_backward.register_fake
def _(
    gy: Tensor, x: Tensor, left: Tensor, right: Tensor, bias: Tensor, nrows: int, activation: str, needs: list[bool]
) -> list[Tensor]:
    tensors = (x, left, right, bias)
    return [x.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs, strict=True)]


@torch.library.custom_op("structmat::monarch_transposed", mutates_args=())
def _transposed(y: Tensor, left: Tensor, right: Tensor, ncols: int) -> Tensor:
    if y.shape[0] > MOST_MATRICES:
        pieces = zip(*(t.split(MOST_MATRICES) for t in (y, left, right)), strict=True)
        return torch.cat([_transposed(*piece, ncols) for piece in pieces])
    with _backend.launching(y):
        if _backend.runs_kernels(y):
            from structmat_kernels.monarch import launch_backward

            found = launch_backward.backward(y, None, left, right, ncols, True, False)
            if found[0] is not None:
                return found[0]
        return reference.monarch_transposed(y, left, right, ncols).contiguous()


@_transposed.register_fake
def _(y: Tensor, left: Tensor, right: Tensor, ncols: int) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[1], ncols))


@torch.library.custom_op("structmat::monarch_transposed_backward", mutates_args=())
def _transposed_backward(
    gx: Tensor, y: Tensor, left: Tensor, right: Tensor, ncols: int, needs: list[bool]
) -> list[Tensor]:
    want_y, want_left, want_right = needs
    none = y.new_empty(0)
    gy = _monarch(gx, left, right, none.view(y.shape[0], 0), y.shape[-1], "") if want_y else none
    if not (want_left or want_right):
        return [gy, none.clone(), none.clone()]
    # sum(gx * (y M)) is sum(y * monarch(gx)): the factors' gradients are those of the product, x and gy exchanged.
    _, gleft, gright, _ = _monarch_backward(
        y, gx, left, right, none.view(y.shape[0], 0), y.shape[-1], "", [False, want_left, want_right, False]
    )
    return [gy, gleft, gright]


@_transposed_backward.register_fake
def _(gx: Tensor, y: Tensor, left: Tensor, right: Tensor, ncols: int, needs: list[bool]) -> list[Tensor]:
    return [y.new_empty(t.shape if need else 0) for t, need in zip((y, left, right), needs, strict=True)]


vmap_over_batch(_monarch, 4, rows=True)
vmap_over_batch(_monarch_backward, 5)
vmap_over_batch(_transposed, 3, rows=True)
vmap_over_batch(_transposed_backward, 4)

_differentiable = differentiable(_monarch, _monarch_backward, _plain, 4)


def _long(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, nrows: int, activation: str) -> Tensor:
    some = x.new_empty(0) if bias is None else bias
    x, (left, right, some), restore = merge(x, (left, right, some), (3, 3, 1))
    return restore(_differentiable(x, left, right, some, nrows, activation))


_short = short(_forward, _gradients, _long, 4)
_differentiable_transposed = differentiable(_transposed, _transposed_backward, reference.monarch_transposed, 3)


def _check(name: str, x: Tensor, left: Tensor, right: Tensor) -> tuple[int, int]:
    """The sizes l s and k p of the whole matrix."""
    blocks = left.ndim > 2 and right.ndim > 2
    if not blocks or right.shape[-3] * right.shape[-2] != left.shape[-3] * left.shape[-1]:
        raise ValueError(
            f"left (*batch, l, s, r) and right (*batch, k, q, p) must satisfy k q = l r, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    rows, columns = left.shape[-3] * left.shape[-2], right.shape[-3] * right.shape[-1]
    width = rows if name == "y" else columns
    if x.ndim < 2 or x.shape[-1] > width:
        raise ValueError(f"{name} must have shape (*batch, tokens, up to {width}), got {tuple(x.shape)}")
    for other, t in (("left", left), ("right", right)):
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(
                f"{other} must have the dtype and device of {name}, {x.dtype} on {x.device}, "
                f"got {t.dtype} on {t.device}"
            )
    return rows, columns


def monarch(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    nrows: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``activation(x @ M.mT + bias)`` for the Monarch matrix M of factors ``left`` and ``right``.

    Args:
        x: shape (*batch, tokens, n) with n <= k p; missing entries count as zeros.
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p) with k q = l r.
        nrows: how many of the l s outputs to keep.
        bias: shape (nrows,) or None.
        activation: None, "relu", "gelu" (by the error function) or "silu".
        backend: "auto", "torch", "triton", or None for the default (see :mod:`structmat_kernels.backend`).

    Returns:
        Shape (*batch, tokens, nrows). Cost: 2 (k q p + l s r) operations a token.

    Raises:
        ValueError: if sizes do not meet, or activation or backend is unknown.
        TypeError: if dtypes or devices differ.
    """
    rows, _ = _check("x", x, left, right)
    if not 0 < nrows <= rows:
        raise ValueError(f"nrows must be from 1 to l s = {rows}, got {nrows}")
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {sorted(reference.ACTIVATIONS)}, got {activation!r}")
    if bias is not None and bias.shape != (nrows,):
        raise ValueError(f"bias must have shape ({nrows},), got {tuple(bias.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise TypeError(
            f"bias must have the dtype and device of x, {x.dtype} on {x.device}, got {bias.dtype} on {bias.device}"
        )
    operands = (x, left, right) if bias is None else (x, left, right, bias)
    if not _backend.use_triton(backend, *operands) or 0 in right.shape[-3:]:
        return reference.monarch(x, left, right, nrows, bias, activation)
    run = _short if left.ndim == right.ndim == 3 and is_plain(operands) else _long
    return run(x, left, right, bias, nrows, activation or "")


def monarch_transposed(y: Tensor, left: Tensor, right: Tensor, ncols: int, *, backend: str | None = None) -> Tensor:
    """``y @ M``: the transposed product, at the same cost and with the same factors.

    Args:
        y: shape (*batch, tokens, m) with m <= l s; missing entries count as zeros.
        left: shape (*batch, l, s, r).
        right: shape (*batch, k, q, p) with k q = l r.
        ncols: how many of the k p outputs to keep.
        backend: as for :func:`monarch`.

    Returns:
        Shape (*batch, tokens, ncols).

    Raises:
        ValueError: if sizes do not meet, or backend is unknown.
        TypeError: if dtypes or devices differ.
    """
    _, columns = _check("y", y, left, right)
    if not 0 < ncols <= columns:
        raise ValueError(f"ncols must be from 1 to k p = {columns}, got {ncols}")
    if not _backend.use_triton(backend, y, left, right) or 0 in right.shape[-3:]:
        return reference.monarch_transposed(y, left, right, ncols)
    y, (left, right), restore = merge(y, (left, right), (3, 3))
    return restore(_differentiable_transposed(y, left, right, ncols))
