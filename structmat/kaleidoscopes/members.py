"""Permutations, Hadamard and Fastfood matrices, circulant and Toeplitz matrices, ACDC as kaleidoscope matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat.kaleidoscopes._build import band, convolution, kaleidoscope, ones, scaled
from structmat.kaleidoscopes._routing import route, route_inside_out
from structmat.matrices._kaleidoscope_radices import admissible_size, palindrome
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.kaleidoscope import Kaleidoscope
from structmat.matrices.permutation import Permutation
from structmat.transforms._build import complex_dtype, norm_scale, real_dtype
from structmat.transforms.convolution import operand
from structmat.transforms.permutations import power_of_two


def permutation(perm: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The permutation ``(P x)[i] = x[perm[i]]``, exactly: zeros and ones.

    Width 1, in the next size N without prime factors above 7: n itself where it has none, 12/11 n at most up to n =
    200,000; entries from n on stay where they are. B and B'^* are the two halves of a Beneš network, of radices other
    than 2 of a Clos network: whatever the permutation, the edges between input and output switches can be coloured with
    as many colours as there are inner networks (König). On the CPU; 1000 elements take 10 ms, 65,536 half a second on
    one thread.

    Args:
        perm: shape (*batch, n), every index from 0 to n - 1 once: a tensor, an array or a list.
        dtype: floating point or complex, torch's default dtype if None.
        device: that of perm by default.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (*batch, n, n).

    Raises:
        TypeError: if perm does not hold integers.
        ValueError: if it is no permutation.

    Example:
        >>> import torch
        >>> from structmat import kaleidoscopes
        >>> P = kaleidoscopes.permutation([2, 0, 3, 1])
        >>> P @ torch.tensor([10.0, 20.0, 30.0, 40.0]), P.width, P.expansion
        (tensor([30., 10., 40., 20.]), 1, 1.0)
    """
    perm, dtype = torch.as_tensor(perm, device=device), real_dtype(dtype)
    order, n = Permutation(perm).perm.cpu(), perm.shape[-1]
    size = admissible_size(n)
    with torch.device("cpu"):
        rest = torch.arange(n, size).expand(*order.shape[:-1], size - n)
        factors = route(torch.cat([order, rest], -1), palindrome(size))
    return kaleidoscope(factors, dtype, perm.device, n, n)


def hadamard(n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The Walsh-Hadamard transform in Hadamard's order, as ``scipy.linalg.hadamard``: width 1, expansion 1, B' = I.

    Args:
        n: a power of two.
        norm: None or "backward" for no scaling, "forward" for 1/n, "ortho" for 1/sqrt(n): orthogonal, its own inverse.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n), of real factors.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is no power of two, or norm is unknown.
    """
    factors = [*_hadamard(n), *reversed(ones(palindrome(n)))]
    factors[0] = factors[0] * norm_scale(norm, n)
    return kaleidoscope([f.real for f in factors], real_dtype(dtype), device)


def _hadamard(n: int) -> list[Tensor]:
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.complex128)[..., None]
    levels = power_of_two("n", n)
    return [block.expand(1 << l, 2, 2, n >> (l + 1)) for l in range(levels)] or ones((1,))


def fastfood(
    s: Any, g: Any, perm: Any, b: Any, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kaleidoscope:
    """The Fastfood matrix ``S H G P H B``: diagonal S, G, B, a permutation P, the Hadamard matrix H of entries +1, -1.

    Width 2, expansion 1. Any permutation is also a product B'^* B (a network whose switches join neighbours first),
    which fits between two transforms: S H G and half of P make the first pair, the other half and H B the second one.
    Gradients reach the diagonals. Divide by sigma sqrt(n) for random features of the Gaussian kernel.

    Source: Le, Sarlos and Smola 2013, "Fastfood: approximating kernel expansions in loglinear time".

    Args:
        s: shape (n,), n a power of two; a tensor or an array.
        g: shape (n,).
        perm: shape (n,), ``(P x)[i] = x[perm[i]]``.
        b: shape (n,).
        dtype: floating point or complex, by default the common one of s, g and b.
        device: that of s by default.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n), of real factors where the diagonals are.

    Raises:
        TypeError: if perm does not hold integers.
        ValueError: if sizes differ or are no powers of two, perm is no permutation, or a diagonal is complex and
            dtype is not.

    Example:
        >>> import torch
        >>> from structmat import kaleidoscopes
        >>> V = kaleidoscopes.fastfood(torch.ones(4), torch.randn(4), [2, 0, 3, 1], torch.ones(4))
        >>> V.shape, V.width, V.expansion
        (torch.Size([4, 4]), 2, 1.0)
    """
    s = operand("s", s, dtype, device)
    g, b = operand("g", g, dtype, s.device), operand("b", b, dtype, s.device)
    order = Permutation(torch.as_tensor(perm, device="cpu")).perm
    n = len(s)
    for name, value in (("g", g), ("b", b), ("perm", order)):
        if value.shape != (n,):
            raise ValueError(f"{name} must have shape ({n},) as s has, got {tuple(value.shape)}")
    dtype = torch.promote_types(torch.promote_types(s.dtype, g.dtype), b.dtype)
    H = [f.to(s.device) if dtype.is_complex else f.real.to(s.device) for f in _hadamard(n)]
    with torch.device("cpu"):
        shuffle = route_inside_out(order, palindrome(n))
    first, second = scaled(H, s, g), scaled([f.transpose(1, 2) for f in reversed(H)], None, b)
    return kaleidoscope([*first, *shuffle, *second], dtype, s.device)


def circulant(c: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The circulant matrix with first column c, ``C[i, j] = c[(i - j) mod n]``, as ``scipy.linalg.circulant``.

    Width 1, expansion 1 where n has no prime factor above 7, else 2.13 at most as a :func:`toeplitz` matrix: conj(B) S
    B^T, B of Cooley and Tukey's transform, whose permutations cancel, S diagonal. Gradients reach c. The factors are
    complex, also those of a real matrix; :func:`structmat.transforms.circulant` has real ones, a butterfly of rank 2.

    Args:
        c: shape (n,), a tensor or an array.
        dtype: a complex dtype, by default the complex one of c's.
        device: that of c by default.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        ValueError: if c is not a non-empty vector, or dtype is not complex.

    Example:
        >>> import torch
        >>> from structmat import kaleidoscopes
        >>> kaleidoscopes.circulant([1.0, 2.0, 3.0]).to_dense().real.round(decimals=4)
        tensor([[1., 3., 2.],
                [2., 1., 3.],
                [3., 2., 1.]])
    """
    c = operand("c", c, None, device)
    n, column = len(c), c.to(torch.complex128)
    if admissible_size(n) != n:
        column = band(column, torch.cat([column[:1], column[1:].flip(0)]))
    return kaleidoscope(convolution(column), complex_dtype(dtype or c.dtype.to_complex()), c.device, n, n)


