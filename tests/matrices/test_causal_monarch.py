"""Causal Monarch maps against products of polynomials in NumPy, and mutants that the checks must see."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev
from torch import nn

import structmat
from structmat import CausalMonarch, CausalToeplitz
from structmat.matrices.causal import CausalBasis, fit_causal_monarch
from structmat.matrices.causal._echo import echo
from structmat.matrices.causal._evaluation import evaluation
from structmat.nn.causal_monarch import FLOOR, CausalMonarchConv
from structmat.testing import assert_close
from structmat.testing.causal import blocks as near_identity

TOL = 1e-12
CASES = [
    *[("fourier", n, r) for n, r in ((1, (1,)), (1, (1, 1)), (2, (2,)), (3, (2, 2)), (7, (7,)), (12, (3, 4)))],
    *[
        ("fourier", n, r)
        for n, r in ((13, (4, 4)), (12, (2, 3, 2)), (11, (3, 2, 2)), (24, (2, 3, 2, 2)), (17, (2,) * 5))
    ],
    *[("chebyshev", n, r) for n, r in ((1, (1,)), (1, (1, 2)), (2, (3,)), (3, (2, 3)), (7, (13,)), (8, (3, 5)))],
    *[("chebyshev", n, r) for n, r in ((12, (4, 6)), (7, (2, 3, 3)), (13, (5, 5)), (9, (2, 3, 2, 2)), (8, (2,) * 4))],
]
IDS = [f"{s}-{n}-{'x'.join(map(str, r))}" for s, n, r in CASES]


def make(scheme, n, radix, seed=0, shared=False, batch=(), dtype=torch.float64, size=3.0):
    """A map whose blocks are not near the identity, and its blocks."""
    torch.manual_seed(seed)
    bases = [near_identity(radix, scheme, batch, dtype=dtype) for _ in range(1 if shared else 3)]
    for basis in bases:
        for b in basis:
            eye = torch.eye(b.shape[-1], dtype=dtype)
            b.copy_(eye + size * (b - eye) / b.shape[-1] ** 0.5)
    return CausalMonarch.from_blocks(bases, n, scheme), bases * (3 if shared else 1)


def polynomials(blocks, scheme, count=None):
    """Coefficients of every q_j, in powers of Z or in the T_i: one multiplication of polynomials after the other."""
    radix = [b.shape[-1] for b in blocks]
    N = math.prod(radix)
    multiply = np.convolve if scheme == "fourier" else chebyshev.chebmul
    rows = np.zeros((count or N, 2 * N), dtype=blocks[0].numpy().dtype)
    for j in range(N):
        q, lower, weight = np.array([1.0]), 0, 1
        for b in blocks:
            n = b.shape[-1]
            digit = j // weight % n
            factor = np.zeros((n - 1) * weight + 1, dtype=rows.dtype)
            for d in range(n):
                scale = 2 if scheme == "chebyshev" and d else 1  # tau_d
                factor[d * weight] = scale * b[lower, d, digit].numpy()
            q = multiply(q, factor)
            lower, weight = lower + digit * weight, weight * n
        rows[j, : len(q)] = q[: 2 * N]
    for j in range(N, len(rows)):
        rows[j, j] = 1  # the new values of the top digit: powers of Z whose coefficients nobody asks for
    return rows


def oracle(bases, scheme, n, k, u):
    """y of one k and u: two combinations of basis polynomials, their product, its coefficients in the third basis."""
    N = math.prod(b.shape[-1] for b in bases[0])
    q0 = polynomials(bases[0], scheme, 2 * N if scheme == "fourier" else N)
    q1, q2 = polynomials(bases[1], scheme), polynomials(bases[2], scheme)
    order = np.arange(n)[::-1] if scheme == "chebyshev" else np.arange(n)
    f, g = k.numpy() @ q1[order], u.numpy() @ q2[order]
    multiply = np.convolve if scheme == "fourier" else chebyshev.chebmul
    h = multiply(f, g)
    size = len(q0)
    assert np.abs(h[size:]).sum() == 0  # nothing beyond the nodes' number: the product has to wrap nowhere
    h = np.pad(h, (0, max(0, size - len(h))))[:size]
    y = np.linalg.solve(q0[:, :size].T, h)
    return torch.from_numpy(y[2 * n - 2 - np.arange(n)] if scheme == "chebyshev" else y[:n])


def upper(map_, n):
    """Norms of the strict upper parts of the Jacobians in k and in u, relative to the Jacobians'."""
    k, u = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for J in torch.func.jacrev(map_, argnums=(0, 1))(k, u):
        found.append((J.triu(1).norm() / J.norm()).item())
    return max(found)


