"""The block-sparse product as a custom op, and the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import autograd, backend, batching
from structmat_kernels.block_sparse import reference
from structmat_kernels.block_sparse.layout import MAX_BLOCK, BlockLayout


@torch.library.custom_op("structmat::block_sparse", mutates_args=())
def _op(
    x: Tensor,
    values: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    gamma: Tensor,
    table: Tensor,
    m: int,
    n: int,
    qo: int,
    qi: int,
    longest: int,
    scale: float,
    transposed: bool,
) -> Tensor:
    """See reference.py; here x is (G, tokens, n) and every other operand but table has a leading G, too."""
    args = (x, values, u, v, bias, gamma, table, m, n, qo, qi, longest, scale, transposed)
    if backend.runs_kernels(x):
        from structmat_kernels.block_sparse import launch

        return launch.product(*args)
    return reference.block_sparse(*args).contiguous()


@_op.register_fake
def _(x, values, u, v, bias, gamma, table, m, n, qo, qi, longest, scale, transposed):
    return x.new_empty(x.shape[0], x.shape[1], n if transposed else m)


@torch.library.custom_op("structmat::block_sparse_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    gamma: Tensor,
    table: Tensor,
    m: int,
    n: int,
    qo: int,
    qi: int,
    longest: int,
    scale: float,
    transposed: bool,
    needs: list[bool],
) -> list[Tensor]:
    if not backend.runs_kernels(x):
        return reference.block_sparse_backward(
            grad, x, values, u, v, bias, gamma, table, m, n, qo, qi, longest, scale, transposed, needs
        )
    from structmat_kernels.block_sparse import launch

    none = x.new_empty(0)
    out = [none.clone() for _ in range(6)]
    # left has m columns and right n, whichever of them the product read.
    left, right = (x, grad) if transposed else (grad, x)
    inner = None
    if u.shape[-1] and (needs[0] or needs[3 - transposed]):
        inner = grad @ (v.mT if transposed else u)  # (G, tokens, r)
    if needs[0]:
        empty = x.new_empty(x.shape[0], 0)
        out[0] = launch.product(
            grad, values, u, v, empty, gamma, table, m, n, qo, qi, longest, scale, not transposed, middle=inner
        )
    if needs[1] or needs[5]:
        precise = torch.float32 if needs[5] else values.dtype
        sampled = launch.sampled(
            left, right, values, gamma[:, :0] if needs[5] else gamma, table, qo, qi, longest, scale, precise
        )
        if needs[5]:
            # One number from all: its terms cancel, in float64 without loss.
            out[5] = (sampled.double() * values).sum((1, 2, 3)).unsqueeze(1).to(gamma.dtype)
            sampled = (sampled * gamma[:, :, None, None]).to(values.dtype)
        if needs[1]:
            out[1] = sampled
    if needs[2]:
        out[2] = left.mT @ (inner if transposed and inner is not None else right @ v.mT)
    if needs[3]:
        out[3] = (inner if not transposed and inner is not None else left @ u).mT @ right
    if needs[4]:
        out[4] = grad.sum(1)
    return out


@_backward.register_fake
def _(grad, x, values, u, v, bias, gamma, table, m, n, qo, qi, longest, scale, transposed, needs):
    tensors = (x, values, u, v, bias, gamma)
    return [t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(tensors, needs, strict=True)]


batching.vmap_over_batch(_op, 6)
batching.vmap_over_batch(_backward, 7)
_differentiable = autograd.differentiable(_op, _backward, reference.block_sparse, 6)


def _check(x: Tensor, values: Tensor, layout: BlockLayout, u: Tensor | None, v: Tensor | None, bias: Tensor | None,
           transposed: bool) -> None:  # fmt: skip
    m, n = layout.shape
    n_in, n_out = (m, n) if transposed else (n, m)
    if x.ndim < 2 or x.shape[-1] != n_in:
        raise ValueError(f"x must be (*batch, tokens, {n_in}), got {tuple(x.shape)}")
    event = (layout.nnz, *layout.block)
    if values.ndim < 3 or tuple(values.shape[-3:]) != event:
        raise ValueError(f"values must be (*batch, {', '.join(map(str, event))}), got {tuple(values.shape)}")
    if (u is None) != (v is None):
        raise ValueError("u and v must be given together: U (V x) needs both")
    if u is not None and v is not None:
        if u.ndim < 2 or u.shape[-2] != m:
            raise ValueError(f"u must be (*batch, {m}, r), got {tuple(u.shape)}")
        if v.ndim < 2 or v.shape[-1] != n or v.shape[-2] != u.shape[-1]:
            raise ValueError(f"v must be (*batch, {u.shape[-1]}, {n}), got {tuple(v.shape)}")
    if bias is not None and (bias.ndim < 1 or bias.shape[-1] != n_out):
        raise ValueError(f"bias must be (*batch, {n_out}), got {tuple(bias.shape)}")
    for name, t in (("values", values), ("u", u), ("v", v), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
    if layout.device != x.device:
        raise ValueError(f"layout must be on x's device {x.device}, got {layout.device}; use layout.to(...)")


def _apply(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    u: Tensor | None,
    v: Tensor | None,
    gamma: float | Tensor,
    bias: Tensor | None,
    chosen: str | None,
    transposed: bool,
) -> Tensor:
    _check(x, values, layout, u, v, bias, transposed)
    m, n = layout.shape
    scale = 1.0 if isinstance(gamma, Tensor) else float(gamma)
    static = (layout.table, m, n, *layout.coarsening, layout.longest, scale, transposed)
    operands: list[Tensor] = [
        values,
        x.new_empty(m, 0) if u is None else u,
        x.new_empty(0, n) if v is None else v,
        x.new_empty(0) if bias is None else bias,
        # A parameter of another dtype is rounded as the kernels' operands are.
        gamma.to(x.dtype).unsqueeze(-1) if isinstance(gamma, Tensor) else x.new_empty(0),
    ]
    triton = backend.use_triton(chosen, x, *operands)
    if triton and max(layout.block) > MAX_BLOCK:
        if chosen == "triton":
            raise ValueError(f"the Triton kernels take blocks of at most {MAX_BLOCK}, got {layout.block}")
        triton = False
    if not triton:
        return reference.block_sparse(x, *operands, *static)  # pyright: ignore[reportCallIssue]
    # What is missing has no batch: it follows the others.
    events = (3, 2, 2, 1, 1)
    given = [i for i, (t, e) in enumerate(zip(operands, events, strict=True)) if i == 0 or 0 not in t.shape[-e:]]
    flat, factors, restore = batching.merge(x, tuple(operands[i] for i in given), tuple(events[i] for i in given))
    canonical = [flat.new_empty(flat.shape[0], *t.shape[-e:]) for t, e in zip(operands, events, strict=True)]
    for i, t in zip(given, factors, strict=True):
        canonical[i] = t
    return restore(_differentiable(flat, *canonical, *static))


def block_sparse(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    *,
    u: Tensor | None = None,
    v: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gamma B x + U (V x) + bias`` for a block-sparse B, in one pass.

    Args:
        x: shape (*batch, tokens, n).
        values: B's stored blocks, (*batch, nnz, bo, bi), in the order of ``mask.nonzero()``.
        layout: their places.
        u: shape (*batch, m, r).
        v: shape (*batch, r, n).
        gamma: a number, or a tensor without dimensions (or of the batch's), which may require a gradient.
        bias: shape (*batch, m).
        backend: "auto", "torch" or "triton"; see :mod:`structmat_kernels.backend`. The Triton kernels take blocks up to
            128; larger ones run in plain PyTorch.

    Returns:
        Shape (*batch, tokens, m). Cost: 2 nnz bo bi + 2 r (m + n) operations a token.

    Raises:
        ValueError: if sizes or devices do not fit.
        TypeError: if dtypes differ.
    """
    return _apply(x, values, layout, u, v, gamma, bias, backend, False)


def block_sparse_transposed(
    y: Tensor,
    values: Tensor,
    layout: BlockLayout,
    *,
    u: Tensor | None = None,
    v: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gamma B^T y + V^T (U^T y) + bias``: the transposed product, with the same operands as :func:`block_sparse`.

    Args:
        y: shape (*batch, tokens, m).
        values: see :func:`block_sparse`, as for layout, u, v, gamma and backend.
        layout: see values.
        u: see values.
        v: see values.
        gamma: see values.
        bias: shape (*batch, n).
        backend: see values.

    Returns:
        Shape (*batch, tokens, n).
    """
    return _apply(y, values, layout, u, v, gamma, bias, backend, True)
