"""Products of Toeplitz matrices and their kin by the long convolution kernels, in Triton's interpreter on a CPU."""

import pytest
import torch

from structmat import CausalMonarch, CausalToeplitz, Circulant, Hankel, HankelLike, Toeplitz, ToeplitzLike
from structmat.matrices.displacement import _convolution, _kernels, causal_toeplitz, circulant
from structmat.testing import assert_close
from structmat_kernels import backend

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The kernels are asked for, matrices of any size do not multiply out; the shapes that come to the kernels."""
    shapes = []
    conv = _kernels.fft_conv

    def counted(u, k, k_rev=None):
        shapes.append(tuple(u.shape))
        return conv(u, k, k_rev)

    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    monkeypatch.setattr(_kernels, "fft_conv", counted)
    for module in (_convolution, causal_toeplitz, circulant):
        monkeypatch.setattr(module, "DENSE_ENTRIES", 0)
    return shapes


MATRICES = {
    "square": lambda **k: Toeplitz.random((7, 7), **k),
    "tall": lambda **k: Toeplitz.random((13, 5), **k),
    "wide": lambda **k: Toeplitz.random((4, 11), **k),
    "row": lambda **k: Toeplitz.random((1, 9), **k),
    "column": lambda **k: Toeplitz.random((9, 1), **k),
    "1 x 1": lambda **k: Toeplitz.random((1, 1), **k),
    "long": lambda **k: Toeplitz.random((150, 140), **k),
    "batch": lambda **k: Toeplitz.random((3, 6, 8), **k),
    "two batches": lambda **k: Toeplitz.random((2, 3, 5, 4), **k),
    "batch of one": lambda **k: Toeplitz.random((1, 3, 5, 5), **k),
    "hankel": lambda **k: Hankel.random((3, 8, 5), **k),
    "lower": lambda **k: CausalToeplitz.random((3, 9, 9), **k),
    "upper": lambda **k: CausalToeplitz.random((9, 9), upper=True, **k),
    "upper 1": lambda **k: CausalToeplitz.random((1, 1), upper=True, **k),
    "circulant": lambda **k: Circulant.random((10, 10), **k),
    "circulant 1": lambda **k: Circulant.random((1, 1), **k),
    "skew-circulant": lambda **k: Circulant.random((2, 9, 9), f=-1, **k),
    "toeplitz-like": lambda **k: ToeplitzLike.random((8, 8), 2, **k),
    "toeplitz-like, one": lambda **k: ToeplitzLike.random((2, 9, 6), 1, **k),
    "nilpotent": lambda **k: ToeplitzLike.random((9, 9), 1, e=0.0, f=1.0, **k),
    "hankel-like": lambda **k: HankelLike.random((2, 6, 6), 2, **k),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in MATRICES] + [(name, torch.float16) for name in ("tall", "two batches", "upper")],
)
def test_products_are_those_of_the_dense_matrix(name, dtype, device, calls):
    A = MATRICES[name](dtype=torch.float32, device=device).to(dtype)
    dense = A.to(torch.float64).to_dense()
    m, n = A.shape[-2:]
    calls.clear()
    for lead, size, product, D in [
        ((*A.batch_shape, 5), n, A.linear, dense),
        ((2, *A.batch_shape, 3), n, A.linear, dense),
        ((4, *A.batch_shape), n, A.matvec, dense),
        ((*A.batch_shape, 3), m, A.mT.linear, dense.mT),
    ]:
        x = torch.randn(*lead, size, device=device).to(dtype)
        y = product(x)
        wide = x.double()
        wanted = (D @ wide.unsqueeze(-1)).squeeze(-1) if product == A.matvec else wide @ D.mT
        assert y.dtype == dtype and y.shape == wanted.shape
        assert_close(y, wanted, TOLERANCE[dtype])
        assert calls, "the kernels did not run"
        calls.clear()


@pytest.mark.parametrize("name", ["tall", "two batches", "lower", "upper", "circulant", "hankel-like"])
def test_gradients(name, device, calls):
    A = MATRICES[name](device=device).requires_grad_()
    W = A.detach().to(torch.float64).requires_grad_()
    x = torch.randn(*A.batch_shape, 3, A.shape[-1], device=device, requires_grad=True)
    v = x.detach().double().requires_grad_()
    y, wanted = A.linear(x), v @ W.to_dense().mT
    direction = torch.randn_like(y)
    leaves, wide = [x, *leaves_of(A)], [v, *leaves_of(W)]
    found = torch.autograd.grad(y, leaves, direction)
    for g, w in zip(found, torch.autograd.grad(wanted, wide, direction.double()), strict=True):
        assert_close(g, w, 5e-6)


def leaves_of(A):
    return [t for t in torch.utils._pytree.tree_leaves(A) if isinstance(t, torch.Tensor) and t.requires_grad]


def test_one_filter_is_a_channel_and_views_are_not_copied(calls, monkeypatch):
    seen = []
    conv = _kernels.fft_conv
    monkeypatch.setattr(_kernels, "fft_conv", lambda u, *k: seen.append(u) or conv(u, *k))
    T, B = Toeplitz.random((6, 6)), Toeplitz.random((3, 6, 6))
    for A, shape, rows in [
        (T, (2, 5, 6), (10, 1, 6)),
        (B, (3, 5, 6), (5, 3, 6)),
        (B, (7, 3, 1, 6), (7, 3, 6)),  # of matvec
        (Toeplitz.from_diagonals(T.diagonals.expand(1, 1, -1), 6), (2, 4, 5, 6), (40, 1, 6)),
    ]:
        x = torch.randn(shape)
        A._linear(x)
        assert seen[-1].shape == rows and seen[-1].data_ptr() == x.data_ptr()
    x = torch.randn(5, 6)
    B.linear(x.expand(3, 5, 6))  # the same vectors for all
    assert seen[-1].shape == (5, 3, 6) and seen[-1].data_ptr() == x.data_ptr() and seen[-1].stride(1) == 0


def test_the_kernels_are_left_alone_where_they_do_not_run(calls, monkeypatch):
    x = torch.randn(2, 6, dtype=torch.float64)
    T = Toeplitz.random((6, 6))
    T.to(torch.float64).linear(x)  # nothing is raised
    T.to(torch.complex64).linear(x.to(torch.complex64))
    ToeplitzLike.random((6, 6), 3).linear(x.float())  # of this rank transforms are fewer
    long = Toeplitz.random((_kernels.LONGEST + 1, 6))
    assert_close(long.linear(x.float()), x @ long.to_dense().mT.double(), 2e-6)
    assert_close(T.solve(x.float().mT), torch.linalg.solve(T.to_dense().double(), x.mT), 1e-4)
    monkeypatch.setattr(backend, "_DEFAULT", "auto")
    T.linear(x.float())
    assert calls == []


@pytest.mark.parametrize(
    "layout", [((9,), (4, 9)), ((3, 9), (2, 3, 9)), ((2, 3, 9), (2, 3, 9)), ((4, 9), (9,))], ids=str
)
def test_causal_monarch(layout, device, calls, monkeypatch):
    C = CausalMonarch.identity(9, device=device)
    k, u = (torch.randn(shape, device=device, requires_grad=True) for shape in layout)
    y = C.conv(k, u)
    found = torch.autograd.grad(y.square().sum(), (k, u))
    half = C.to(torch.float16).conv(k.detach().half(), u.detach().half())
    assert len(calls) == 2 and half.dtype == torch.float16
    monkeypatch.setattr(backend, "_DEFAULT", "torch")
    k, u = (t.detach().double().requires_grad_() for t in (k, u))
    wanted = CausalMonarch.identity(9, dtype=torch.float64, device=device).conv(k, u)
    assert_close(y, wanted, 2e-6)
    assert_close(half, wanted, 2e-3)
    for g, w in zip(found, torch.autograd.grad(wanted.square().sum(), (k, u)), strict=True):
        assert_close(g, w, 5e-6)
    assert len(calls) == 2


def test_mapped_and_compiled(calls):
    T, x = Toeplitz.random((3, 7, 6)), torch.randn(3, 4, 6)
    mapped = torch.func.vmap(lambda d, v: Toeplitz.from_diagonals(d, 7).linear(v))(T.diagonals, x)
    assert_close(mapped, T.linear(x), 2e-6)
    compiled = torch.compile(lambda A, v: A.linear(v), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(T, x), T.linear(x), 1e-6)
