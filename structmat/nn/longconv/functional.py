"""Long convolutions over the last dimension: the one function that every layer goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_int, check_tensor
from structmat.matrices.displacement._convolution import good_size, transform, untransform, working
from structmat.nn.longconv._monarch import monarch_convolution
from structmat_kernels.fft_conv import fft_conv, supported

#: How the cyclic convolution inside may be computed.
ALGORITHMS = ("fft", "monarch")


def long_convolution(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    algorithm: str = "fft",
    order: int = 2,
    backend: str | None = None,
) -> Tensor:
    """A convolution of every channel with a filter of its own, of any number of taps, in both directions if asked.

    With x = pre_gate * u::

        y[t] = post_gate[t] * (sum_{s <= t} k[t - s] x[s] + sum_{s > t} k_rev[s - t - 1] x[s] + skip x[t])

    Three FFTs, of the filters, x and y, of a size of at least length + taps - 1 with no prime factor above 7; filters
    longer than the input are cut before, shorter ones cost no more than they have taps. float16 and bfloat16 are
    computed in float32 and rounded once, at the end, also inside an autocast region, which changes nothing; where the
    kernels of a CUDA device take them, in float16 with a scale for each sequence, whose error is below that rounding of
    bfloat16. Errors are
    relative to the norms of filter and input, not to every single output; so a change of u[t] moves outputs before t
    by rounding. Can be differentiated twice, mapped, compiled (again for other FFT sizes) and exported, with a dynamic
    length too (an FFT of twice the length then).

    Args:
        u: shape (*batch, channels, length), floating point or complex; any length, 0 too.
        k: causal taps, shape (*batch or fewer dimensions, channels or 1, taps). Batches broadcast; one channel is
            shared by all. Its precision after float16 and bfloat16 count as float32 is that of u; it may be complex
            where u is real, then the output is complex.
        k_rev: taps for what comes later, (.., channels or 1, taps2): k_rev[0] meets u[t + 1].
        skip: shape (channels,).
        pre_gate: shape of u.
        post_gate: shape of u.
        algorithm: "fft" for torch.fft, "monarch" for block products (see :class:`~structmat.nn.LongConv`).
        order: of "monarch", how many products: 1 to 4.
        backend: of "fft": "auto", "torch" or "triton", whose kernel takes filters without a batch and real numbers of
            at most 32 bits; None is the default.

    Returns:
        Shape of u (broadcast with the batches of the filters), dtype of u (complex if anything is).

    Raises:
        TypeError: if an argument is no tensor, not floating point or complex, or of another precision.
        ValueError: if shapes do not fit, devices differ, or algorithm or order is unknown.

    Source: Monarch factors of the FFT and gates: Fu et al. 2023, "Monarch Mixer"; filters as long as the input: Romero
    et al. 2021, "CKConv"; Poli et al. 2023, "Hyena Hierarchy".

    Example:
        >>> import torch
        >>> from structmat.nn.longconv import long_convolution
        >>> u = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0]])
        >>> long_convolution(u, k=torch.tensor([[1.0, 0.5]]), k_rev=torch.tensor([[0.1]])).round(decimals=4).abs()
        tensor([[1.0000, 0.5000, 0.2000, 2.0000, 1.0000]])
    """
    check_algorithm(algorithm, order)
    check_operands(u, k, k_rev, skip, pre_gate, post_gate)
    if algorithm == "fft" and _kernel_takes(u, k, k_rev, skip, pre_gate, post_gate, backend):
        rows = [None if t is None else t.reshape(-1, *u.shape[-2:]) for t in (u, pre_gate, post_gate)]
        taps = [None if t is None else t.expand(u.shape[-2], -1) for t in (k, k_rev)]
        assert rows[0] is not None and taps[0] is not None
        return fft_conv(rows[0], taps[0], taps[1], skip, rows[1], rows[2], backend=backend).view(u.shape)

    def convolve(x: Tensor) -> Tensor:
        length = x.shape[-1]
        needed, kernel = cyclic_kernel(k, k_rev, length, x.dtype)
        if algorithm == "monarch":
            return monarch_convolution(x, kernel, needed, order)
        size = _fft_size(needed, length)
        spectrum = transform(x, size) * transform(kernel(size), size)
        return untransform(spectrum, size, x.dtype)[..., :length]

    return gated(u, convolve, k, k_rev, skip, pre_gate, post_gate)


def _kernel_takes(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    backend: str | None = None,
) -> bool:
    """Whether one call of the kernel does it: a batch of filters, or gates of another dtype, go the other way."""
    plain = all(t is None or t.ndim == 2 for t in (k, k_rev))
    plain = plain and all(t is None or t.dtype == u.dtype for t in (pre_gate, post_gate))
    if backend == "triton" and not plain:
        raise ValueError('backend="triton" needs filters of shape (channels, taps) and gates of the dtype of u')
    return plain and supported(u, k, k_rev, skip, pre_gate, post_gate, backend=backend) and u.numel() > 0


def circular_convolution(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """``y[t] = sum_s k[(t - s) mod length] u[s]`` over the last dimension; taps beyond the length wrap around.

    FFTs of the length itself, which is slower by a small factor where it has large prime factors. Precision and
    broadcasting as of :func:`long_convolution`.

    Args:
        u: shape (*batch, channels, length), floating point or complex.
        k: shape (*batch or fewer dimensions, channels or 1, taps).
        skip: shape (channels,), as for the gates see :func:`long_convolution`.
        pre_gate: shape of u.
        post_gate: shape of u.

    Returns:
        Shape of u (broadcast with the batch of k), dtype of u (complex if k is).

    Raises:
        TypeError: if an argument is no tensor, not floating point or complex, or of another precision.
        ValueError: if shapes do not fit or devices differ.

    Example:
        >>> import torch
        >>> from structmat.nn.longconv import circular_convolution
        >>> circular_convolution(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 10.0]])).round()
        tensor([[21., 10.,  2.]])
    """
    check_operands(u, k, None, skip, pre_gate, post_gate)
    size = max(u.shape[-1], 1)
    period = wrapped(k, size)
    if _kernel_takes(u, period, None, skip, pre_gate, post_gate):
        later = period.flip(-1)[..., : size - 1]
        return long_convolution(u, period, later, skip, pre_gate, post_gate)

    def convolve(x: Tensor) -> Tensor:
        kernel = period.to(x.dtype)
        return untransform(transform(x, size) * transform(kernel, size), size, x.dtype)[..., : x.shape[-1]]

    return gated(u, convolve, k, None, skip, pre_gate, post_gate)


def gated(
    u: Tensor,
    convolve: Callable[[Tensor], Tensor],
    k: Tensor,
    k_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """``post_gate * (convolve(pre_gate * u) + skip * (pre_gate * u))`` in their dtype, rounded once to u's."""
    dtype = common_dtype(u, (k, k_rev, skip, pre_gate, post_gate))
    x = u.to(dtype)
    if pre_gate is not None:
        x = x * pre_gate.to(dtype)
    y = convolve(x)
    if skip is not None:
        y = y + skip.to(dtype).unsqueeze(-1) * x
    if post_gate is not None:
        y = y * post_gate.to(dtype)
    return y if dtype.is_complex else y.to(u.dtype)


