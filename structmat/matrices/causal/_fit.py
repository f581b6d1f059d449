"""Coefficients of a causal Monarch map from samples of a causal bilinear map."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_int, check_same, check_tensor
from structmat.matrices.causal.causal_monarch import CausalMonarch, resolve_radix
from structmat.matrices.displacement._convolution import convolve
from structmat.projection.truncated import work_dtype


@dataclasses.dataclass(frozen=True)
class CausalFit:
    """What :func:`fit_causal_monarch` found.

    Args:
        matrix: the map, in the dtype of the samples.
        error: relative Frobenius error of its outputs on the samples, measured in double precision.
        plain_error: that of the plain causal convolution.
        start_error: that of the identity blocks from which the search started.
    """

    matrix: CausalMonarch
    error: float
    plain_error: float
    start_error: float


def fit_causal_monarch(
    k: Tensor,
    u: Tensor,
    y: Tensor,
    radix: Sequence[int] | None = None,
    order: int = 2,
    scheme: str = "fourier",
    shared: bool = False,
    steps: int = 200,
) -> CausalFit:
    """The causal Monarch map that is nearest to samples (k, u, y) of a causal bilinear map, as far as L-BFGS finds it.

    A family of matrices W[i] of the kernels k[i] is the case ``fit_causal_monarch(k[:, None], torch.eye(n), W.mT)``.
    The search starts at identity blocks and never ends worse. Of scheme "fourier", and of "chebyshev" of order 1, they
    are the plain convolution: then error <= plain_error. Of "chebyshev" of a higher order the plain convolution need
    not be in the family: compare both errors. It is a local search: what it finds need not be the best.

    Args:
        k: kernels, shape (*, n), floating point or complex.
        u: inputs, shape (*, n); leading dimensions broadcast.
        y: outputs, shape (*, n), the broadcast one.
        radix: see :meth:`CausalMonarch.identity`.
        order: p, where radix is None.
        scheme: "fourier" or "chebyshev".
        shared: one basis for M_0, M_1 and M_2.
        steps: of L-BFGS, in double precision; each costs about one forward and one backward pass over the samples.

    Raises:
        TypeError: if an argument is no inexact tensor, or dtypes differ.
        ValueError: if sizes differ, y is zero or not finite, or the product of the radices is too small.

    Example:
        >>> import torch
        >>> from structmat.matrices.causal import fit_causal_monarch
        >>> k, u = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> decay = 0.9 ** torch.arange(6)
        >>> y = torch.stack([(decay[: t + 1] * k[:, : t + 1] * u[:, : t + 1].flip(-1)).sum(-1) for t in range(6)], -1)
        >>> fit = fit_causal_monarch(k, u, y, radix=(2, 3))
        >>> fit.plain_error > 0.1, fit.error < 1e-3
        (True, True)
    """
    for name, v in (("k", k), ("u", u), ("y", y)):
        check_tensor(name, v, 1)
        check_inexact(name, v)
        check_same(name, v, "y", y)
    n = y.shape[-1]
    if not k.shape[-1] == u.shape[-1] == n:
        raise ValueError(f"k, u and y must have as many entries, got {k.shape[-1]}, {u.shape[-1]} and {n}")
    if tuple(y.shape[:-1]) != check_broadcast("k", k.shape[:-1], "u", u.shape[:-1]):
        raise ValueError(
            f"y must have the batch of k and u, got {tuple(y.shape)}, {tuple(k.shape)} and {tuple(u.shape)}"
        )
    check_int("steps", steps, 0)
    radix = resolve_radix(n, radix, order, scheme)
    dtype = y.dtype
    k, u, y = (v.detach().to(work_dtype(v)) for v in (k, u, y))
    size = torch.linalg.vector_norm(y)
    if not (torch.isfinite(size) and size > 0):
        raise ValueError(f"y must be finite and not zero, its norm is {size.item()}")
    start = CausalMonarch.identity(n, radix, scheme=scheme, dtype=y.dtype, device=y.device)
    eyes = [s.blocks for s in start.output.stages]
    blocks = [[b.clone().requires_grad_() for b in eyes] for _ in range(1 if shared else 3)]

    def loss() -> Tensor:
        found = CausalMonarch.from_blocks(blocks, n, scheme).conv(k, u)
        return ((found - y).abs() / size).square().sum()

    parameters = [b for basis in blocks for b in basis]
    best = first = loss().item()
    if not math.isfinite(first):
        raise ValueError(f"k, u and their products must be finite, the squared error of the start is {first}")
    kept = [b.detach().clone() for b in parameters]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        nonlocal best, kept
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if value.item() < best:
            best, kept = value.item(), [b.detach().clone() for b in parameters]
        return value

    if steps:
        optimizer.step(closure)
    # What is returned is rounded: its error is measured, and where rounding costs more than was won nothing is.
    with torch.no_grad():
        for p, b in zip(parameters, kept, strict=True):
            p.copy_(b.to(dtype))
        error = loss().item()
        if not error <= first:
            for basis in blocks:
                for p, b in zip(basis, eyes, strict=True):
                    p.copy_(b)
            error = first
    fitted = CausalMonarch.from_blocks([[b.detach().to(dtype) for b in basis] for basis in blocks], n, scheme)
    plain_error = (torch.linalg.vector_norm(convolve(k, u, n) - y) / size).item()
    return CausalFit(fitted, error**0.5, plain_error, first**0.5)
