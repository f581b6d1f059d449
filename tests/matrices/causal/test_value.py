"""Causal Monarch maps as values: sizes, batches, dtypes, derivatives, tracing, errors."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat
from structmat import CausalMonarch
from structmat.matrices.causal import CausalBasis
from structmat.nn.causal_monarch import CausalMonarchConv
from structmat.testing import assert_close

TOL = 1e-12


@given(
    radix=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scheme=st.sampled_from(["fourier", "chebyshev"]),
    data=st.data(),
)
def test_any_size_and_radix(radix, scheme, data, make, upper):
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


def test_shared_bases_batches_and_broadcasting(make):
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


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_dtypes_and_autocast(scheme, make):
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
def test_gradients(scheme, n, radix, make):
    _, bases = make(scheme, n, radix)
    k, u = torch.randn(2, n, dtype=torch.float64)
    leaves = [b.requires_grad_() for basis in bases for b in basis]

    def conv(k, u, *flat):
        return CausalMonarch.from_blocks([flat[0:2], flat[2:4], flat[4:6]], n, scheme).conv(k, u)

    args = (k.requires_grad_(), u.requires_grad_(), *leaves)
    assert torch.autograd.gradcheck(conv, args)
    assert torch.autograd.gradgradcheck(conv, args)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_compile_and_vmap(scheme, make):
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


def test_is_a_value(make):
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


def test_large_size_in_single_precision(make):
    C, _ = make("fourier", 2000, (40, 50), size=1.0)
    k, u = torch.randn(2, 2000, dtype=torch.float64)
    assert_close(C.to(torch.float32).conv(k.float(), u.float()), C.conv(k, u), 2e-5)


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_matrices_in_an_autocast_region(scheme, make):
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