def wrapped(k: Tensor, size: int) -> Tensor:
    """k, padded with zeros or wrapped around to ``size`` taps, added up in float32 at least."""
    rows = -(-k.shape[-1] // size)
    k = F.pad(working(k), (0, max(rows, 1) * size - k.shape[-1]))
    return k.unflatten(-1, (max(rows, 1), size)).sum(-2) if rows > 1 else k


def check_algorithm(algorithm: str, order: int, known: tuple[str, ...] = ALGORITHMS) -> None:
    """Raise unless both are known."""
    if algorithm not in known:
        raise ValueError(f"algorithm must be one of {', '.join(known)}, got {algorithm!r}")
    if check_int("order", order) > 4:
        raise ValueError(f"order must be at most 4, got {order}")


def check_operands(
    u: Any, k: Any, k_rev: Any = None, skip: Any = None, pre_gate: Any = None, post_gate: Any = None
) -> None:
    """Raise unless shapes, dtypes and devices fit together as :func:`long_convolution` says."""
    check_input(u)
    batch, channels = u.shape[:-2], u.shape[-2]
    for name, taps in (("k", k), ("k_rev", k_rev)):
        if name == "k_rev" and taps is None:
            continue
        check_tensor(name, taps, 2)
        assert taps is not None
        if taps.shape[-2] != channels and taps.shape[-2] != 1:
            raise ValueError(
                f"{name} must have shape (.., {channels}, taps) or (.., 1, taps) for u of shape {tuple(u.shape)}, got "
                f"{tuple(taps.shape)}"
            )
        batch = check_broadcast(name, taps.shape[:-2], "u", batch)
        _check_like_u(name, taps, u)
    check_gates(u, skip, pre_gate, post_gate)


def check_gates(u: Tensor, skip: Any = None, pre_gate: Any = None, post_gate: Any = None) -> None:
    """Raise unless skip is a vector of u's channels and gates have u's shape."""
    for name, value, shape in (
        ("skip", skip, u.shape[-2:-1]),
        ("pre_gate", pre_gate, u.shape),
        ("post_gate", post_gate, u.shape),
    ):
        if value is None:
            continue
        check_tensor(name, value)
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        _check_like_u(name, value, u)


def check_input(u: Any, channels: int | None = None, axis: int = -2) -> None:
    """Raise unless u can be convolved, and has so many channels in the dimension ``axis`` from the end."""
    check_tensor("u", u, -axis)
    check_inexact("u", u)
    if u.dtype == torch.complex32:
        raise TypeError("u must not be complex32, whose FFTs are not computed; use .to(torch.complex64)")
    if channels is not None and u.shape[axis] != channels:
        raise ValueError(f"u must have {channels} channels in dimension {axis}, got shape {tuple(u.shape)}")


def _check_like_u(name: str, value: Tensor, u: Tensor) -> None:
    check_inexact(name, value)
    if _precision(value) != _precision(u):
        raise TypeError(
            f"{name} has dtype {value.dtype} but u has {u.dtype}, of another precision; convert one with .to(dtype) "
            "(float16 and bfloat16 go with float32)"
        )
    if value.device != u.device:
        raise ValueError(f"{name} is on {value.device} but u is on {u.device}; move one of them with .to(device)")


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of the same precision, float16 and bfloat16 being float32 here."""
    # torch.compile does not trace dtype.to_complex.
    return torch.complex128 if dtype in (torch.float64, torch.complex128) else torch.complex64


def _precision(x: Tensor) -> torch.dtype:
    return complex_of(x.dtype)


def common_dtype(u: Tensor, others: tuple[Tensor | None, ...]) -> torch.dtype:
    """The dtype of the computation: float32 at least, complex if anything is."""
    dtype = working(u).dtype
    for other in others:
        if other is not None and other.is_complex():
            return complex_of(dtype)
    return dtype


def cyclic_kernel(
    k: Tensor, k_rev: Tensor | None, length: int, dtype: torch.dtype
) -> tuple[int, Callable[[int], Tensor]]:
    """The least size of a cyclic convolution without overlap, and its kernel of any such size.

    Outputs and inputs are up to length - 1 apart: taps of k must not come around to where k_rev's would be, length - 1
    places before the end, nor the other way round.
    """
    k = k[..., :length].to(dtype)
    needed = length + max(k.shape[-1] - 1, 0)
    if k_rev is None:
        return needed, lambda size: F.pad(k, (0, size - k.shape[-1]))
    behind = k_rev[..., : max(length - 1, 0)].to(dtype).flip(-1)

    def kernel(size: int) -> Tensor:
        shape = (*torch.broadcast_shapes(k.shape[:-1], behind.shape[:-1]), -1)
        ahead = F.pad(k, (0, size - k.shape[-1] - behind.shape[-1]))
        return torch.cat([ahead.expand(shape), behind.expand(shape)], -1)

    return max(needed, length + behind.shape[-1]), kernel


def _fft_size(needed: int, length: int) -> int:
    # An exported program with a dynamic length must not depend on where the good sizes lie.
    if isinstance(needed, torch.SymInt) and torch.compiler.is_exporting():
        return 2 * length
    return good_size(needed)