@pytest.mark.parametrize(("scheme", "n", "radix"), CASES, ids=IDS)
def test_values_and_causality(scheme, n, radix):
    C, bases = make(scheme, n, radix)
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = oracle(bases, scheme, n, k, u)
    for conv in (C.conv, C.conv_by_evaluation):
        assert_close(conv(k, u), expected, TOL)
        assert upper(conv, n) <= TOL
    T = C.toeplitz(k)
    assert_close(T @ u, expected, TOL)
    assert T.to_dense().triu(1).norm() <= TOL * T.to_dense().norm()


@pytest.mark.parametrize(("scheme", "n", "radix"), CASES, ids=IDS)
def test_evaluation_factors(scheme, n, radix):
    """The p block-diagonal stages are the dense matrix of the values at the nodes, which are all different."""
    C, bases = make(scheme, n, radix)
    M, rows = C.kernel.evaluation(), polynomials(bases[1], scheme)
    N, count = M.shape[-1], len(rows)
    assert len(M.factors) == len(radix)
    if scheme == "fourier":
        # Rows are numbered by the digits e_0 + e_1 n_0 + ... of a node, of which the top one is its least significant.
        sizes = (*radix[:-1], 2 * radix[-1])
        node = torch.arange(N).view(sizes).permute(*reversed(range(len(sizes)))).flatten()
        Z = np.exp(-2j * np.pi * node.numpy() / N)
        expected = Z[:, None] ** np.arange(rows.shape[1]) @ rows.T
        assert_close(M.to_dense()[:, :count], torch.from_numpy(expected), TOL)
        return
    plain = CausalBasis.identity(radix, scheme, dtype=torch.float64).evaluation().to_dense()
    Z = plain[:, 1].numpy() / 2 if N > 1 else np.zeros(1)  # column 1 is tau_1 = 2 Z
    nodes = np.cos(np.pi * (2 * np.arange(N) + 1) / (2 * N))  # the roots of T_N
    np.testing.assert_allclose(np.sort(Z), np.sort(nodes), atol=1e-14)
    assert_close(M.to_dense(), torch.from_numpy(chebyshev.chebval(Z, rows.T).T), TOL)


def mutant(blocks, scheme, n, inputs, outputs):
    """``M_0^-1 [(M_1 k) * (M_2 u)]`` for any blocks of any size and any places of the entries."""
    M_0, M_1, M_2 = (evaluation(b, scheme).to_dense() for b in blocks)

    def conv(k, u):
        f, g = (torch.zeros(M.shape[0], dtype=k.dtype).index_copy(0, inputs, v) for M, v in ((M_1, k), (M_2, u)))
        values = (M_1 @ f.to(M_1.dtype)) * (M_2 @ g.to(M_2.dtype))
        return torch.linalg.solve(M_0, values).real[outputs]

    return conv


def test_checks_see_the_degree_bound():
    """Of scheme "fourier" the top digit has degrees below h, and h is at most half of its values."""
    n, t = 12, torch.arange(12)
    _, bases = make("fourier", n, (3, 4))
    doubled = [[b[0], torch.block_diag(*[torch.eye(8).double()]).repeat(3, 1, 1)] for b in bases]
    for d, b in zip(doubled, bases, strict=True):
        d[1][:, :4, :4] = b[1]
    assert upper(mutant(doubled, "fourier", n, t, t), n) <= TOL
    for d in doubled:
        d[1][:, 4:, :4] = 0.3 * torch.randn(3, 4, 4).double()  # still lower triangular: only the degrees are too high
    assert upper(mutant(doubled, "fourier", n, t, t), n) > 1e-2
    assert upper(mutant(bases, "fourier", n, t, t), n) > 1e-2  # too few nodes: N = n


