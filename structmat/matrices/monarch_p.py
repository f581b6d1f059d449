"""Monarch matrices of any order: butterflies with a radix for every digit, and the Fourier transform among them.

No class of its own: a block-diagonal stage between two digit permutations is a Kronecker-sparse factor, and a product
of one for every digit is a :class:`~structmat.Butterfly`, whose class is closed under transposes and inverses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.chain import prime_radices
from structmat.lazy import Product
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.matrices.permutation import Permutation


def MonarchP(
    factors: Sequence[Tensor],
    radix: Sequence[int | tuple[int, int]] | None = None,
    nrows: int | None = None,
    ncols: int | None = None,
) -> Butterfly:
    """A Monarch matrix of order p: ``F_0 F_1 ... F_{p-1}``, where F_a mixes digit a of the index by dense blocks.

    Indices are written in mixed radix, ``j = j_0 + j_1 n_0 + j_2 n_0 n_1 + ...``, digit 0 the least significant one.
    F_{p-1} is applied first. A digit permutation, a block-diagonal matrix and the inverse permutation make up F_a, and
    that is what a Kronecker-sparse factor is: the result is a :class:`Butterfly` and multiplies by its kernels. Its
    transpose and inverse, ``F_{p-1}^T ... F_0^T`` and ``F_{p-1}^-1 ... F_0^-1``, are again Butterflies, which mix digit
    0 first: the family is closed. ``Monarch(left, right)`` is ``MonarchP([right.mT, left.mT]).mT``. Random ones are
    made by ``Butterfly.random((n, m), radices=[(n_{p-1}, m_{p-1}), ..., (n_0, m_0)]).mT``. N sum(n_a) numbers for
    square blocks, at most twice as many operations a product. Source: Fu et al. 2023, "Monarch Mixer".

    Args:
        factors: for digit a the blocks, shape (*batch, N_a, m_a, n_a): digit a goes from n_a to m_a values. Blocks are
            numbered by the other digits, ``D + A prod_{b<a} n_b`` with D the lower digits and A the higher ones, which
            have been mixed: N_a = prod_{b<a} n_b prod_{b>a} m_b.
        radix: n_a, or (m_a, n_a), of every digit. None takes it from the blocks; otherwise it is compared with them.
        nrows: rows to keep, all by default.
        ncols: columns to keep, all by default.

    Raises:
        TypeError: if a factor is not a floating-point or complex tensor, or dtypes differ.
        ValueError: if numbers of blocks are not those of the radices, the radices are not ``radix``, batches or devices
            differ, or a crop is out of range.

    Example:
        >>> import torch, structmat
        >>> M = structmat.MonarchP([torch.randn(6, 2, 2), torch.randn(4, 3, 3), torch.randn(6, 2, 2)], (2, 3, 2))
        >>> M.shape, [tuple(f.pattern) for f in M.factors], M.inverse().mT.patterns == M.patterns
        (torch.Size([12, 12]), [(6, 2, 2, 1), (2, 3, 3, 2), (1, 2, 2, 6)], True)
    """
    if not isinstance(factors, (tuple, list)) or not factors:
        raise TypeError(f"factors must be a non-empty sequence of tensors, got {type(factors).__name__}")
    for a, blocks in enumerate(factors):
        check_tensor(f"factors[{a}]", blocks, 3)
        check_inexact(f"factors[{a}]", blocks)
    found = [(blocks.shape[-2], blocks.shape[-1]) for blocks in factors]
    if radix is not None:
        wanted = [tuple(r) if isinstance(r, (tuple, list)) else (r, r) for r in radix]
        if wanted != found:
            raise ValueError(f"radix must be that of the blocks, {found} as (rows, columns), got {wanted}")
    stages = []
    for a, blocks in enumerate(factors):
        lower, higher = math.prod([c for _, c in found[:a]]), math.prod([b for b, _ in found[a + 1 :]])
        if blocks.shape[-3] != lower * higher:
            raise ValueError(
                f"factors[{a}] must have {lower * higher} blocks, one for every value of the other digits, "
                f"got shape {tuple(blocks.shape)} with radices {found}"
            )
        stages.append(KroneckerSparse(blocks.unflatten(-3, (higher, lower)).movedim(-3, -1)))
    return Butterfly(tuple(stages), nrows, ncols)  # pyright: ignore[reportArgumentType]


def check_radix(radix: Any) -> tuple[int, ...]:
    """Return the radices as a tuple; raise unless they are a non-empty sequence of positive integers."""
    if not isinstance(radix, (tuple, list)) or not radix:
        raise TypeError(f"radix must be a non-empty sequence of integers, got {radix!r}")
    return tuple([check_int("a radix", r) for r in radix])


def balanced_radix(n: int, order: int) -> tuple[int, ...]:
    """``order`` factors of n, as equal as its prime factors allow, the smallest first.

    Raises:
        ValueError: if n has fewer than ``order`` prime factors.
    """
    primes = [p for p, _ in prime_radices(check_int("n", n), n)]
    if check_int("order", order) > len(primes):
        raise ValueError(f"order must be at most {len(primes)}, the number of prime factors of {n}, got {order}")
    groups = [1] * order
    for p in primes:  # the largest first, always to the smallest group
        groups[groups.index(min(groups))] *= p
    return tuple(sorted(groups))


def MonarchFFT(
    n: int,
    radix: Sequence[int] | None = None,
    order: int = 2,
    *,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Product:
    """The discrete Fourier transform as a Monarch matrix of order p, in the numbering of ``torch.fft.fft``.

    A digit reversal after ``F_0 ... F_{p-1}``, the stages of Cooley and Tukey (decimation in frequency); n sum(n_a)
    complex numbers. Factors are rounded once. :func:`structmat.transforms.dft` has the prime factors as radices and
    sizes with large ones.

    Args:
        n: size.
        radix: n_0, ..., n_{p-1} with product n; by default ``order`` balanced ones.
        order: p, where radix is None.
        inverse: the inverse transform instead, ``torch.fft.ifft``.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        The product of a :class:`Permutation` and a :class:`Butterfly`; shape (n, n).

    Raises:
        TypeError: if n or order is not an integer, or radix is no sequence of integers.
        ValueError: if the radices do not multiply to n, n has too few prime factors, or dtype is not complex.

    Example:
        >>> import torch, structmat
        >>> F = structmat.MonarchFFT(1024, (32, 32), dtype=torch.complex128)
        >>> x = torch.arange(1024.0).to(torch.complex128)
        >>> torch.allclose(F @ x, torch.fft.fft(x)), F.num_params
        (True, 65536)
    """
    # Here, because the transforms are built on the matrices.
    from structmat.transforms._build import complex_dtype, turns

    dtype = complex_dtype(dtype)
    radix = balanced_radix(n, order) if radix is None else check_radix(radix)
    if math.prod(radix) != n:
        raise ValueError(f"radix must have the product n = {n}, got {radix} with {math.prod(radix)}")
    stages, lower = [], n
    for r in reversed(radix):  # digit r of the index turns into a digit of the frequency; what is below it turns along
        size, lower = lower, lower // r
        o, i, rest = torch.arange(r)[:, None, None], torch.arange(r)[:, None], torch.arange(lower)
        # exp(-2 pi i o (i lower + rest) / size), for all values of the higher digits
        values = turns(o * (i * lower + rest), size)
        values = (values.conj() / r if inverse else values).to(device=device, dtype=dtype)
        stages.append(KroneckerSparse(values.resolve_conj().expand(n // size, r, r, lower).contiguous()))
    # The first digit to be mixed, the most significant one, is the least significant one of the frequency.
    place = torch.arange(n).view(*reversed(radix)).permute(*reversed(range(len(radix)))).flatten()
    return Product((Permutation(place.to(stages[0].device), dtype), Butterfly(tuple(reversed(stages)))))