def toeplitz(c: Any, r: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The Toeplitz matrix with first column c and first row r, as ``scipy.linalg.toeplitz``.

    Width 1, expansion 2.13 at most of square ones, 2 for n = 2^k: the corner of a circulant matrix of the next size N
    >= m + n - 1 without prime factors above 7. Gradients reach c and r. The factors are complex, also those of a real
    matrix; :func:`structmat.transforms.toeplitz` has real ones.

    Args:
        c: first column, shape (m,), a tensor or an array.
        r: first row, shape (n,), of which r[0] is ignored; the conjugate of c if None.
        dtype: a complex dtype, by default the complex one of c's and r's.
        device: that of c by default.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (m, n).

    Raises:
        ValueError: if c or r is not a non-empty vector, or dtype is not complex.

    Example:
        >>> from structmat import kaleidoscopes
        >>> kaleidoscopes.toeplitz([1.0, 2.0, 3.0], [1.0, 4.0]).to_dense().real.round(decimals=4)
        tensor([[1., 4.],
                [2., 1.],
                [3., 2.]])
    """
    c = operand("c", c, None, device)
    r = c.conj().resolve_conj() if r is None else operand("r", r, None, c.device)
    common = torch.promote_types(c.dtype, r.dtype).to_complex()
    factors = convolution(band(c.to(torch.complex128), r.to(torch.complex128)))
    return kaleidoscope(factors, complex_dtype(dtype or common), c.device, len(c), len(r))


def acdc(a: Any, d: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The weight of an ACDC layer, y = x A C D C^-1 with x as a row: ``C D C^T A``, A and D diagonal, C^T the DCT.

    Width 1, expansion 4.4 at most, 4 for n = 2^k: C D C^T is the sum of a Toeplitz and a Hankel matrix (Martucci 1994),
    each of width 1 and half the size. C^T is the orthonormal transform of type 2. Gradients reach a and d. A product of
    layers is a kaleidoscope of their number's width. The factors are complex, also those of a real matrix.

    Source: Moczulski, Denil, Appleyard and de Freitas 2016, "ACDC: a structured efficient linear layer".

    Args:
        a: the diagonal of A, shape (n,), a tensor or an array.
        d: the diagonal of D, shape (n,).
        dtype: a complex dtype, by default the complex one of a's and d's.
        device: that of a by default.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n), for which ``A.linear(x)`` is the layer.

    Raises:
        ValueError: if a or d is not a non-empty vector, they differ in size, or dtype is not complex.

    Example:
        >>> import scipy.fft, torch
        >>> from structmat import kaleidoscopes
        >>> x, a, d = torch.randn(3, 8, dtype=torch.float64)
        >>> y = kaleidoscopes.acdc(a, d).linear(x.to(torch.complex128)).real
        >>> spectrum = scipy.fft.dct((a * x).numpy(), norm="ortho") * d.numpy()
        >>> torch.allclose(y, torch.from_numpy(scipy.fft.idct(spectrum, norm="ortho")))
        True
    """
    a = operand("a", a, None, device)
    d = operand("d", d, None, a.device)
    n = len(a)
    if len(d) != n:
        raise ValueError(f"d must have shape ({n},) as a has, got {tuple(d.shape)}")
    wanted = complex_dtype(dtype or torch.promote_types(a.dtype, d.dtype).to_complex())
    # Convolution with t of the vector and its mirror image, of period 2 n.
    t = torch.fft.ifft(torch.cat([d, d.new_zeros(1), d[1:].flip(0)]).to(torch.complex128))
    zeros = t.new_zeros(admissible_size(2 * n - 1) - (2 * n - 1))
    toeplitz, hankel = torch.cat([t[:n], zeros, t[n + 1 :]]), torch.cat([t[1:], zeros])
    parts = [convolution(toeplitz), convolution(hankel, flip=True)]
    both = [kaleidoscope(p, torch.complex128, a.device, n, n) for p in parts]
    found = Kaleidoscope.sum(both) @ Diagonal(a.to(torch.complex128))
    return found.to(wanted)
