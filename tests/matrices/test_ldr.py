"""Matrices of low displacement rank: products, the algebra of ranks, solving, and the errors."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structmat import Diagonal, Hankel, LowRank, Toeplitz
from structmat.linalg.cauchy import BLOCK, cauchy_like_solve
from structmat.matrices.displacement import LDR, CauchyLike, HankelLike, Shift, ToeplitzLike, VandermondeLike
from structmat.matrices.displacement._pairs import meet
from structmat.nn import StructuredLinear
from structmat.surgery import load_file, save_file
from structmat.testing import assert_close
from structmat.testing.displacement import dense_ldr

CORNERS = (-1.0, 0.0, 1.0, 0.5, 2.0, complex(math.cos(1.0), math.sin(1.0)))
COMPLEX = torch.complex128


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, dtype=COMPLEX, seed=0):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def measured_rank(M, A=None, B=None):
    """Of the dense matrix under these operators, by singular values."""
    A, B = (o.to_dense() for o in (A or M.A, B or M.B))
    dense = M.to_dense()
    scale = max(A.abs().max(), B.abs().max()) * dense.norm()
    return int((torch.linalg.svdvals(A @ dense - dense @ B) > 1e-11 * scale).sum())


def well_conditioned(n, rank=2, dtype=torch.float64, seed=0):
    """The identity plus something smaller, so that every solve is well conditioned."""
    M = ToeplitzLike.random((n, n), rank, generator=seeded(seed), dtype=dtype) * 0.3
    unit = torch.zeros(n, 1, dtype=dtype)
    first, last = unit.clone(), unit.clone()
    first[0], last[-1] = M.A.f - M.B.f, 1  # Z_e - Z_f
    return M + ToeplitzLike(first, last)


@pytest.mark.parametrize("e", CORNERS)
@pytest.mark.parametrize("f", CORNERS)
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (9, 3), (1, 1)])
def test_products_and_adjoints_for_every_pair_of_corners(e, f, shape):
    m, n = shape
    G, H, x, y = draw(m, 2), draw(n, 2, seed=1), draw(3, n, seed=2), draw(3, m, seed=3)
    if meet(e, m, f, n):
        with pytest.raises(ValueError, match="common eigenvalue"):
            ToeplitzLike(G, H, e, f)
        return
    for M in (ToeplitzLike(G, H, e, f), HankelLike(G, H, e, f)):
        dense = dense_ldr(M)
        assert_close(M.linear(x), x @ dense.mT)
        assert_close(M.mT.linear(y), y @ dense)
        assert_close(M.mT.to_dense(), dense_ldr(M.mT))
        assert_close((M.matvec(x) * y.conj()).sum(-1), (x * M.rmatvec(y).conj()).sum(-1), 1e-11)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_default_corners_never_meet(m, n, rank, seed, hankel):
    cls = HankelLike if hankel else ToeplitzLike
    M = cls.random((m, n), rank, generator=seeded(seed), dtype=torch.float64)
    assert_close(M.to_dense(), dense_ldr(M), 1e-11)


@pytest.mark.parametrize("size", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_nodes_within_and_outside_of_the_unit_circle(size, n):
    nodes = torch.polar(torch.full((5,), size, dtype=torch.float64), torch.arange(5, dtype=torch.float64) + 0.3)
    M = VandermondeLike(nodes, draw(5, 2), draw(n, 2, seed=1), f=0.5)
    assert_close(M.to_dense(), dense_ldr(M), 1e-11)
    assert_close(M.mT.to_dense(), dense_ldr(M).mT, 1e-11)


def test_powers_of_nodes_do_not_overflow():
    nodes = torch.tensor([1e-3, -0.9, 40.0, -7.0])
    M = VandermondeLike(nodes, torch.ones(4, 1), torch.ones(300, 1))
    assert M.to_dense().isfinite().all()
    assert_close(M.to_dense(), M.to(torch.float64).to_dense(), 1e-5)


def test_a_toeplitz_matrix_has_rank_two_and_its_formula():
    column, row = np.arange(1.0, 6.0), np.array([1.0, -2.0, 7.0, 0.5, 3.0])
    T = torch.from_numpy(scipy.linalg.toeplitz(column, row))
    A, B = Shift(5, 1.0, dtype=torch.float64), Shift(5, -1.0, dtype=torch.float64)
    D = A.matmul(T) - B.mT.matmul(T.mT).mT
    u, s, vh = torch.linalg.svd(D)
    assert int((s > 1e-12).sum()) == 2
    assert_close(ToeplitzLike(u[:, :2] * s[:2], vh[:2].mT).to_dense(), T)


MEMBERS = {
    "toeplitz": lambda seed: ToeplitzLike.random((6, 6), 2, generator=seeded(seed), dtype=torch.float64),
    "corners": lambda seed: ToeplitzLike.random((6, 6), 1, 0.5, 2.0, generator=seeded(seed), dtype=torch.float64),
    "hankel": lambda seed: HankelLike.random((6, 6), 2, generator=seeded(seed), dtype=torch.float64),
    "up": lambda seed: ToeplitzLike.random((6, 6), 2, generator=seeded(seed), dtype=torch.float64).mT,
    "nilpotent": lambda seed: ToeplitzLike.random((6, 6), 1, 0.0, 1.0, generator=seeded(seed), dtype=torch.float64),
    "vandermonde": lambda seed: VandermondeLike.random((6, 6), 2, generator=seeded(seed), dtype=torch.float64),
    "cauchy": lambda seed: CauchyLike.random((6, 6), 2, generator=seeded(seed), dtype=torch.float64),
}


@pytest.mark.parametrize("one", MEMBERS)
@pytest.mark.parametrize("two", MEMBERS)
def test_sums_and_products_with_their_ranks(one, two):
    M, N = MEMBERS[one](0), MEMBERS[two](1)
    dense = M.to_dense(), N.to_dense()
    for result, expected in ((M + N, dense[0] + dense[1]), (M @ N, dense[0] @ dense[1])):
        assert_close(result.to_dense(), expected, 1e-11)
        if isinstance(result, LDR):
            assert measured_rank(result) <= result.displacement_rank <= M.displacement_rank + N.displacement_rank + 2
            assert_close(dense_ldr(result), expected, 1e-9)
    if one == two and one != "cauchy":
        assert type(M + N) is type(M)
        assert (M + N).displacement_rank == 2 * M.displacement_rank
    if one == "toeplitz" == two:
        assert isinstance(M @ N, ToeplitzLike)
        assert (M @ N).displacement_rank == measured_rank(M @ N) == 5
        assert (M @ N.with_shifts(-1.0, 0.5)).displacement_rank == 2 + 2 + 2


@pytest.mark.parametrize("name", MEMBERS)
def test_transposes_multiples_and_inverses_keep_the_rank(name):
    M = MEMBERS[name](3)
    for result, expected in ((M.mT, M.to_dense().mT), (-2 * M, -2 * M.to_dense())):
        assert result.displacement_rank == M.displacement_rank == measured_rank(result)
        assert_close(result.to_dense(), expected)
    inverse = M.inverse()
    assert inverse.displacement_rank == M.displacement_rank
    cond = torch.linalg.cond(M.to_dense()).item()
    assert_close(inverse.to_dense() @ M.to_dense(), torch.eye(6, dtype=torch.float64), 1e-13 * cond)


def test_matched_and_mismatched_products_of_rectangles():
    M = ToeplitzLike.random((4, 7), 2, 1.0, 2.0, generator=seeded(), dtype=torch.float64)
    N = ToeplitzLike.random((7, 5), 1, 2.0, 0.5, generator=seeded(1), dtype=torch.float64)
    P = M @ N
    assert isinstance(P, ToeplitzLike)
    assert P.displacement_rank == 3 == measured_rank(P)
    assert_close(P.to_dense(), M.to_dense() @ N.to_dense())
    Q = M @ N.with_shifts(e=-3.0)
    assert Q.displacement_rank == 5
    assert measured_rank(Q) <= 3
    assert Q.compress().displacement_rank == measured_rank(Q)


def test_with_low_rank_matrices():
    M = ToeplitzLike.random((5, 7), 2, generator=seeded(), dtype=torch.float64)
    L = LowRank.random((5, 7), 1, generator=seeded(1), dtype=torch.float64)
    S = M + L
    assert isinstance(S, ToeplitzLike)
    assert S.displacement_rank == 4
    assert_close(S.to_dense(), M.to_dense() + L.to_dense())
    assert isinstance(L.mT @ M, LowRank)


def test_other_corners_are_the_same_matrix():
    for M in (MEMBERS["toeplitz"](0), MEMBERS["hankel"](0), MEMBERS["up"](0), MEMBERS["up"](0).mT):
        N = M.with_shifts(2.0, 0.25)
        assert N.displacement_rank == 4
        assert_close(N.to_dense(), M.to_dense())
        assert (N.A.f, N.B.f) == (2.0, 0.25)
    with pytest.raises(ValueError, match="Diagonal"):
        MEMBERS["vandermonde"](0).with_shifts(e=2.0)
    with pytest.raises(ValueError, match="common eigenvalue"):
        MEMBERS["toeplitz"](0).with_shifts(f=1.0)


def test_compress_finds_the_rank_and_the_best_approximation():
    M = MEMBERS["toeplitz"](0)
    assert (M + M + M).displacement_rank == 6
    found = (M + M + M).compress()
    assert found.displacement_rank == 2
    assert_close(found.to_dense(), 3 * M.to_dense())
    N = ToeplitzLike.random((9, 7), 4, generator=seeded(), dtype=torch.complex128)
    cut = N.compress(rank=2)
    best = torch.linalg.svdvals(N.displacement().to_dense())[2:].norm()
    assert cut.displacement_rank == 2
    assert_close((cut.displacement().to_dense() - N.displacement().to_dense()).norm(), best, 1e-12)
    assert N.compress(tol=2.0).displacement_rank == 1
    batch = ToeplitzLike.random((3, 4, 5), 3, generator=seeded(), dtype=torch.float32)
    assert_close((batch + batch).compress().to_dense(), 2 * batch.to_dense())
    with pytest.raises(ValueError, match="not both"):
        N.compress(tol=0.1, rank=1)
    with pytest.raises(ValueError, match="at most"):
        N.compress(rank=5)


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_elimination_against_a_dense_solve(n, dtype):
    M = well_conditioned(n, 3, dtype)
    dense, b = M.to_dense(), draw(n, 4, dtype=dtype)
    assert_close(M.solve(b), torch.linalg.solve(dense, b), 1e-11)
    assert_close(M.mT.solve(b), torch.linalg.solve(dense.mT, b), 1e-11)
    sign, logabs = M.slogdet()
    expected = torch.linalg.slogdet(dense)
    assert_close(sign, expected[0], 1e-10)
    assert_close(logabs, expected[1], 1e-10)


def test_batches_of_eliminations_take_their_own_pivots():
    n = BLOCK + 9
    s = torch.polar(torch.ones(n, dtype=torch.float64), 2 * math.pi * torch.arange(n, dtype=torch.float64) / n)
    t = s * complex(math.cos(math.pi / n), math.sin(math.pi / n))
    G, H, b = draw(3, n, 2), draw(3, n, 2, seed=1), draw(3, n, 1, seed=2)
    C = (G @ H.mT) / (s.unsqueeze(-1) - t)
    x, sign, logabs, _ = cauchy_like_solve(s.expand(3, n), t.expand(3, n), G, H, b)
    expected = torch.linalg.slogdet(C)
    assert_close(x, torch.linalg.solve(C, b), 1e-10)
    assert_close(sign, expected[0], 1e-10)
    assert_close(logabs, expected[1], 1e-10)


def test_inverse_of_1024():
    M = well_conditioned(1024)
    x = draw(1024, dtype=torch.float64)
    inverse = M.inverse()
    assert inverse.displacement_rank == M.displacement_rank == 3
    assert_close(inverse @ (M @ x), x, 1e-8)
    assert_close(M.solve(M @ x), x, 1e-8)


def test_float32_is_solved_to_the_accuracy_of_its_entries():
    M = well_conditioned(200, dtype=torch.float64).to(torch.float32)
    b = draw(200, 1, dtype=torch.float32)
    assert_close(M.solve(b), torch.linalg.solve(M.to(torch.float64).to_dense(), b.double()))


@pytest.mark.parametrize("name", ["toeplitz", "hankel", "vandermonde", "cauchy", "nilpotent"])
def test_gradients_of_solutions_inverses_and_determinants(name):
    members = (MEMBERS[name](seed) for seed in range(100))
    M = next(m for m in members if torch.linalg.cond(m.to_dense()) < 30)  # finite differences lose what it loses
    b = draw(6, 2, dtype=torch.float64)

    def rebuilt(left, right):
        return M._rebuild((M.A, M.B, left, right), ())

    leaves = [M.left.clone().requires_grad_(), M.right.clone().requires_grad_()]
    torch.autograd.gradcheck(lambda l, r, b: rebuilt(l, r).solve(b), (*leaves, b.requires_grad_()), rtol=1e-4)
    torch.autograd.gradgradcheck(lambda l, r: rebuilt(l, r).solve(b), leaves, rtol=1e-3)
    torch.autograd.gradcheck(lambda l, r: rebuilt(l, r).inverse().to_dense(), leaves, rtol=1e-4)
    torch.autograd.gradcheck(lambda l, r: rebuilt(l, r).slogdet()[1], leaves, rtol=1e-4)
    torch.autograd.gradgradcheck(lambda l, r: rebuilt(l, r).slogdet()[1], leaves, rtol=1e-3)


def test_singular_matrices_raise():
    ones = torch.ones(6, dtype=torch.float64)
    first, last = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    first[0], last[-1] = 1, 1
    # All ones, under Z_1 and Z_-1: e M[5] - M Z_-1 is zero but for the last column, which is 2.
    M = ToeplitzLike(2 * ones.unsqueeze(-1), last)
    assert_close(M.to_dense(), torch.ones(6, 6, dtype=torch.float64))
    for call in (lambda: M.solve(ones), M.inverse, M.slogdet):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            call()


def test_entries_that_are_not_finite_are_named():
    M = ToeplitzLike(torch.full((4, 1), torch.nan), torch.ones(4, 1))
    for call in (lambda: M.solve(torch.ones(4)), M.inverse, M.slogdet):
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()


def test_errors_name_what_is_wrong():
    G, H = torch.ones(4, 2), torch.ones(5, 2)
    with pytest.raises(ValueError, match="share r"):
        ToeplitzLike(G, torch.ones(5, 3))
    with pytest.raises(TypeError, match="complex generators"):
        ToeplitzLike(G, H, e=1j)
    with pytest.raises(TypeError, match="right has dtype"):
        ToeplitzLike(G, H.double())
    with pytest.raises(ValueError, match="size of the columns of left, 4, got 3"):
        LDR(Shift(3), Shift(5, -1.0), G, H)
    with pytest.raises(TypeError, match="Shift or a Diagonal"):
        LDR(LowRank(G, H.mT), Shift(5), G, H)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="powers of the shift overflow"):
        ToeplitzLike.random((5000, 3), 1, -1.0, 2.0)
    with pytest.raises(ValueError, match="powers of the shift overflow"):
        ToeplitzLike.random((3, 5000), 1, 0.5, 0.0)
    with pytest.raises(ValueError, match="in common"):
        CauchyLike(torch.arange(4.0), torch.arange(3.0, 8.0), G, H)
    with pytest.raises(ValueError, match="eigenvalue of the shift"):
        VandermondeLike(torch.tensor([1.0, 0.5, 0.3, 0.2]), G, H)
    with pytest.raises(ValueError, match="square"):
        ToeplitzLike(G, H).inverse()
    with pytest.raises(TypeError, match="float32"):
        ToeplitzLike.random((4, 4), 1, dtype=torch.bfloat16).solve(torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="singular"):
        Shift(3, 0.0).inverse()
    assert Diagonal(torch.ones(3)).shape == (3, 3)


def test_complex_corners_travel_through_files_and_exports(tmp_path):
    M = ToeplitzLike.random((5, 5), 2, complex(0, 1), -1.0, generator=seeded(), dtype=torch.complex64)
    layer = torch.nn.Sequential(StructuredLinear(M, bias=False))
    x = draw(3, 5, dtype=torch.complex64)
    save_file(layer, tmp_path / "m.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 5, bias=False, dtype=torch.complex64))
    load_file(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh(x), layer(x))
    program = torch.export.export(layer, (x,))
    torch.export.save(program, tmp_path / "m.pt2")
    assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), layer(x))


def test_with_plain_toeplitz_and_hankel_matrices():
    T = Toeplitz(draw(5, dtype=torch.float64), draw(5, dtype=torch.float64, seed=1))
    H = Hankel(draw(5, dtype=torch.float64), draw(5, dtype=torch.float64, seed=2))
    M = ToeplitzLike.random((5, 5), 2, generator=seeded(), dtype=torch.float64)
    for one, two in ((M, T), (T, M), (M, H), (H, M), (M.inverse(), T)):
        product = one @ two
        assert isinstance(product, ToeplitzLike if H not in (one, two) else HankelLike)
        assert product.displacement_rank <= 6
        assert_close(product.to_dense(), one.to_dense() @ two.to_dense(), 1e-11)
    for one, two in ((M, T), (T, M)):
        total = one + two
        assert isinstance(total, ToeplitzLike)
        assert total.displacement_rank == 4
        assert_close(total.to_dense(), one.to_dense() + two.to_dense())
    assert_close((M + H).to_dense(), M.to_dense() + H.to_dense())
    wide = Toeplitz(draw(5, dtype=torch.float64), draw(8, dtype=torch.float64, seed=1))
    assert isinstance(M @ wide, ToeplitzLike)
    assert_close((M @ wide).to_dense(), M.to_dense() @ wide.to_dense())
    assert_close((wide.mT @ M).to_dense(), wide.to_dense().mT @ M.to_dense())


@pytest.mark.parametrize("corners", [(1.0, -1.0), (0.5, 2.0), (complex(0, 1), -1.0)])
@pytest.mark.parametrize("cls", [ToeplitzLike, HankelLike])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7)])
def test_conversions_are_the_same_matrix(corners, cls, shape):
    m, n = shape
    if meet(corners[0], m, corners[1], n):
        corners = (corners[0], 3.0)
    M = cls(draw(m, 2), draw(n, 2, seed=1), *corners)
    for kind, wanted in (("cauchy", CauchyLike), ("vandermonde", VandermondeLike), ("toeplitz", ToeplitzLike)):
        for value in (M, M.mT):
            found = value.convert(kind)
            (middle,) = (f for f in found.factors if isinstance(f, LDR))
            assert type(middle) is wanted
            assert middle.displacement_rank == 2
            assert_close(found.to_dense(), value.to_dense(), 1e-11)
            assert_close(dense_ldr(middle), middle.to_dense(), 1e-10)
    with pytest.raises(ValueError, match="kind must be"):
        M.convert("hankel")
    with pytest.raises(ValueError, match="two shifts"):
        CauchyLike.random((3, 3), 1).convert("toeplitz")
    with pytest.raises(TypeError, match="are complex"):
        ToeplitzLike.random((3, 3), 1).convert("cauchy")
    with pytest.raises(ValueError, match="with_shifts"):
        ToeplitzLike.random((3, 3), 1, 0.0, 1.0, dtype=COMPLEX).convert("cauchy")


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.complex64, COMPLEX])
def test_products_whose_outer_operators_meet(n, dtype):
    # Nodes of a random member for f = 1 are the eigenvalues of the shift with corner -1.
    V = VandermondeLike.random((n, n), 2, generator=seeded(), dtype=dtype)
    T = ToeplitzLike.random((n, n), 2, 1.0, -1.0, generator=seeded(1), dtype=dtype)
    for one, two in ((V, T), (T.mT, V.mT)):
        assert_close(
            (one @ two).to_dense(), one.to_dense() @ two.to_dense(), 2e-5 if dtype == torch.complex64 else 1e-12
        )
        assert isinstance(one @ two, LDR)
        assert (one @ two).displacement_rank <= 2 + 2 + 2


def test_products_of_diagonals_with_common_numbers_are_lazy():
    s, t, u = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2, 3], [10.0, 20, 30], [3.0, 4, 5]))
    real = {"dtype": torch.float64}
    one = CauchyLike(s, t, draw(3, 1, **real), draw(3, 1, seed=1, **real))
    two = CauchyLike(t, u, draw(3, 1, seed=2, **real), draw(3, 1, seed=3, **real))
    assert not isinstance(one @ two, LDR)
    assert_close((one @ two).to_dense(), one.to_dense() @ two.to_dense())


def test_common_numbers_are_seen_in_broadcast_batches():
    G, H = torch.ones(2, 1), torch.ones(2, 1)
    s, t = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[5.0, 6.0], [7.0, 8.0], [9.0, 0.0]])
    assert CauchyLike(s, t, G, H).shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match="number in common"):
        CauchyLike(s, torch.tensor([[5.0, 6.0], [7.0, 1.0], [9.0, 0.0]]), G, H)


def test_nodes_at_eigenvalues_but_for_rounding_raise():
    nodes = torch.polar(
        torch.ones(3, dtype=torch.float64), math.pi / 4 * torch.tensor([1.0, 3, 5], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="no node may be"):
        VandermondeLike(nodes, draw(3, 1), draw(8, 1))
    with pytest.raises(ValueError, match="no node may be"):  # 0.3^128 is 0 in float32
        VandermondeLike(torch.tensor([0.3, 0.9]), torch.ones(2, 1), torch.ones(128, 1), f=0.0)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("moved", [False, True])
def test_solving_with_a_nilpotent_shift_and_roots_of_unity(n, moved):
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    nodes = torch.polar(torch.ones(n, dtype=torch.float64), angle)
    if moved:
        nodes[0] = 0.5
    M, b = VandermondeLike(nodes, draw(n, 2), draw(n, 2, seed=1), f=0.0), draw(n, 1, seed=2)
    assert_close(M.linear(M.solve(b).mT).mT, b, 1e-10)
    assert_close(M.mT.linear(M.mT.solve(b).mT).mT, b, 1e-10)


def test_sums_keep_the_gradients_of_equal_diagonals():
    M, N = (CauchyLike.random((4, 4), 1, generator=seeded(i)).requires_grad_() for i in range(2))
    (M + N).to_dense().square().sum().backward()
    assert all(t.grad is not None for t in (*M.tensors(), *N.tensors()))
    assert (M + M).displacement_rank == 2


def test_no_columns_no_rank_and_no_rows():
    M = ToeplitzLike.random((4, 4), 2)
    assert M.solve(torch.ones(4, 0)).shape == (4, 0)
    nothing = ToeplitzLike(torch.zeros(4, 0), torch.zeros(4, 0))
    assert_close(nothing.to_dense(), torch.zeros(4, 4))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        nothing.solve(torch.ones(4))
    with pytest.raises(ValueError, match="left must have at least one row"):
        ToeplitzLike(torch.zeros(0, 1), torch.zeros(0, 1))


def test_compression_finds_rank_where_terms_cancel():
    M, N = (ToeplitzLike.random((3, 6, 6), 2, generator=seeded(i), dtype=torch.float64) for i in range(2))
    assert (M - M).compress().displacement_rank == 1
    assert (M + N - N).compress().displacement_rank == 2
    uneven = ToeplitzLike(draw(6, 2) * torch.tensor([1e6, 1e-6]), draw(6, 2, seed=1) * torch.tensor([1e-6, 1e6]))
    assert uneven.compress().displacement_rank == 2
