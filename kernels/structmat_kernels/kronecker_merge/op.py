"""The product of chained Kronecker-sparse factors as an operation: kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.batching import vmap_over_batch
from structmat_kernels.kronecker_merge import reference


def _pairs(radices: str) -> tuple[tuple[int, int], ...]:
    """The numbers in "2x2 3x5"; a string because transforms would look into a list."""
    rows = [tuple(map(int, pair.split("x"))) for pair in radices.split()]
    return tuple([(b, c) for b, c in rows])


def _plain(flat: Tensor, radices: str, a: int, d: int, mirror: bool) -> Tensor:
    """The reference, of packed values (G, size) and to their dtype."""
    shapes = reference.shapes(_pairs(radices), a, d, mirror)
    pieces = flat.split([math.prod(shape) for shape in shapes], 1)
    values = [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return reference.kronecker_merge(values, mirror).to(flat.dtype)


# The values of all factors are packed into one tensor: operators take a fixed number of them.
@torch.library.custom_op("structmat::kronecker_merge", mutates_args=())
def _merge(flat: Tensor, radices: str, a: int, d: int, mirror: bool) -> Tensor:
    if _backend.runs_kernels(flat):
        from structmat_kernels.kronecker_merge import kernel

        with _backend.launching(flat):
            return kernel.merge(flat, _pairs(radices), a, d, mirror)
    return _plain(flat, radices, a, d, mirror).contiguous()


@_merge.register_fake
def _(flat: Tensor, radices: str, a: int, d: int, mirror: bool) -> Tensor:
    pairs = _pairs(radices)
    return flat.new_empty((flat.shape[0], a, d, math.prod([b for b, _ in pairs]), math.prod([c for _, c in pairs])))


@torch.library.custom_op("structmat::kronecker_merge_backward", mutates_args=())
def _backward(
    grad: Tensor, flat: Tensor, radices: str, a: int, d: int, mirror: bool, needs: list[bool]
) -> list[Tensor]:
    if _backend.runs_kernels(flat):
        from structmat_kernels.kronecker_merge import kernel

        with _backend.launching(flat):
            return [kernel.gradient(grad, flat, _pairs(radices), a, d, mirror)]
    pullback = torch.func.vjp(lambda t: _plain(t, radices, a, d, mirror), flat)[1]
    return [pullback(grad)[0].contiguous()]


@_backward.register_fake
def _(grad: Tensor, flat: Tensor, radices: str, a: int, d: int, mirror: bool, needs: list[bool]) -> list[Tensor]:
    return [flat.new_empty(flat.shape)]


vmap_over_batch(_merge, 1)
vmap_over_batch(_backward, 2)
_differentiable = differentiable(_merge, _backward, _plain, 1)


def kronecker_merge(values: Sequence[Tensor], mirror: bool = False, *, backend: str | None = None) -> Tensor:
    """The blocks of a product of Kronecker-sparse factors that are chained with rank 1.

    A factor's values (a_i, b_i, c_i, d_i) are those of the pattern I_{a_i} (x) 1_{b_i x c_i} (x) I_{d_i}. In a chain
    a_{i+1} = a_i c_i and d_i = b_{i+1} d_{i+1}, as in the levels of a fast Fourier transform; in the mirror, as in
    their transposes, a_i = b_{i+1} a_{i+1} and d_{i+1} = c_i d_i. One path joins every input to every output: an entry
    of the product is a product of one entry of each factor.

    Args:
        values: from left to right, shapes (*batch, a_i, b_i, c_i, d_i), of one batch, dtype and device. The kernels
            take bfloat16, float16 and float32, multiply in float32 and round once.
        mirror: whether they are chained in the mirror.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        Shape (*batch, a, d, b, c), contiguous, as :func:`kronecker_sparse` and :func:`monarch` take blocks: a and d are
        the smallest ones, b and c the products of all. Cost: an operation for each entry and factor.

    Raises:
        ValueError: if there is no factor, or two neighbours are not chained with rank 1.
        TypeError: if the dtypes do not agree.

    Source: Le, Zheng, Riccietti, Gribonval 2022, "Fast learning of fast transforms, with guarantees".

    Example:
        >>> import torch
        >>> from structmat_kernels.kronecker_merge import kronecker_merge
        >>> kronecker_merge([torch.ones(1, 2, 2, 4), torch.ones(2, 2, 2, 2)]).shape
        torch.Size([1, 2, 4, 4])
    """
    if not values:
        raise ValueError("kronecker_merge: values must hold at least one factor, got none")
    first = values[0]
    for i, v in enumerate(values):
        if v.ndim < 4 or v.shape[:-4] != first.shape[:-4]:
            raise ValueError(
                f"kronecker_merge: values[{i}] must have shape (*batch, a, b, c, d) with the batch of values[0], "
                f"{tuple(first.shape[:-4])}, got {tuple(v.shape)}"
            )
        if v.dtype != first.dtype:
            raise TypeError(
                f"kronecker_merge: values[{i}] must have the dtype of values[0], {first.dtype}, got {v.dtype}"
            )
        if v.device != first.device:
            raise ValueError(f"kronecker_merge: values[{i}] must be on the device {first.device}, got {v.device}")
    radices = [(v.shape[-3], v.shape[-2]) for v in values]
    a, d = (values[-1].shape[-4], first.shape[-1]) if mirror else (first.shape[-4], values[-1].shape[-1])
    wanted = reference.shapes(radices, a, d, mirror)
    if [tuple(v.shape[-4:]) for v in values] != wanted:
        raise ValueError(
            f"kronecker_merge: values must be chained with rank 1{' in the mirror' if mirror else ''}: their last "
            f"factor asks for shapes {wanted}, got {[tuple(v.shape[-4:]) for v in values]}"
        )
    if not _backend.use_triton(backend, *values) or 0 in [v.numel() for v in values]:
        return reference.kronecker_merge(values, mirror).to(first.dtype).contiguous()
    batch = first.shape[:-4]
    flat = torch.cat([v.reshape(batch.numel(), -1) for v in values], 1)
    out = _differentiable(flat, " ".join([f"{b}x{c}" for b, c in radices]), a, d, mirror)
    return out.reshape(*batch, *out.shape[1:])