def test_checks_see_the_reversal():
    n, t = 12, torch.arange(12)
    C, bases = make("chebyshev", n, (4, 6))
    good = mutant(bases, "chebyshev", n, n - 1 - t, 2 * n - 2 - t)
    assert upper(good, n) <= TOL
    k, u = torch.randn(2, n, dtype=torch.float64)
    assert_close(good(k, u), C.conv(k, u), TOL)
    assert upper(mutant(bases, "chebyshev", n, t, t), n) > 1e-2


def test_checks_see_too_few_chebyshev_nodes():
    n, t = 8, torch.arange(8)
    _, whole = make("chebyshev", n, (2, 8))
    bases = [[first, second[:, :7, :7]] for first, second in whole]  # N = 14 < 15
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = oracle(whole, "chebyshev", n, k, u)
    few = mutant(bases, "chebyshev", n, n - 1 - t, (2 * n - 2 - t).clamp(max=13))
    enough = mutant(whole, "chebyshev", n, n - 1 - t, 2 * n - 2 - t)
    assert_close(enough(k, u), expected, TOL)
    assert (few(k, u) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize(("scheme", "radix"), [("fourier", (5,)), ("fourier", (3, 2, 2)), ("chebyshev", (21,))])
def test_identity_is_the_plain_convolution(scheme, radix):
    C = CausalMonarch.identity(5 if radix == (5,) else 11, radix, scheme=scheme, dtype=torch.float64)
    k, u = torch.randn(3, C.n, dtype=torch.float64), torch.randn(4, 1, C.n, dtype=torch.float64)
    assert_close(C.conv(k, u), CausalToeplitz(k).matvec(u), TOL)


def test_chebyshev_identity_adds_delayed_terms_only():
    C = CausalMonarch.identity(12, (4, 6), scheme="chebyshev", dtype=torch.float64)
    for r, s in itertools.product(range(12), range(12)):
        k, u = torch.eye(12, dtype=torch.float64)[r], torch.eye(12, dtype=torch.float64)[s]
        y = C.conv(k, u)
        assert y[: r + s].abs().sum() <= TOL
        assert r + s > 11 or abs(y[r + s] - 1) <= TOL


def test_a_smaller_map_is_a_part_of_a_larger_one():
    C, bases = make("fourier", 12, (3, 4))
    for n in (1, 2, 7, 11):
        small = CausalMonarch.from_blocks(bases, n)
        k, u = torch.randn(2, n, dtype=torch.float64)
        extended = [nn.functional.pad(v, (0, 12 - n), value=7.0) for v in (k, u)]
        assert_close(small.conv(k, u), C.conv(*extended)[:n], TOL)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
@pytest.mark.parametrize("transposed", [False, True])
def test_basis_products_and_solves(scheme, transposed):
    C, _ = make(scheme, 6, (2, 3, 2))
    for L in (C.output, C.kernel):
        D = L.to_dense()
        assert D.triu(1).norm() <= TOL and (D.diagonal() != 0).all()
        L, D = (L.mT, D.mT) if transposed else (L, D)
        b = torch.randn(4, 6, 2, dtype=torch.float64)
        assert_close(L.matmul(b), D @ b, TOL)
        assert_close(L.solve(b), torch.linalg.solve(D, b), TOL)
        assert_close(L.logdet(), torch.logdet(D), TOL)
        assert_close(L.diagonal(), D.diagonal(), TOL)


@pytest.mark.parametrize("radix", [(4,), (3, 4), (2, 3, 5)])
def test_echo_inverts_and_transposes(radix):
    N = math.prod(radix)
    eye = torch.eye(N, dtype=torch.float64)
    K = echo(eye, radix).mT
    assert_close(echo(eye, radix, transposed=True).mT, K.mT, 1e-15)
    assert_close(echo(eye, radix, inverse=True).mT @ K, eye, 1e-13)
    assert_close(echo(eye, radix, transposed=True, inverse=True).mT @ K.mT, eye, 1e-13)
    assert torch.linalg.matrix_norm(K, 2) <= 2 ** (len(radix) - 1)


def test_shared_bases_batches_and_broadcasting():
    C, bases = make("fourier", 7, (2, 4), shared=True, batch=(3,))
    assert C.shape == (3, 7, 7)
    k, u = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, 7, dtype=torch.float64)
    y = C.conv(k, u)
    assert y.shape == (5, 3, 7)
    assert_close(C.conv(k, u.expand(2, 5, 3, 7)), y.expand(2, 5, 3, 7), TOL)
    assert_close(C.conv(k[0], u[:, :1]), C.conv(k[:1].expand(3, 7), u[:, :1].expand(5, 3, 7)), TOL)
    assert_close(C.conv_by_evaluation(k, u), y, TOL)
    for i in range(3):
        one = CausalMonarch.from_blocks([[b[i] for b in basis] for basis in bases], 7)
        assert_close(y[:, i], one.conv(k[i], u[:, i]), TOL)
    assert_close(C.toeplitz(k).matvec(u), y, TOL)
    k = torch.eye(7, dtype=torch.float64)[0] + k / 20
    assert_close(C.toeplitz(k).solve(C.conv(k, u[0])), u[0], TOL)


