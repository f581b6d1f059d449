"""What the classes share: random blocks and batched solves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def uniform_(t: Tensor, std: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``t`` in place with uniform numbers of standard deviation ``std`` (complex: in modulus), mean zero.

    Args:
        t: floating-point or complex tensor; left alone on the meta device.
        std: a number or a real tensor that broadcasts against t.
        generator: source of randomness.
    """
    if t.is_complex():
        parts = torch.empty((*t.shape, 2), dtype=t.real.dtype, device=t.device)
        return t.copy_(torch.view_as_complex(uniform_(parts, 1.0, generator))).mul_(std / math.sqrt(2))
    mesh: Any = getattr(t, "device_mesh", None)
    if isinstance(std, Tensor) and mesh is not None:
        # Sharded parameters (FSDP2, made on the meta device) multiply sharded tensors only. Imported here: it is slow.
        from torch.distributed.tensor import DTensor, Replicate

        std = DTensor.from_local(std, mesh, [Replicate()] * mesh.ndim, run_check=False)
    bound = math.sqrt(3)
    return t.uniform_(-bound, bound, generator=generator).mul_(std)


def solve_columns(blocks: Tensor, b: Tensor) -> Tensor:
    """``blocks^-1 b`` for b of shape (*batch, n, k), never read as a stack of vectors.

    ``torch.linalg.solve`` takes b for vectors where its shape happens to be that of ``blocks`` without the last
    dimension, and vmap misaligns batches of different lengths: b gets all of the batch dimensions first.
    """
    if b.ndim < blocks.ndim:
        b = b.expand(*torch.broadcast_shapes(blocks.shape[:-2], b.shape[:-2]), *b.shape[-2:])
    return torch.linalg.solve(blocks, b)
