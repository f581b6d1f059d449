"""The block-diagonal product as an operation: kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.batching import merge, vmap_over_batch
from structmat_kernels.block_diagonal import reference


def _plain(x: Tensor, blocks: Tensor) -> Tensor:
    return reference.block_diagonal(x, blocks).flatten(-2)


@torch.library.custom_op("structmat::block_diagonal", mutates_args=())
def _product(x: Tensor, blocks: Tensor) -> Tensor:
    if _backend.runs_kernels(x):
        from structmat_kernels.block_diagonal import kernel

        with _backend.launching(x):
            return kernel.product(x, blocks, blocks.shape[1] * blocks.shape[2])
    return _plain(x, blocks).contiguous()


@_product.register_fake
def _(x: Tensor, blocks: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], blocks.shape[1] * blocks.shape[2]))


@torch.library.custom_op("structmat::block_diagonal_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, blocks: Tensor, needs: list[bool]) -> list[Tensor]:
    gx, gblocks = (x.new_empty(0) for _ in range(2))
    if _backend.runs_kernels(x):
        from structmat_kernels.block_diagonal import kernel

        with _backend.launching(x):
            gx = kernel.product(grad, blocks.mT, x.shape[2]) if needs[0] else gx
            gblocks = kernel.weights(grad, x, blocks) if needs[1] else gblocks
    else:
        gx = reference.fit_last(_plain(grad, blocks.mT), x.shape[2]).contiguous() if needs[0] else gx
        gblocks = reference.blocks_gradient(grad, x, blocks).contiguous() if needs[1] else gblocks
    return [gx, gblocks]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, blocks: Tensor, needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(t.shape if need else (0,)) for t, need in zip((x, blocks), needs, strict=True)]


vmap_over_batch(_product, 2)
vmap_over_batch(_backward, 3)
_differentiable = differentiable(_product, _backward, _plain, 2)


def block_diagonal(x: Tensor, blocks: Tensor, *, backend: str | None = None) -> Tensor:
    """Apply blocks to consecutive pieces of the last dimension: ``h[i q + a] = sum_b blocks[i, a, b] x[i p + b]``.

    Args:
        x: shape (*batch, tokens, n) with n <= k p; missing entries count as zeros. The kernels take bfloat16, float16
            and float32 and accumulate in float32; blocks of 256 x 256 and more are cuBLAS's.
        blocks: shape (*batch, k, q, p), dtype and device of x. Batch dimensions broadcast.
        backend: "auto", "torch" or "triton"; None is the default. The kernels join blocks narrower than 64 by zeros: a
            value that is not finite may spread to the outputs of neighbouring blocks.

    Returns:
        Shape (*batch, tokens, k, q), not flattened. Cost: 2 k q p operations a token.

    Raises:
        ValueError: if the sizes or devices do not agree.
        TypeError: if the dtypes do not agree.
    """
    if blocks.ndim < 3:
        raise ValueError(f"block_diagonal: blocks must have shape (*batch, k, q, p), got {tuple(blocks.shape)}")
    k, q, p = blocks.shape[-3:]
    if x.ndim < 2 or x.shape[-1] > k * p:
        raise ValueError(
            f"block_diagonal: x must have shape (*batch, tokens, n) with n at most {k * p} to meet blocks of shape "
            f"{tuple(blocks.shape[-3:])}, got {tuple(x.shape)}"
        )
    if x.dtype != blocks.dtype:
        raise TypeError(f"block_diagonal: blocks must have the dtype of x, {x.dtype}, got {blocks.dtype}")
    if x.device != blocks.device:
        raise ValueError(f"block_diagonal: blocks must be on the device of x, {x.device}, got {blocks.device}")
    if not _backend.use_triton(backend, x, blocks) or 0 in (*blocks.shape, x.shape[-1]):
        return reference.block_diagonal(x, blocks)
    flat, (factor,), back = merge(x, (blocks,), (3,))
    return back(_differentiable(flat, factor)).unflatten(-1, (k, q))
