"""Block-diagonal products on a GPU: the Kronecker-sparse kernels with d = 1, and cuBLAS where blocks are large.

From 256 x 256 the blocks are matrix products in their own right: cuBLAS's strided batched product reads x and writes y
in place, without copies, and its kernels are ahead of Triton's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels.kronecker_sparse import kernel as kronecker_kernel

#: The least block side that cuBLAS is asked to multiply.
LARGE = 256


def _is_large(blocks: Tensor) -> bool:
    return blocks.shape[0] == 1 and min(blocks.shape[-2:]) >= LARGE


def product(x: Tensor, blocks: Tensor, m: int, config: dict | None = None) -> Tensor:
    """The first m of the k q results for x (G, tokens, n), n <= k p, and blocks (G, k, q, p) of any strides."""
    k, q = blocks.shape[1:3]
    if config is None and _is_large(blocks) and m > (k - 1) * q and x.numel():
        return _large_product(x, blocks)[..., :m].contiguous()
    return kronecker_kernel.product(x, blocks.unsqueeze(2), m, config, op="block_diagonal")


def weights(grad: Tensor, x: Tensor, blocks: Tensor, config: dict | None = None) -> Tensor:
    """The gradient of the blocks for grad (G, tokens, k q) and x (G, tokens, n)."""
    if config is None and _is_large(blocks) and x.numel():
        return _large_weights(grad, x, blocks)
    return kronecker_kernel.weights(grad, x, blocks.unsqueeze(2), config, op="block_diagonal").squeeze(2)


def _pieces(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x (tokens, n) as whole pieces (pieces, tokens, size), a view, and the rest (tokens, n mod size)."""
    whole = x.shape[1] // size
    return x[:, : whole * size].unflatten(1, (whole, size)).transpose(0, 1), x[:, whole * size :]


def _large_product(x: Tensor, blocks: Tensor) -> Tensor:
    _, k, q, p = blocks.shape
    pieces, rest = _pieces(x[0], p)
    whole, tail = pieces.shape[0], rest.shape[1]
    y = torch.empty((x.shape[1], k, q), dtype=x.dtype, device=x.device)
    out = y.transpose(0, 1)
    if whole:
        torch.bmm(pieces, blocks[0, :whole].mT, out=out[:whole])
    if tail:
        torch.mm(rest, blocks[0, whole, :, :tail].mT, out=out[whole])
    out[whole + (tail > 0) :].zero_()
    return y.flatten(1).unsqueeze(0)


def _large_weights(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    q, p = blocks.shape[-2:]
    pieces, rest = _pieces(x[0], p)
    whole, tail = pieces.shape[0], rest.shape[1]
    g = _pieces(grad[0], q)[0].mT  # (k, q, tokens)
    out = torch.empty(blocks.shape, dtype=x.dtype, device=x.device)
    if whole:
        torch.bmm(g[:whole], pieces, out=out[0, :whole])
    if whole < blocks.shape[1]:
        out[0, whole:].zero_()
    if tail:
        out[0, whole, :, :tail] = g[whole] @ rest
    return out
