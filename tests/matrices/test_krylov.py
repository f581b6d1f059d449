"""Matrices of low displacement rank with learned operators, beyond what the market tests."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structmat import LDRSubdiagonal, LDRTridiagonal, ToeplitzLike
from structmat.matrices.displacement import _krylov_subdiagonal, _krylov_tridiagonal
from structmat.testing import CHECKS, Entry, assert_close
from structmat.testing.displacement import dense_krylov, krylov_operators

CLASSES = (LDRSubdiagonal, LDRTridiagonal)
classes = pytest.mark.parametrize("cls", CLASSES)
corners = pytest.mark.parametrize("corner", [True, False])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def member(cls, shape, rank, corner=True, seed=0, dtype=torch.float64, low=0.5, high=1.1):
    """Operators with entries from ``low`` to ``high`` below the diagonal, and small ones elsewhere."""
    M = cls.random(shape, rank, corner, generator=seeded(seed), dtype=dtype)
    for t, size in ((M.a, M.shape[-2]), (M.b, M.shape[-1])):
        below = size if corner else size - 1
        t[..., :below].uniform_(low, high, generator=seeded(seed + 1))
        t[..., below:].uniform_(-0.05, 0.05, generator=seeded(seed + 2))
    return M


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(CLASSES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_products_at_every_size(cls, m, n, rank, corner, seed):
    M = member(cls, (m, n), rank, corner, seed)
    D = dense_krylov(M)
    x, y = (torch.randn(3, size, dtype=torch.float64, generator=seeded(seed)) for size in (n, m))
    assert_close(M.linear(x), x @ D.mT)
    assert_close(M.mT.linear(y), y @ D)
    assert_close(M.mT.mT.linear(x), x @ D.mT)


@corners
@pytest.mark.parametrize("leaf", [1, 3, 32])
@pytest.mark.parametrize("shape", [(200, 200), (37, 260), (131, 5), (1, 33)], ids=str)
def test_every_length_of_leaves(leaf, shape, corner, monkeypatch):
    """Whatever is multiplied out and whatever convolved."""
    monkeypatch.setattr(_krylov_subdiagonal, "LEAF", leaf)
    monkeypatch.setattr(_krylov_tridiagonal, "CHUNK", {1: 2, 3: 8, 32: 32}[leaf])
    for cls in CLASSES:
        M = member(cls, shape, 2, corner).to(torch.complex128)
        M = M + 1j * M if cls is LDRSubdiagonal else M * (1 + 0.5j)
        D = dense_krylov(M)
        x, y = (torch.randn(2, size, dtype=torch.complex128, generator=seeded()) for size in reversed(shape))
        assert_close(M.linear(x), x @ D.mT)
        assert_close(M.mT.linear(y), y @ D)


@classes
@corners
@pytest.mark.parametrize("check", ["gradients", "vmap", "per_sample_gradients", "structure"])
def test_levels_and_chunks(cls, corner, check, monkeypatch):
    """What the market tests at sizes of one leaf or chunk."""
    monkeypatch.setattr(_krylov_subdiagonal, "LEAF", 3)
    monkeypatch.setattr(_krylov_tridiagonal, "CHUNK", 2 if check == "gradients" else 4)
    for shape in ((7, 6), (2, 5, 6)):
        make = lambda dtype, device: cls.random(shape, 2, corner, dtype=dtype, device=device)  # noqa: B023, E731
        CHECKS[check](Entry("levels", make, dense=dense_krylov), "cpu")


@classes
def test_levels_and_chunks_compile(cls):
    M = member(cls, (70, 65), 1)
    x = torch.randn(3, 65, dtype=torch.float64, generator=seeded())
    torch.compiler.reset()
    compiled = torch.compile(lambda M, x: M.linear(x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(M, x), x @ dense_krylov(M).mT)


@classes
@corners
def test_4096_in_single_precision(cls, corner):
    """Entries in [0.5, 1.1]: finite and accurate, with gradients."""
    n = 4096
    M = member(cls, (n, n), 1, corner, dtype=torch.float32)
    x = torch.randn(2, n, generator=seeded(5))
    exact = M.to(torch.float64)
    expected = exact.linear(x.double()), exact.mT.linear(x.double())
    M.requires_grad_()
    x.requires_grad_()
    y, z = M.linear(x), M.mT.linear(x)
    assert_close(y, expected[0], 1e-5)
    assert_close(z, expected[1], 1e-5)
    gradients = torch.autograd.grad(y.square().mean() + z.square().mean(), (x, *M.tensors()))
    assert all(g.isfinite().all() and g.any() for g in gradients)


@corners
def test_reference_of_4096_is_the_definition(corner):
    """Single rows of the matrix at full size, by repeated products with the operators."""
    n = 2000
    M = member(LDRSubdiagonal, (n, n), 1, corner, low=0.9)
    x = torch.randn(n, dtype=torch.float64, generator=seeded())
    y, v = torch.zeros_like(x), x
    powers, h = M.left[:, 0], M.right[:, 0]
    pad = (0, 0) if corner else (0, 1)
    a, b = (torch.nn.functional.pad(t, pad) for t in (M.a, M.b))
    for _ in range(n):
        y = y + powers * (h @ v)
        powers, v = (a * powers).roll(1), (b * v).roll(1)
    assert_close(M @ x, y, 1e-12)


@corners
@pytest.mark.parametrize("shape", [(9, 9), (6, 11), (11, 6)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_displacement_ranks(shape, rank, corner):
    for cls in CLASSES:
        for up in (False, True):
            M = member(cls, shape[::-1] if up else shape, rank, corner, low=0.8)
            M = M.mT if up else M
            A, B = krylov_operators(M)
            D = dense_krylov(M)
            values = torch.linalg.svdvals(D - A @ D @ B)
            measured = int((values > 1e-11 * D.norm()).sum())
            if cls is LDRSubdiagonal:
                assert measured == M.displacement_rank == rank
            else:
                assert measured <= M.displacement_rank == 2 * rank


def test_shifts_give_toeplitz_like_matrices():
    """M - A M B = 2 G H^T for A = Z_1, B = Z_-1, and (M - A M B) B^-1 = M B^-1 - A M has the same rank."""
    n = 8
    M = LDRSubdiagonal.random((n, n), 2, generator=seeded(), dtype=torch.float64)
    M.a.fill_(1)
    M.b.fill_(1)
    M.b[-1] = -1
    T = ToeplitzLike.random((n, n), 2, generator=seeded(), dtype=torch.float64)
    D = M.to_dense()
    # M - Z_1 M Z_-1 = 2 G H^T; times Z_-1^-1 = -Z_-1^T ... it is M Z_-1^-1 - Z_1 M.
    inverse = T.B.inverse().to_dense()
    values = torch.linalg.svdvals(D @ inverse - T.A.to_dense() @ D)
    assert int((values > 1e-11).sum()) == 2
    assert_close(D - T.A.to_dense() @ D @ T.B.to_dense(), 2 * M.left @ M.right.mT)


@classes
def test_zeros_and_infinities_stay_local(cls):
    """An entry that is zero cuts, and has a gradient; large and tiny entries do not meet in quotients."""
    M = member(cls, (150, 150), 1, False, dtype=torch.float32)
    M.a[20], M.b[70] = 0, 0
    M.a[100:104], M.a[110:114] = 1e-12, 3.0
    exact = M.to(torch.float64)
    M.requires_grad_()
    y = M.linear(torch.ones(1, 150))
    assert_close(y, exact.linear(torch.ones(1, 150, dtype=torch.float64)), 1e-5)
    gradients = torch.autograd.grad(y.square().sum(), M.tensors(), create_graph=True)
    assert gradients[0][20] != 0 and gradients[1][70] != 0
    second = torch.autograd.grad(gradients[0].square().sum() + gradients[1].square().sum(), M.tensors())
    assert all(g.isfinite().all() for g in (*gradients, *second))


@classes
def test_sums_of_the_same_operators_and_multiples(cls):
    M = member(cls, (6, 5), 1)
    N = M._map_generators(M.left + 1, M.right - 1)
    total = M + 2 * N
    assert type(total) is cls and total.left.shape == (6, 2)
    assert_close(total.to_dense(), dense_krylov(M) + 2 * dense_krylov(N))
    assert type(M + member(cls, (6, 5), 1, seed=9)) is not cls
    assert_close((M + M.mT.mT).to_dense(), 2 * dense_krylov(M))


@classes
@corners
@pytest.mark.parametrize("n", [1, 2, 300])
def test_random_operators_have_a_spectral_radius_of_about_one(cls, corner, n):
    M = cls.random((n, n), 1, corner, generator=seeded(), dtype=torch.float64)
    A, B = krylov_operators(M)
    for operator in (A, B):
        if corner and n > 2:
            assert 0.8 < torch.linalg.eigvals(operator).abs().max() < 1.25
        assert torch.linalg.matrix_power(operator, n).norm(dim=-1).amax() < 20
    assert abs(M.to_dense().norm().square() / n - 1 / 3) < 0.1


def test_half_precision_is_computed_in_single_precision():
    for cls in CLASSES:
        M = member(cls, (300, 300), 1, dtype=torch.float32, low=0.95, high=1.05).to(torch.bfloat16)
        x = torch.randn(4, 300, generator=seeded())
        D = dense_krylov(M.to(torch.float64))
        assert_close(M.linear(x.bfloat16()), x.bfloat16().double() @ D.mT, 4e-3)
        single = M.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = single.linear(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, x.bfloat16().double() @ D.mT, 4e-3)


ONES = torch.ones(4, 1)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: LDRSubdiagonal(torch.ones(5), torch.ones(4), ONES, ONES), ValueError, "a must have 3 entries .* or 4"),
        (lambda: LDRSubdiagonal(torch.ones(4), torch.ones(2), ONES, ONES), ValueError, "b must have 3 entries"),
        (lambda: LDRTridiagonal(torch.ones(11), torch.ones(12), ONES, ONES), ValueError, "10 entries .* or 12"),
        (lambda: LDRSubdiagonal(torch.ones(4), torch.ones(4), ONES, torch.ones(4, 2)), ValueError, "share r"),
        (lambda: LDRSubdiagonal(torch.ones(4).double(), torch.ones(4), ONES, ONES), TypeError, "a has dtype"),
        (lambda: LDRSubdiagonal(torch.ones(4), torch.ones(4).long(), ONES, ONES), TypeError, "b must be floating"),
        (lambda: LDRSubdiagonal.random((4, 4), 0), ValueError, "rank must be at least 1"),
        (lambda: LDRTridiagonal.random((4, 4), 1).solve(torch.ones(4)), NotImplementedError, "no direct solver"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
