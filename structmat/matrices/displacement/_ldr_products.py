"""Products with matrices of low displacement rank, ``A M - M B = G H^T``, as functions of tensors.

x has shape (*batch, tokens, n), G (*batch, m, r), H (*batch, n, r), the results (*batch, tokens, m) with ``M x`` in
every row. With ``A^m = e I`` and ``A^k M - M B^k = sum_i A^(k-1-i) G H^T B^i``,

``M (e I - B^m) = sum_{k<m} A^(m-1-k) G H^T B^k``,

where ``H^T B^k x`` for all k is one product with an f-circulant matrix (B = Z_f) and the sum over k one with an
e-circulant matrix (A = Z_e) or a Vandermonde matrix (A diagonal). Sources: Kailath, Kung, Morf 1979; Gohberg,
Olshevsky 1994, "Complexity of multiplication with vectors for structured matrices".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from structmat.matrices.displacement._convolution import (
    convolve,
    f_circulant_diagonals,
    good_size,
    transform,
    untransform,
    working,
)
from structmat.matrices.displacement._kernels import f_circulant_by_kernels, kernels_take

#: Largest number of entries of a piece of a matrix that is multiplied out.
PIECE = 2**22
#: Up to this displacement rank r a product with shifts is 2 r convolutions by the kernels where these run. By torch.fft
#: it takes 2 r + 2 transforms, some of them half as long: as many as r + 1 convolutions at most have.
KERNEL_RANK = 2


def f_circulant_sum(u: Tensor, v: Tensor, f: float | complex, add: bool) -> Tensor:
    """``Z_f(v_j) u_j`` for u (*batch, tokens, r or 1, n) and v (*batch, r, n), summed over j if ``add``."""
    n = v.shape[-1]
    if v.shape[-2] <= KERNEL_RANK and kernels_take(u):
        y = f_circulant_by_kernels(v, u.movedim(-2, -3), f)
        return y.sum(-3) if add else y.movedim(-3, -2)
    size = n if f == 1 and n == good_size(n) else good_size(2 * n - 1)
    entries = v if size == n else f_circulant_diagonals(v, f)
    start = 0 if size == n else n - 1
    spectrum = transform(u, size) * transform(entries, size).unsqueeze(-3)
    return untransform(spectrum.sum(-2) if add else spectrum, size, v.dtype)[..., start : start + n]


def polar(f: float | complex) -> tuple[float, float]:
    """Modulus and angle, by functions that torch.compile traces."""
    z = complex(f)
    return math.hypot(z.real, z.imag), math.atan2(z.imag, z.real)


def divide(x: Tensor, e: float | complex, f: float | complex, m: int) -> Tensor:
    """``(e I - Z_f^m)^-1 x`` over the last dimension."""
    n = x.shape[-1]
    if m == n:  # Z_f^n = f I
        return x / (e - f)
    if x.numel() == 0:  # which MKL's transforms refuse
        return x
    if f == 0:  # nilpotent: sum_q Z_0^(q m) / e^(q+1)
        count = -(-n // m)
        powers = torch.tensor([e ** -(q + 1) for q in range(count)], dtype=x.dtype, device=x.device)
        rows = torch.nn.functional.pad(x, (0, count * m - n)).unflatten(-1, (count, m)).mT
        return convolve(powers, rows, count).mT.flatten(-2)[..., :n]
    # Z_f = D^-1 (phi Z_1) D with D = diag(phi^i), phi^n = f, and the FFT makes Z_1 diagonal.
    i = torch.arange(n, device=x.device, dtype=torch.float64)
    radius, angle = polar(f)
    phase = torch.polar(radius ** (i / n), angle * i / n)
    poles = torch.polar(torch.full_like(i, radius ** (m / n)), (angle - 2 * math.pi * i) * (m / n))
    kind = torch.complex128 if x.dtype in (torch.float64, torch.complex128) else torch.complex64
    scaled = torch.fft.fft(working(x) * phase.to(kind)) / (e - poles).to(kind)
    y = torch.fft.ifft(scaled) / phase.to(kind)
    return (y if x.is_complex() else y.real).to(x.dtype)


def krylov_coefficients(x: Tensor, H: Tensor, f: float | complex, count: int) -> Tensor:
    """``h_j^T Z_f^k x`` for k = count - 1, ..., 0 and every j: shape (*batch, tokens, r, count)."""
    u = f_circulant_sum(x.unsqueeze(-2), H.mT.flip(-1), f, add=False)
    n = u.shape[-1]
    if count > n:  # Z_f^(k + n) = f Z_f^k
        times = -(-count // n)
        u = torch.cat([f**q * u for q in range(times - 1, -1, -1)], -1)
    return u[..., u.shape[-1] - count :]


def shift_shift(x: Tensor, G: Tensor, H: Tensor, e: float | complex, f: float | complex) -> Tensor:
    """A = Z_e, B = Z_f: 2 r + 2 transforms, of about 2 n or 2 m numbers."""
    m, n = G.shape[-2], H.shape[-2]
    if e == 0 and m != n:  # from the other side: (A^n - f I) M = sum_{k<n} A^(n-1-k) G H^T B^k
        u = krylov_coefficients(x, H, f, n)
        y = _shift_krylov(u, G, e)
        return -divide(y, f, e, n)
    return _shift_krylov(krylov_coefficients(divide(x, e, f, m), H, f, m), G, e)


def _shift_krylov(u: Tensor, G: Tensor, e: float | complex) -> Tensor:
    """``sum_{k,j} Z_e^k g_j u[..., j, k]``, where u may have more or fewer entries than G has rows."""
    m, count = G.shape[-2], u.shape[-1]
    if count > m:
        u = torch.nn.functional.pad(u, (0, -count % m))
        u = sum(e**q * piece for q, piece in enumerate(u.split(m, -1)))  # pyright: ignore[reportAssignmentType]
    elif count < m:
        u = torch.nn.functional.pad(u, (0, m - count))
    return f_circulant_sum(u, G.mT, e, add=True)


def _powers(base: Tensor, count: int) -> Tensor:
    """``base^k`` for k < count, in a new last dimension, by doubling: cumprod's gradient divides by the base."""
    powers, square = torch.ones_like(base).unsqueeze(-1), base.unsqueeze(-1)
    while powers.shape[-1] < count:
        powers, square = torch.cat([powers, powers * square], -1), square * square
    return powers[..., :count]


