"""The DFT of a tile in float16 as a chain of products whose operands stay in registers.

M = N1 N2 N3 points (N3 = 1 in order 2), t = (t1 N2 + t2) N3 + t3 and f = k1 + N1 (k2 + N2 k3). A tile holds P
transforms. The first product has the matrix on the left, (k1, t1) (t1, columns), with columns (p, t3, t2); its result
is, in the registers of the threads that hold it, the left operand of the next product, (rows, t2) (t2, k2) with rows
(p, t3, k1): only what a thread calls a row and what a column changes. Order 3 exchanges k2 and t3 within the warps.
The inverse takes frequencies as they come and goes the same way back, and only its last product, (t1, k1) (k1,
columns), finds its right operand in shared memory.

Rows and columns are in an order that makes that come true, for tensor cores of Hopper and warps that have 8 of the k1
each: of the 2 N numbers of N complex ones eight real parts precede their eight imaginary ones ("eights"); where
threads exchange numbers a real part precedes its imaginary one ("words"). Twiddles lie in memory in the order in which
threads want them, 16 bytes at a time.

Operands are scaled to at most about the number of points; products accumulate in float32.

Source: Cooley and Tukey 1965; as products with matrices, Li et al. 2021, "tcFFT"; Fu et al. 2023, "FlashFFTConv".
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Radices by the number of points: N1 is 8 times the warps; order 2 needs two transforms in a tile at least.
RADICES = {
    512: (32, 16, 1),
    1024: (32, 32, 1),
    2048: (32, 64, 1),
    4096: (32, 16, 8),
    8192: (32, 16, 16),
    16384: (64, 16, 16),
}


# ---------------------------------------------------------------- tables
def _turns(rows: int, columns: int, period: int) -> Tensor:
    """``exp(-2 pi i r c / period)``, shape (rows, columns); angles are reduced as integers."""
    turns = torch.outer(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")) % period
    return torch.polar(torch.ones_like(turns, dtype=torch.float64), turns.double() * (-2 * math.pi / period))


def _eights(n: int) -> Tensor:
    """Places of the parts of n numbers, (n, 2): eight real parts, their imaginary parts, and so on."""
    j = torch.arange(n, device="cpu")
    return torch.stack([j // 8 * 16 + j % 8, j // 8 * 16 + 8 + j % 8], 1)


def _words(n: int) -> Tensor:
    """Places of the parts of n numbers, (n, 2): each real part before its imaginary one."""
    return torch.arange(2 * n, device="cpu").view(n, 2)


def _right(n: int, inverse: bool, rows: Tensor, columns: Tensor) -> Tensor:
    """The DFT or its inverse as a real (2 n, 2 n) matrix on the right of rows whose parts lie at these places."""
    F = _turns(n, n, n)
    F = F.conj() / n if inverse else F
    B = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device="cpu")
    for a in range(2):
        for b in range(2):
            B[rows[:, a, None], columns[:, b]] = F.real if a == b else (F.imag if b else -F.imag)
    return B


def _last(n: int) -> Tensor:
    """The inverse on the left: columns (part, k1), rows (part, t1 of a half by eights, half, eight of t1).

    Halves are 8 rows apart, in one thread, so that nothing moves when the second one is left out.
    """
    eights = _eights(n)
    columns = eights.T.flatten()
    D = _right(n, True, eights, eights).mT
    rows = eights.view(2, n // 16, 8, 2).permute(3, 1, 0, 2).flatten()
    return D[rows][:, columns]


@functools.cache
def tables(radices: tuple[int, int, int], device: torch.device) -> Tensor:
    """All constants, float16, one after the other.

    The matrices of N1, N2, N3 and of their inverses, and twiddles, real and imaginary parts apart:
    T1 = exp(-2 pi i k1 (t2 N3 + t3) / M) twice, for forward and inverse, each of ``[..., (k1, q), e]``: q and the
    lowest bit of e are those of t2 in an eight, the rest of e is (t3, eight of t2). T2 = exp(-2 pi i k2 t3 / (N2 N3))
    in words as [k2, q, t3 / 4], where q = t3 % 4, and as [t3, q, k2 / 4]. (Reading one table in both places would keep
    it in registers in between.)
    """
    n1, n2, n3 = radices
    e1, e2 = _eights(n1), _eights(n2)
    parts = [_right(n1, False, e1, e1).mT, _last(n1)]
    if n3 == 1:
        parts += [_right(n2, False, e2, e2), _right(n2, True, e2, e2)]
    else:
        e3, w2, w3 = _eights(n3), _words(n2), _words(n3)
        parts += [_right(n2, False, e2, w2), _right(n2, True, w2, e2)]
        parts += [_right(n3, False, w3, e3), _right(n3, True, e3, w3)]
    first = _turns(n1, n2 * n3, n1 * n2 * n3).view(n1, n2 // 8, 4, 2, n3).permute(0, 2, 4, 1, 3)  # k1, q, t3, t2 / 8, b
    e = n2 * n3 // 4
    first = first.reshape(4 * n1, e // min(e, 8), min(e, 8)).transpose(0, 1)
    parts += [first.real, first.imag, first.real, first.imag]
    if n3 > 1:
        second = _turns(n2, n3, n2 * n3)
        for t in (second, second.mT):
            parts.append(torch.view_as_real(t.reshape(len(t), -1, 4).transpose(1, 2).contiguous()))
    return torch.cat([p.flatten() for p in parts]).to(device, torch.float16)


# ---------------------------------------------------------------- arithmetic
def _complex_product(minus: str) -> tl.constexpr:
    """PTX of x w, or of x conj(w): two float16 numbers in a register each; ``minus`` is the sign bit of i x to flip."""
    return tl.constexpr(f"""{{
        .reg .b16 wr, wi, xr, xi;
        .reg .b32 a, b, s;
        mov.b32 {{wr, wi}}, $2;
        mov.b32 {{xr, xi}}, $1;
        mov.b32 a, {{wr, wr}};
        mov.b32 b, {{wi, wi}};
        mov.b32 s, {{xi, xr}};
        xor.b32 s, s, {minus};
        mul.rn.f16x2 s, s, b;
        fma.rn.f16x2 $0, $1, a, s;
    }}""")


def _apart(conjugate: bool) -> tl.constexpr:
    """PTX of two products x w, or x conj(w): parts $2, $3 of x and $4, $5 of w to $0, $1."""
    real, imaginary = ("", "neg.f16x2 b, b;") if conjugate else ("neg.f16x2 a, a;", "")
    return tl.constexpr(f"""{{
        .reg .b32 a, b, c, d;
        mul.rn.f16x2 a, $3, $5;
        mul.rn.f16x2 b, $2, $5;
        {real}
        {imaginary}
        fma.rn.f16x2 c, $2, $4, a;
        fma.rn.f16x2 d, $3, $4, b;
        mov.b32 $0, c;
        mov.b32 $1, d;
    }}""")


_WORDS, _WORDS_CONJUGATE = _complex_product("0x00008000"), _complex_product("0x80000000")
_APART, _APART_CONJUGATE = _apart(False), _apart(True)


@triton.jit
def times(xr, xi, wr, wi, CONJUGATE: tl.constexpr, ASM: tl.constexpr):
    """The parts of x w or x conj(w), in the dtype of x. ASM: of float16, two at a time."""
    if ASM:
        return tl.inline_asm_elementwise(
            _APART_CONJUGATE if CONJUGATE else _APART, "=r,=r,r,r,r,r", [xr, xi, wr, wi],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    ar, ai, br, bi = xr.to(tl.float32), xi.to(tl.float32), wr.to(tl.float32), wi.to(tl.float32)
    if CONJUGATE:
        bi = -bi
    return (ar * br - ai * bi).to(xr.dtype), (ar * bi + ai * br).to(xr.dtype)


@triton.jit
def _joined(ar, ai, ASM: tl.constexpr):
    """Words of both parts, int32."""
    if ASM:
        parts = [ar.to(tl.float32), ai.to(tl.float32)]
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", parts, tl.int32, True, 1)
    low = ar.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (ai.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _parts(x):
    """Of words both parts, float16."""
    return x.to(tl.int16).to(tl.float16, bitcast=True), (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _words_times(x, w, CONJUGATE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            _WORDS_CONJUGATE if CONJUGATE else _WORDS, "=r,r,r", [x, w], dtype=tl.int32, is_pure=True, pack=1
        )
    xr, xi = _parts(x)
    wr, wi = _parts(w)
    yr, yi = times(xr, xi, wr, wi, CONJUGATE, False)
    return _joined(yr, yi, False)


@triton.jit
def matrix(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _first_twiddle(ptr, P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """One part of T1 as (N1 / 8, 8, P N3 N2): every thread reads what it multiplies."""
    E: tl.constexpr = N2 * N3 // 4
    V: tl.constexpr = E if E < 8 else 8
    thread = tl.arange(0, 4 * N1)[:, None, None]
    w = tl.load(ptr + (tl.arange(0, E // V)[None, :, None] * (4 * N1) + thread) * V + tl.arange(0, V)[None, None, :])
    w = tl.permute(tl.reshape(w, (N1 // 8, 8, 4, N3 * N2 // 8, 2)), (0, 1, 3, 2, 4))
    w = tl.broadcast_to(tl.reshape(w, (N1 // 8, 8, 1, N3 * N2)), (N1 // 8, 8, P, N3 * N2))
    return tl.reshape(w, (N1 // 8, 8, P * N3 * N2))


@triton.jit
def _second_twiddle(ptr, P: tl.constexpr, N1: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """T2 in words as (P, N1 / 8, 8, A, B): the same for every k1."""
    ptr = ptr.to(tl.pointer_type(tl.int32))
    q = tl.arange(0, 4 * N1)[:, None, None] % 4
    w = tl.load(ptr + (tl.arange(0, A)[None, :, None] * 4 + q) * (B // 4) + tl.arange(0, B // 4)[None, None, :])
    w = tl.permute(tl.reshape(w, (1, N1 // 8, 8, 4, A, B // 4)), (0, 1, 2, 4, 5, 3))
    return tl.broadcast_to(tl.reshape(w, (1, N1 // 8, 8, A, B)), (P, N1 // 8, 8, A, B))


# ---------------------------------------------------------------- transforms
@triton.jit
def forward_matrices(table, IN: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """The matrices of :func:`forward` of IN of the N1 t1: loaded before a loop they stay in shared memory."""
    M1: tl.constexpr = 4 * N1 * N1
    M2: tl.constexpr = 4 * N2 * N2
    first = matrix(table, 2 * N1, 2 * IN, 2 * N1)
    second = matrix(table + 2 * M1, 2 * N2, 2 * N2, 2 * N2)
    if N3 > 1:
        return first, second, matrix(table + 2 * (M1 + M2), 2 * N3, 2 * N3, 2 * N3)
    else:  # triton takes no return without else here
        return first, second, second


@triton.jit
def inverse_matrices(table, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """The matrices of :func:`inverse`."""
    M1: tl.constexpr = 4 * N1 * N1
    M2: tl.constexpr = 4 * N2 * N2
    real = matrix(table + M1, 2 * N1, N1, 2 * N1)
    imaginary = matrix(table + M1 + N1, 2 * N1, N1, 2 * N1)
    second = matrix(table + 2 * M1 + M2, 2 * N2, 2 * N2, 2 * N2)
    if N3 > 1:
        return real, imaginary, second, matrix(table + 2 * (M1 + M2) + 4 * N3 * N3, 2 * N3, 2 * N3, 2 * N3)
    else:
        return real, imaginary, second, second


@triton.jit
def forward(
    x, first, second, third, table,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The DFT of float16 rows t1 in eights, all or the first half, and columns (p, t3, t2): both parts, float32.

    Of shape (rows, columns / 8, 8): rows (p / 2, k1 / 8, p % 2, k1 % 8) and columns k2; in order 3 rows (p, k2 / 2,
    k1 / 8, k2 % 2, k1 % 8) and columns k3.
    """
    C: tl.constexpr = P * N3 * N2
    M: tl.constexpr = N1 * N2 * N3
    M3: tl.constexpr = 0 if N3 == 1 else 4 * N3 * N3
    TWIDDLES: tl.constexpr = 2 * (4 * N1 * N1 + 4 * N2 * N2 + M3)
    L: tl.constexpr = N2 if N3 == 1 else N3
    y = tl.reshape(tl.dot(first, x).to(tl.float16), (N1 // 8, 2, 8, C))
    ar, ai = tl.split(tl.permute(y, (0, 2, 3, 1)))
    wr = _first_twiddle(table + TWIDDLES, P, N1, N2, N3)
    wi = _first_twiddle(table + TWIDDLES + M, P, N1, N2, N3)
    ar, ai = times(ar, ai, wr, wi, False, ASM)
    x = tl.reshape(tl.join(ar, ai), (N1 // 8, 8, P * N3 // 2, 2, N2 // 8, 8, 2))
    x = tl.reshape(tl.permute(x, (2, 0, 3, 1, 4, 6, 5)), (P * N3 * N1, 2 * N2))
    y = tl.dot(x, second)
    if N3 > 1:
        ar, ai = tl.split(tl.reshape(y, (P, N3 // 2, N1 // 8, 2, 8, N2, 2)))
        x = tl.reshape(tl.permute(_joined(ar, ai, ASM), (0, 2, 4, 5, 1, 3)), (P, N1 // 8, 8, N2, N3))
        x = _words_times(x, _second_twiddle(table + TWIDDLES + 4 * M, P, N1, N2, N3), False, ASM)
        ar, ai = _parts(x)
        x = tl.reshape(tl.join(ar, ai), (P, N1 // 8, 8, N2 // 2, 2, 2 * N3))
        y = tl.dot(tl.reshape(tl.permute(x, (0, 3, 1, 4, 2, 5)), (P * N2 * N1, 2 * N3)), third)
    return tl.split(tl.permute(tl.reshape(y, (P * M // L, L // 8, 2, 8)), (0, 1, 3, 2)))


@triton.jit
def inverse(
    ar, ai, real, imaginary, second, third, table,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The inverse DFT of float16 parts as :func:`forward` gives them: (2, N1 / 2, columns) twice, parts of rows t1.

    The first result has the first half of the t1, the second one the others; columns are (p, t3, t2), numbers float32.
    """
    C: tl.constexpr = P * N3 * N2
    M: tl.constexpr = N1 * N2 * N3
    M3: tl.constexpr = 0 if N3 == 1 else 4 * N3 * N3
    TWIDDLES: tl.constexpr = 2 * (4 * N1 * N1 + 4 * N2 * N2 + M3)
    L: tl.constexpr = N2 if N3 == 1 else N3
    x = tl.reshape(tl.permute(tl.join(ar, ai), (0, 1, 3, 2)), (P * M // L, 2 * L))
    if N3 > 1:
        y = tl.dot(x, third)
        ar, ai = tl.split(tl.reshape(y, (P, N2 // 2, N1 // 8, 2, 8, N3, 2)))
        x = tl.reshape(tl.permute(_joined(ar, ai, ASM), (0, 2, 4, 5, 1, 3)), (P, N1 // 8, 8, N3, N2))
        x = _words_times(x, _second_twiddle(table + TWIDDLES + 4 * M + 2 * N2 * N3, P, N1, N3, N2), True, ASM)
        ar, ai = _parts(x)
        x = tl.reshape(tl.join(ar, ai), (P, N1 // 8, 8, N3 // 2, 2, 2 * N2))
        x = tl.reshape(tl.permute(x, (0, 3, 1, 4, 2, 5)), (P * N3 * N1, 2 * N2))
    y = tl.reshape(tl.dot(x, second).to(tl.float16), (P * N3 // 2, N1 // 8, 2, 8, N2 // 8, 2, 8))
    ar, ai = tl.split(tl.permute(y, (1, 3, 0, 2, 4, 6, 5)))
    ar, ai = tl.reshape(ar, (N1 // 8, 8, C)), tl.reshape(ai, (N1 // 8, 8, C))
    wr = _first_twiddle(table + TWIDDLES + 2 * M, P, N1, N2, N3)
    wi = _first_twiddle(table + TWIDDLES + 3 * M, P, N1, N2, N3)
    ar, ai = times(ar, ai, wr, wi, True, ASM)
    y = tl.dot(real, tl.reshape(ar, (N1, C)))
    y = tl.dot(imaginary, tl.reshape(ai, (N1, C)), y)
    y, rest = tl.split(tl.permute(tl.reshape(y, (2, N1 // 16, 2, 8, C)), (0, 1, 3, 4, 2)))
    return tl.reshape(y, (2, N1 // 2, C)), tl.reshape(rest, (2, N1 // 2, C))
