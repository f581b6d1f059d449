"""The long convolution as an operation: the kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat_kernels import backend as _backend
from structmat_kernels.autograd import differentiable
from structmat_kernels.fft_conv import reference

#: Whether "auto" may choose the kernels; "triton" does in any case. Benchmarks switch it off.
MEASURED = True
#: The longest input of the kernels.
LONGEST = 1 << 18
_COUNT = 6


def _present(t: Tensor) -> Tensor | None:
    """An operand; those that are absent have shape (0,)."""
    return None if t.shape == (0,) else t


def _kernels(u: Tensor, accurate: bool) -> Any:
    """The launches: those that keep a sequence on the chip, or those that work block by block."""
    from structmat_kernels.fft_conv import half, kernel, long

    short = kernel.LONGEST if u.dtype == torch.float32 or accurate else half.LONGEST
    return kernel if u.shape[-1] <= short else long


def _reference(
    u: Tensor, k: Tensor, k_rev: Tensor, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, accurate: bool
) -> Tensor:
    return reference.fft_conv(u, k, *map(_present, (k_rev, skip, pre_gate, post_gate)))


@torch.library.custom_op("structmat::fft_conv", mutates_args=())
def _forward(
    u: Tensor, k: Tensor, k_rev: Tensor, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, accurate: bool
) -> Tensor:
    if _backend.runs_kernels(u) and u.shape[-1] <= LONGEST:
        optional = map(_present, (k_rev, skip, pre_gate, post_gate))
        return _kernels(u, accurate).forward_conv(u, k, *optional, accurate=accurate)
    return _reference(u, k, k_rev, skip, pre_gate, post_gate, accurate).contiguous()


@_forward.register_fake
def _(u: Tensor, k: Tensor, k_rev: Tensor, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, accurate: bool) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("structmat::fft_conv_backward", mutates_args=())
def _backward(
    grad: Tensor,
    u: Tensor,
    k: Tensor,
    k_rev: Tensor,
    skip: Tensor,
    pre_gate: Tensor,
    post_gate: Tensor,
    accurate: bool,
    needs: list[bool],
) -> list[Tensor]:
    operands = (u, k, k_rev, skip, pre_gate, post_gate)
    if _backend.runs_kernels(u) and u.shape[-1] <= LONGEST:
        rev, skipped, pre, post = map(_present, operands[2:])
        found = _kernels(u, accurate).backward_conv(grad, u, k, rev, skipped, pre, post, needs, accurate)
    else:
        with torch.enable_grad():
            wanted = [t.detach().requires_grad_(need) for t, need in zip(operands, needs, strict=True)]
            y = reference.fft_conv(wanted[0], wanted[1], *map(_present, wanted[2:]))
        some = iter(torch.autograd.grad(y, [t for t in wanted if t.requires_grad], grad))
        found = [next(some) if need else None for need in needs]
    return [u.new_empty(0) if g is None else g.contiguous() for g in found]


@_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    k: Tensor,
    k_rev: Tensor,
    skip: Tensor,
    pre_gate: Tensor,
    post_gate: Tensor,
    accurate: bool,
    needs: list[bool],
) -> list[Tensor]:
    operands = (u, k, k_rev, skip, pre_gate, post_gate)
    return [t.new_empty(t.shape) if need else u.new_empty(0) for t, need in zip(operands, needs, strict=True)]


def _vmap(op: Any) -> None:
    """What is mapped becomes more channels: each has a filter of its own in any case."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        n, flat = info.batch_size, []
        for value, dim in zip(args, in_dims, strict=True):
            if not isinstance(value, Tensor) or (dim is None and value.shape == (0,)):
                flat.append(value)
                continue
            full = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
            if full.ndim == 4:  # (batch, channels, length)
                flat.append(full.movedim(0, 1).flatten(1, 2))
            else:
                flat.append(full.flatten(0, 1) if full.ndim > 2 or full.shape[1] else full[0])
        out = op(*flat)

        def split(t: Tensor) -> tuple[Tensor, int]:
            if t.ndim == 3:
                return t.unflatten(1, (n, t.shape[1] // n)), 1
            return (t.unflatten(0, (n, t.shape[0] // n)) if t.shape != (0,) else t.expand(n, 0)), 0

        if isinstance(out, Tensor):
            return split(out)
        pairs = [split(t) for t in out]
        return [t for t, _ in pairs], [dim for _, dim in pairs]

    op.register_vmap(rule)


_vmap(_forward)
_vmap(_backward)
_differentiable = differentiable(_forward, _backward, _reference, _COUNT)


def supported(u: Tensor, *others: Tensor | None, backend: str | None = None) -> bool:
    """Whether :func:`fft_conv` of these operands runs the kernels: "auto" takes them for half precision.

    Args:
        u: shape (batch, channels, length).
        others: the other operands, None where there is none.
        backend: "auto", "torch" or "triton"; None is the default.
    """
    able = _backend.use_triton(backend, u)
    asked = backend == "triton" or _backend._DEFAULT != "auto"
    if not asked and (not MEASURED or u.dtype == torch.float32):
        return False  # of float32 torch.fft is as fast or faster
    real = all(t is None or t.dtype in _backend.DTYPES for t in others)
    return able and real and u.shape[-1] <= LONGEST


def fft_conv(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    accurate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A convolution of every channel with a filter of its own, ahead and behind, with gates and a skip term.

    ``y[t] = post_gate[t] (sum_{s <= t} k[t - s] x[s] + sum_{s > t} k_rev[s - t - 1] x[s] + skip x[t])`` for
    x = pre_gate u. Nothing but the operands is kept for the backward pass.

    Args:
        u: shape (batch, channels, length). The kernels take bfloat16, float16 and float32 of a length up to 262144.
        k: shape (channels, taps), any number of taps; any real dtype, also that of u.
        k_rev: shape (channels, taps2), or None.
        skip: shape (channels,), or None.
        pre_gate: shape and dtype of u, or None.
        post_gate: shape and dtype of u, or None.
        accurate: of half precision, whether the kernels compute in float32 grade; else in float16 with a scale for
            every sequence, whose errors are about half of bfloat16's rounding of y. Two sequences that are neighbours
            in the batch are computed as one complex one: what is not finite in one is in both, and gradients have
            errors relative to the larger of two.
        backend: "auto", "torch" or "triton"; None is the default.

    Returns:
        The shape and dtype of u. Cost: one read of the operands and one write; 16 to 32 N (N1 + N2 + N3) operations of
        products for two sequences, N = N1 N2 N3 the power of two above twice the length. Above a length of 8192 (4096
        in float32 grade) block by block: the same for every block, whose spectra, twice as large as the input, pass
        through memory, and 8 N operations for every block of a sequence and block of the filter that meet.

    Raises:
        ValueError: if the shapes or devices do not agree, or backend="triton" cannot run.
        TypeError: if a gate has another dtype than u.
    """
    if u.ndim != 3:
        raise ValueError(f"fft_conv: u must have shape (batch, channels, length), got {tuple(u.shape)}")
    channels = u.shape[1]
    for name, t, shape in (("k", k, (channels, None)), ("k_rev", k_rev, (channels, None)), ("skip", skip, (channels,))):
        if t is not None and (t.ndim != len(shape) or t.shape[0] != channels):
            wanted = ", ".join("taps" if s is None else str(s) for s in shape)
            raise ValueError(f"fft_conv: {name} must have shape ({wanted}), got {tuple(t.shape)}")
    for name, t in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if t is not None and t.shape != u.shape:
            raise ValueError(f"fft_conv: {name} must have the shape of u, {tuple(u.shape)}, got {tuple(t.shape)}")
        if t is not None and t.dtype != u.dtype:
            raise TypeError(f"fft_conv: {name} must have the dtype of u, {u.dtype}, got {t.dtype}")
    for name, t in (("k", k), ("k_rev", k_rev), ("skip", skip), ("pre_gate", pre_gate), ("post_gate", post_gate)):
        if t is not None and t.device != u.device:
            raise ValueError(f"fft_conv: {name} must be on the device of u, {u.device}, got {t.device}")
    if backend == "triton" and u.shape[-1] > LONGEST:
        raise ValueError(f"fft_conv: the kernels take lengths up to {LONGEST}, got {u.shape[-1]}; use another backend")
    empty = 0 in (*u.shape, k.shape[1])
    if empty or not supported(u, k, k_rev, skip, pre_gate, post_gate, backend=backend):
        return reference.fft_conv(u, k, k_rev, skip, pre_gate, post_gate)
    # Each of its own: torch.compile takes no tensor twice.
    optional = [u.new_empty(0) if t is None or 0 in t.shape else t for t in (k_rev, skip, pre_gate, post_gate)]
    return _differentiable(u, k, *optional, accurate)