def _kernel(nodes: Tensor, n: int, f: float | complex) -> tuple[Tensor, Tensor]:
    """Factors of ``P[i, k] = v_i^k / (v_i^n - f)`` for k = q c + b: (baby (*batch, m, c), giant (*batch, m, q)).

    Of a node outside of the unit circle, in powers of w = 1 / v: ``w^(n-k) / (1 - f w^n)``. Nothing overflows.
    """
    c = math.isqrt(n - 1) + 1
    count = -(-n // c)
    outside = nodes.abs() > 1
    w = torch.where(outside, nodes, torch.ones_like(nodes)).reciprocal()
    v = torch.where(outside, torch.ones_like(nodes), nodes)
    wc, vc = _powers(w, c + 1), _powers(v, c + 1)
    # From the end, outside: w^(n - q c - b) = w^(c - b) w^((count - 1 - q) c) w^(n - count c), the last of them v^(less
    # than c). Entries k >= n meet zeros.
    padding = wc[..., count * c - n].reciprocal()
    baby = torch.where(outside.unsqueeze(-1), wc[..., 1:].flip(-1), vc[..., :c])
    giant = torch.where(outside.unsqueeze(-1), _powers(wc[..., c], count).flip(-1), _powers(vc[..., c], count))
    scale = torch.where(outside, padding / (1 - f * w.pow(n)), (v.pow(n) - f).reciprocal())
    return baby, giant * scale.unsqueeze(-1)


def _scaled_powers(nodes: Tensor, G: Tensor, n: int, f: float | complex) -> Iterator[tuple[int, int, Tensor]]:
    """``G[i, j] v_i^k / (v_i^n - f)``, (*batch, m, r, end - start), for k from a start to an end."""
    baby, giant = _kernel(nodes, n, f)
    (m, c), r = baby.shape[-2:], G.shape[-1]
    entries = m * r * c * math.prod(torch.broadcast_shapes(nodes.shape[:-1], G.shape[:-2]))
    step = max(1, PIECE // max(1, entries))
    for q in range(0, giant.shape[-1], step):
        powers = (giant[..., q : q + step].unsqueeze(-1) * baby.unsqueeze(-2)).flatten(-2)
        start, end = q * c, min(n, (q + step) * c)
        yield start, end, G.unsqueeze(-1) * powers[..., : end - start].unsqueeze(-2)


def diagonal_shift(x: Tensor, nodes: Tensor, G: Tensor, H: Tensor, f: float | complex) -> Tensor:
    """A = diag(nodes), B = Z_f: ``M = diag(1/(v^n - f)) sum_j diag(g_j) V(v) Z_f(J h_j)``, 2 r m n operations."""
    n = H.shape[-2]
    u = krylov_coefficients(x, H, f, n)  # (*batch, tokens, r, n)
    parts = [
        u[..., start:end].flatten(-2) @ powers.flatten(-2).mT for start, end, powers in _scaled_powers(nodes, G, n, f)
    ]
    return _total(parts)


def shift_diagonal(x: Tensor, nodes: Tensor, G: Tensor, H: Tensor, e: float | complex) -> Tensor:
    """A = Z_e, B = diag(nodes): ``M = -sum_j Z_e(g_j) J V(v)^T diag(h_j / (v^m - e))``."""
    m, r = G.shape[-2:]
    parts = [
        (x @ powers.flatten(-2)).unflatten(-1, (r, end - start))
        for start, end, powers in _scaled_powers(nodes, H, m, e)
    ]
    return -f_circulant_sum(torch.cat(parts, -1).flip(-1), G.mT, e, add=True)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def diagonal_diagonal(x: Tensor, s: Tensor, t: Tensor, G: Tensor, H: Tensor) -> Tensor:
    """A = diag(s), B = diag(t): ``M = G H^T / (s_i - t_j)``, made in pieces of rows; (r + tokens) m n operations."""
    m, n = G.shape[-2], H.shape[-2]
    rows = max(1, PIECE // max(1, n * math.prod(torch.broadcast_shapes(G.shape[:-2], H.shape[:-2]))))
    out = []
    for start in range(0, m, rows):
        piece = slice(start, start + rows)
        block = (G[..., piece, :] @ H.mT) / (s[..., piece].unsqueeze(-1) - t.unsqueeze(-2))
        out.append(x @ block.mT)
    return torch.cat(out, -1)