@given(
    radix=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scheme=st.sampled_from(["fourier", "chebyshev"]),
    data=st.data(),
)
def test_any_size_and_radix(radix, scheme, data):
    points = math.prod(radix)
    n = data.draw(st.integers(1, points if scheme == "fourier" else (points + 1) // 2))
    C, _ = make(scheme, n, radix, seed=n)
    k, u = torch.randn(2, n, dtype=torch.float64)
    assert_close(C.conv(k, u), C.conv_by_evaluation(k, u), TOL)
    assert upper(C.conv_by_evaluation, n) <= TOL
    for L in (C.output, C.kernel, C.input):
        # Only values of the top digit count that an index in use has: others cost nothing.
        tops = len({i // (points // radix[-1]) for i in range(L.offset, L.offset + n)})
        used = points // radix[-1] * tops
        adds = used * (len(radix) - 1) if scheme == "chebyshev" else 0
        assert L.flops == 2 * used * (sum(radix[:-1]) + tops) + adds


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_complex_blocks(scheme):
    C, bases = make(scheme, 5, (3, 4), dtype=torch.complex128)
    k, u = torch.randn(2, 5, dtype=torch.complex128)
    expected = oracle(bases, scheme, 5, k, u)
    assert_close(C.conv(k, u), expected, TOL)
    assert_close(C.conv_by_evaluation(k, u), expected, TOL)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_dtypes_and_autocast(scheme):
    C, _ = make(scheme, 64, (8, 16), size=1.0)
    k, u = torch.randn(3, 64, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low, args = C.to(dtype), (k.to(dtype), u.to(dtype))
        y = low.conv(*args)
        assert y.dtype == dtype
        # What is computed in float32 differs from double precision by the last rounding.
        assert_close(y, low.to(torch.float64).conv(*(v.double() for v in args)))
    with pytest.raises(TypeError, match="toeplitz needs float32"):
        C.to(torch.bfloat16).toeplitz(k.bfloat16())
    single = C.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = single.conv(k.float(), u.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, single.conv(k.float(), u.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="dtype"):
        single.conv(k.double(), u.double())


@pytest.mark.parametrize(("scheme", "n", "radix"), [("fourier", 5, (2, 3)), ("chebyshev", 3, (2, 3))])
def test_gradients(scheme, n, radix):
    _, bases = make(scheme, n, radix)
    k, u = torch.randn(2, n, dtype=torch.float64)
    leaves = [b.requires_grad_() for basis in bases for b in basis]

    def conv(k, u, *flat):
        return CausalMonarch.from_blocks([flat[0:2], flat[2:4], flat[4:6]], n, scheme).conv(k, u)

    args = (k.requires_grad_(), u.requires_grad_(), *leaves)
    assert torch.autograd.gradcheck(conv, args)
    assert torch.autograd.gradgradcheck(conv, args)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_compile_and_vmap(scheme):
    C, _ = make(scheme, 5, (3, 4))
    k, u = torch.randn(2, 5, dtype=torch.float64), torch.randn(6, 2, 5, dtype=torch.float64)
    compiled = torch.compile(lambda C, k, u: C.conv(k, u), backend="aot_eager", fullgraph=True)
    y = C.conv(k, u)
    assert_close(compiled(C, k, u), y, TOL)
    defined = torch.compile(lambda C, k, u: C.conv_by_evaluation(k, u), backend="aot_eager", fullgraph=True)
    assert_close(defined(C, k, u), y, TOL)
    assert_close(torch.func.vmap(C.conv, (None, 0))(k, u), y, TOL)
    batch, bases = make(scheme, 5, (3, 4), batch=(4,))
    ones = torch.func.vmap(lambda C, u: C.conv(k[0], u))(batch, u[:4, 0])
    for i in range(4):
        one = CausalMonarch.from_blocks([[b[i] for b in basis] for basis in bases], 5, scheme)
        assert_close(ones[i], one.conv(k[0], u[i, 0]), TOL)


def test_is_a_value():
    C, _ = make("chebyshev", 3, (2, 3))
    k, u = torch.randn(2, 3, dtype=torch.float64)
    copy = pickle.loads(pickle.dumps(C))
    assert torch.equal(copy.conv(k, u), C.conv(k, u))
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, C)  # two stages: 4^2 / 4
    assert_close(doubled.conv(k, u), 4 * C.conv(k, u), TOL)
    assert C.requires_grad_().detach().output.stages[0].blocks.requires_grad is False
    assert "CausalMonarch(shape=(3, 3)" in repr(C)


def test_empty_batches():
    C = CausalMonarch.identity(5)
    assert C.conv(torch.ones(0, 5), torch.ones(5)).shape == (0, 5)
    assert C.conv(torch.ones(5), torch.ones(2, 0, 5)).shape == (2, 0, 5)


def test_errors():
    C = CausalMonarch.identity(6, (2, 3))
    with pytest.raises(ValueError, match="k must have n = 6 entries"):
        C.conv(torch.ones(5), torch.ones(6))
    with pytest.raises(TypeError, match=r"u has dtype torch\.float64"):
        C.conv(torch.ones(6), torch.ones(6).double())
    with pytest.raises(ValueError, match="do not broadcast"):
        C.conv(torch.ones(2, 6), torch.ones(3, 6))
    with pytest.raises(ValueError, match="at least n = 7"):
        CausalMonarch.identity(7, (2, 3))
    with pytest.raises(ValueError, match="at least 2 n - 1 = 13"):
        CausalMonarch.identity(7, (3, 4), scheme="chebyshev")
    with pytest.raises(ValueError, match="scheme must be one of"):
        CausalMonarch.identity(7, scheme="hermite")
    with pytest.raises(TypeError, match="radix must be an integer"):
        CausalMonarch.identity(7, (2.0, 4))
    with pytest.raises(TypeError, match="radix must be a non-empty sequence"):
        CausalBasis.identity(6)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"blocks must be a torch\.Tensor"):
        CausalMonarch.from_blocks([[torch.eye(2)[None], "x"]], 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one basis or of three"):
        CausalMonarch.from_blocks([[torch.eye(6)[None]]] * 2, 6)
    with pytest.raises(ValueError, match="stage 1 must have 2 uncropped square blocks"):
        CausalBasis((torch.eye(2)[None], torch.eye(3)[None]))
    with pytest.raises(ValueError, match="n \\+ offset must be at most"):
        CausalBasis((torch.eye(2)[None],), n=3)
    with pytest.raises(ValueError, match="offset must be 0"):
        CausalBasis((torch.eye(2)[None],), "fourier", 1, 1)
    with pytest.raises(ValueError, match="kernel must have size 6"):
        CausalMonarch(C.output, CausalMonarch.identity(5).kernel, C.input)
    with pytest.raises(TypeError, match="output must be a CausalBasis"):
        CausalMonarch(structmat.Diagonal(torch.ones(6)), C.kernel, C.input)
    singular = CausalMonarch.from_blocks([[torch.zeros(1, 6, 6)]], 6)
    with pytest.raises(torch.linalg.LinAlgError, match="zero on their diagonal"):
        singular.conv(torch.ones(6), torch.ones(6))


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_conditioning(scheme):
    C, _ = make(scheme, 7, (3, 5), size=2.0)
    report = C.conditioning()
    for part, cond, bound in zip((C.output, C.kernel, C.input), report.cond, report.bound, strict=True):
        assert_close(cond, torch.linalg.cond(part.to_dense()), TOL)
        assert 1 <= cond <= bound
    if scheme == "fourier":  # the transform is unitary up to a factor
        whole = CausalMonarch.from_blocks([C.output.triangles()], C.output.points)
        M = whole.output.evaluation().to_dense()[:, : whole.n]
        assert_close(torch.linalg.cond(M), whole.conditioning().cond[0], TOL)
    assert CausalMonarch.identity(7, scheme="fourier").conditioning().bound[0] == 1


@pytest.mark.parametrize(("scheme", "radix"), [("fourier", (3, 2)), ("chebyshev", (2, 6))])
def test_fit_finds_a_member(scheme, radix):
    C, _ = make(scheme, 6, radix, size=1.0)
    k, u = torch.randn(2, 40, 6, dtype=torch.float64)
    fit = fit_causal_monarch(k, u, C.conv(k, u), radix, scheme=scheme, steps=100)
    assert fit.error < 1e-3 and fit.plain_error > 0.05
    assert_close(fit.matrix.conv(k, u), C.conv(k, u), 1.01 * fit.error + 1e-12)


def test_fit_of_matrices_is_never_worse_than_plain():
    torch.manual_seed(0)
    k, W = torch.randn(3, 5), torch.randn(3, 5, 5).tril()
    fit = fit_causal_monarch(k[:, None], torch.eye(5), W.mT.contiguous(), (2, 3), shared=True, steps=30)
    assert fit.matrix.dtype == torch.float32
    plain = CausalToeplitz(k).to_dense()
    assert abs(fit.plain_error - ((plain - W).norm() / W.norm()).item()) < 1e-6
    found = torch.stack([fit.matrix.toeplitz(v).to_dense() for v in k])
    assert abs(fit.error - ((found - W).norm() / W.norm()).item()) < 1e-5
    assert fit.error < fit.plain_error == pytest.approx(fit.start_error)
    assert found.triu(1).norm() < 1e-4
    none = fit_causal_monarch(k[:, None], torch.eye(5), plain.mT.contiguous(), (2, 3), steps=5)
    assert none.error < 1e-6
    with pytest.raises(ValueError, match="y must be finite and not zero"):
        fit_causal_monarch(k, k, torch.zeros(3, 5))


@pytest.mark.parametrize("diagonal", ["unit", "softplus"])
@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_module(scheme, diagonal):
    torch.manual_seed(0)
    layer = CausalMonarchConv(7, channels=3, order=2, scheme=scheme, diagonal=diagonal, dtype=torch.float64)
    start = CausalMonarch.identity(7, layer.radix, scheme=scheme, dtype=torch.float64)
    u, k = torch.randn(4, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    assert_close(layer(u, k), start.conv(k, u), TOL)
    target = torch.randn(4, 3, 7, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = nn.functional.mse_loss(layer(u, k), target)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(u, k), target).backward()
        optimizer.step()
    assert nn.functional.mse_loss(layer(u, k), target) < before
    assert all(p.abs().sum() > 0 for p in layer.parameters())
    C = layer.map()
    one = CausalMonarch.from_blocks([[b[0] for b in p.triangles()] for p in (C.output, C.kernel, C.input)], 7, scheme)
    assert upper(one.conv, 7) <= TOL
    least = min(b.diagonal(dim1=-2, dim2=-1).min().item() for b in C.output.triangles())
    assert least == 1 if diagonal == "unit" else least >= FLOOR
    other = CausalMonarchConv(7, channels=3, order=2, scheme=scheme, diagonal=diagonal, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u, k), layer(u, k))
    layer.reset_parameters()
    assert_close(layer(u, k), start.conv(k, u), TOL)


def test_module_arguments():
    assert len(list(CausalMonarchConv(6, shared=True, order=3).parameters())) == 3
    with pytest.raises(ValueError, match="diagonal must be"):
        CausalMonarchConv(6, diagonal="free")
    with pytest.raises(ValueError, match="at least n = 6"):
        CausalMonarchConv(6, radix=(2, 2))
    with pytest.raises(ValueError, match="dtype must be floating point"):
        CausalMonarchConv(6, dtype=torch.complex64)


def test_large_size_in_single_precision():
    C, _ = make("fourier", 2000, (40, 50), size=1.0)
    k, u = torch.randn(2, 2000, dtype=torch.float64)
    assert_close(C.to(torch.float32).conv(k.float(), u.float()), C.conv(k, u), 2e-5)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_bases_of_different_radices(scheme):
    """Their nodes are not in one order: conv needs none, the definition refuses."""
    torch.manual_seed(0)
    bases = [near_identity(r, scheme, dtype=torch.float64) for r in ((3, 4), (2, 6), (2, 2, 3))]
    C = CausalMonarch.from_blocks(bases, 6, scheme)
    k, u = torch.randn(2, 6, dtype=torch.float64)
    assert_close(C.conv(k, u), oracle(bases, scheme, 6, k, u), TOL)
    assert upper(C.conv, 6) <= TOL
    with pytest.raises(ValueError, match="same radices"):
        C.conv_by_evaluation(k, u)


@pytest.mark.parametrize(("scheme", "n"), [("fourier", 7), ("chebyshev", 7), ("chebyshev", 3)])
def test_blocks_that_are_not_read(scheme, n):
    """Rows and columns of the top digit's values that no index has may hold anything, as may the other triangle."""
    C, bases = make(scheme, n, (3, 6))
    k, u = torch.randn(2, n, dtype=torch.float64)
    expected = C.conv(k, u)
    spoilt = []
    for L, (low, top) in zip((C.output, C.kernel, C.input), bases, strict=True):
        first, last = L.offset // 3, (L.offset + n - 1) // 3 + 1
        assert (first, last) == L.places
        other = torch.full_like(top, torch.nan)
        other[:, first:last, first:last] = top[:, first:last, first:last]
        spoilt.append([low + (low == 0) * 7.0, other])
    D = CausalMonarch.from_blocks(spoilt, n, scheme)
    assert torch.equal(D.conv(k, u), expected)
    assert torch.equal(D.toeplitz(k) @ u, C.toeplitz(k) @ u)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_matrices_in_an_autocast_region(scheme):
    C, _ = make(scheme, 12, (3, 8), dtype=torch.float32, size=1.0)
    k, u = torch.randn(2, 12)
    k[0] = 3
    y = C.conv(k, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        T = C.toeplitz(k)
        found, solved, defined = T.matvec(u), T.solve(y), C.conv_by_evaluation(k, u)
    assert found.dtype == torch.bfloat16 and solved.dtype == defined.dtype == torch.float32
    assert_close(found, y, 3e-2)  # every one of the factors rounds
    assert_close(solved, u, 1e-5)
    assert_close(defined, y, 1e-5)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_meta_device_and_default_dtype(scheme):
    C = CausalMonarch.identity(6, scheme=scheme, dtype=torch.float32)
    vectors = torch.empty(2, 6, device="meta")
    assert C.to("meta").conv(*vectors).shape == (6,)
    assert CausalMonarchConv(6, scheme=scheme, device="meta")(*vectors).shape == (6,)
    torch.set_default_dtype(torch.float64)
    try:
        assert {c.dtype for c in (*C.conditioning().cond, *C.conditioning().bound)} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(TypeError, match="conditioning needs float32"):
        C.to(torch.float16).conditioning()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fit_reports_the_error_of_what_it_returns(dtype):
    """Coefficients are rounded to the dtype of the samples, which costs more than it may have won."""
    torch.manual_seed(0)
    for change in (0.3, 3e-3, 1e-6):
        C, _ = make("fourier", 6, (3, 2), size=change)
        k, u = torch.randn(2, 40, 6, dtype=torch.float64)
        k, u, y = (v.to(dtype) for v in (k, u, C.conv(k, u)))
        fit = fit_causal_monarch(k, u, y, (3, 2), steps=20)
        k, u, y = k.double(), u.double(), y.double()
        measured = ((fit.matrix.to(torch.float64).conv(k, u) - y).norm() / y.norm()).item()
        assert fit.error == pytest.approx(measured, rel=1e-6)
        assert fit.error <= fit.plain_error
    with pytest.raises(ValueError, match="must be finite"):
        fit_causal_monarch(k * torch.nan, u, y)


def test_module_has_no_parameters_that_are_not_read():
    layer = CausalMonarchConv(60, radix=(10, 12), scheme="chebyshev", dtype=torch.float64)
    # 60 indices have 6 values of the top digit, 59, ..., 118 have 7.
    assert [p.shape[-1] for basis in layer.strict for p in basis] == [45, 21, 45, 15, 45, 15]
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    layer(*torch.randn(2, 60, dtype=torch.float64)).square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert [
        p.shape[-1]
        for basis in CausalMonarchConv(60, radix=(10, 12), scheme="chebyshev", shared=True).strict
        for p in basis
    ] == [45, 66]
