"""The Kronecker-sparse product as an operation: kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.batching import merge, vmap_over_batch
from structmat_kernels.kronecker_sparse import reference


@torch.library.custom_op("structmat::kronecker_sparse", mutates_args=())
def _product(x: Tensor, blocks: Tensor) -> Tensor:
    a, d, q, _ = blocks.shape[1:]
    if _backend.runs_kernels(x):
        from structmat_kernels.kronecker_sparse import kernel

        return kernel.product(x, blocks, a * q * d)
    return reference.kronecker_sparse(x, blocks).contiguous()


@_product.register_fake
def _(x: Tensor, blocks: Tensor) -> Tensor:
    a, d, q, _ = blocks.shape[1:]
    return x.new_empty((x.shape[0], x.shape[1], a * q * d))


@torch.library.custom_op("structmat::kronecker_sparse_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, blocks: Tensor, needs: list[bool]) -> list[Tensor]:
    gx, gblocks = (x.new_empty(0) for _ in range(2))
    if _backend.runs_kernels(x):
        from structmat_kernels.kronecker_sparse import kernel

        gx = kernel.product(grad, blocks.mT, x.shape[2]) if needs[0] else gx
        gblocks = kernel.weights(grad, x, blocks) if needs[1] else gblocks
    else:
        gx = reference.kronecker_sparse(grad, blocks.mT).contiguous() if needs[0] else gx
        gblocks = reference.blocks_gradient(grad, x, blocks).contiguous() if needs[1] else gblocks
    return [gx, gblocks]


@_backward.register_fake
def _(grad: Tensor, x: Tensor, blocks: Tensor, needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(t.shape if need else (0,)) for t, need in zip((x, blocks), needs, strict=True)]


vmap_over_batch(_product, 2)
vmap_over_batch(_backward, 3)
_differentiable = differentiable(_product, _backward, reference.kronecker_sparse, 2)


def kronecker_sparse(x: Tensor, blocks: Tensor, *, backend: str | None = None) -> Tensor:
    """``x @ K.mT`` for the factor K of pattern I_a (x) 1_{q x p} (x) I_d.

    ``y[(A q + o) d + D] = sum_b blocks[A, D, o, b] x[(A p + b) d + D]``: level i of a butterfly matrix of size n has
    q = p = 2 and a d = n / 2; levels merged in groups have q = p = 4 to 64. The transposed product takes ``blocks.mT``.

    Args:
        x: shape (*batch, tokens, a p d). The kernels take bfloat16, float16 and float32 and accumulate in float32.
        blocks: shape (*batch, a, d, q, p), dtype and device of x. Batch dimensions broadcast.
        backend: "auto", "torch" or "triton"; None is the default. The kernels of half precision multiply zeros in place
            of a neighbour's weights: a value that is not finite may spread to outputs of up to 64 neighbouring entries.

    Returns:
        Shape (*batch, tokens, a q d). Cost: 2 a d q p operations a token.

    Raises:
        ValueError: if the sizes or devices do not agree.
        TypeError: if the dtypes do not agree.
    """
    if blocks.ndim < 4:
        raise ValueError(
            f"kronecker_sparse: blocks must have shape (*batch, a, d, q, p), got {tuple(blocks.shape)}; "
            "use blocks.unsqueeze(-3) for d = 1"
        )
    a, d, _, p = blocks.shape[-4:]
    if x.ndim < 2 or x.shape[-1] != a * p * d:
        raise ValueError(
            f"kronecker_sparse: x must have shape (*batch, tokens, {a * p * d}) to meet blocks of shape (a, d, q, p) = "
            f"{tuple(blocks.shape[-4:])}, got {tuple(x.shape)}"
        )
    if x.dtype != blocks.dtype:
        raise TypeError(f"kronecker_sparse: blocks must have the dtype of x, {x.dtype}, got {blocks.dtype}")
    if x.device != blocks.device:
        raise ValueError(f"kronecker_sparse: blocks must be on the device of x, {x.device}, got {blocks.device}")
    if not _backend.use_triton(backend, x, blocks) or 0 in (*blocks.shape, x.shape[-1]):
        return reference.kronecker_sparse(x, blocks)
    flat, (factor,), back = merge(x, (blocks,), (4,))
    return back(_differentiable(flat, factor))
