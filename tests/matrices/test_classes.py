"""What single classes promise beyond the protocol."""

import itertools

import pytest
import torch

import structmat as sm
from structmat.testing import assert_close

F64 = torch.float64


def rand(*shape, dtype=F64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_monarch_is_the_stated_formula():
    """Against the einsums of fly's convention: w1 = right, w2 = left."""
    l, s, r, k, q, p = 3, 5, 8, 4, 6, 2
    left, right, x = rand(l, s, r), rand(k, q, p, seed=1), rand(7, k * p, seed=2)
    h = torch.einsum("kqp,bkp->bkq", right, x.view(7, k, p)).reshape(7, r, l)
    y = torch.einsum("lsr,brl->bsl", left, h).reshape(7, s * l)
    assert_close(sm.Monarch(left, right).linear(x), y)
    assert_close(
        sm.Monarch(left, right, 13, 7).linear(x[:, :7]),
        torch.cat([x[:, :7], x[:, 7:] * 0], 1) @ (sm.Monarch(left, right).to_dense().mT)[:, :13],
    )


@pytest.mark.parametrize(("shape", "nblocks", "rank"), [((48, 96), (4, 2), 3), ((52, 60), 4, 2)], ids=str)
def test_slices_have_the_declared_rank_and_cost(shape, nblocks, rank):
    (m, n), (k, l) = shape, (nblocks if isinstance(nblocks, tuple) else (nblocks, nblocks))
    M = sm.Monarch.random(shape, nblocks, rank, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert M.num_params == rank * (l * n + k * m)
    assert M.flops == M.mT.flops == 2 * M.num_params
    D = M.to_dense()
    for i, j in itertools.product(range(k), range(l)):
        assert torch.linalg.matrix_rank(D[j::l, i * n // k : (i + 1) * n // k]) == rank


def test_inverse_of_a_monarch_is_one_too():
    M = sm.Monarch.random((12, 12), (4, 4), dtype=F64, generator=torch.Generator().manual_seed(0))
    inverse = M.inverse()
    assert isinstance(inverse, sm.Transposed)
    assert isinstance(inverse.base, sm.Monarch)
    assert inverse.num_params == M.num_params


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        (lambda: sm.Monarch.random((12, 12), 2, 1), "square blocks"),
        (lambda: sm.Monarch.random((11, 11), 4), "uncropped"),
        (lambda: sm.BlockDiagonal(torch.ones(2, 3, 2), 4, 4), "square blocks"),
        (lambda: sm.LowRank.random((5, 5), 2), "rank 2 is singular"),
        (lambda: sm.LowRank.random((5, 5), 6), "use Dense"),
    ],
)
def test_why_a_matrix_cannot_be_inverted(matrix, text):
    A = matrix()
    for call in (A.inverse, lambda: A.solve(torch.ones(A.shape[-1]))):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factorising_in_half_precision_says_what_to_do(dtype):
    eyes = torch.eye(3, dtype=dtype).expand(3, 3, 3)
    for A in (sm.Dense(eyes[0]), sm.BlockDiagonal(eyes), sm.Monarch(eyes, eyes)):
        for call in (lambda A=A: A.solve(torch.ones(A.shape[-1], dtype=dtype)), A.inverse, A.slogdet, A.logdet):
            with pytest.raises(TypeError, match="float32"):
                call()


def test_solve_names_batches_that_do_not_meet():
    A = sm.Dense(torch.eye(3).expand(2, 3, 3))
    with pytest.raises(ValueError, match=r"\(4,\) of b do not broadcast with \(2,\) of Dense"):
        A.solve(torch.ones(4, 3, 1))
    assert A.solve(torch.ones(3)).shape == (2, 3)


def test_every_permutation_of_five_has_its_sign():
    perms = torch.tensor(list(itertools.permutations(range(5))))
    sign, logabs = sm.Permutation(perms, F64).slogdet()
    expected = torch.linalg.det(sm.Permutation(perms, F64).to_dense())
    assert_close(sign, expected)
    assert not logabs.any()


def test_nearest_permutation():
    P = sm.Permutation.random((2, 9, 9), dtype=F64, generator=torch.Generator().manual_seed(0))
    noisy = P.to_dense() + 0.3 * rand(2, 9, 9)
    assert torch.equal(sm.Permutation.from_dense(noisy).perm, P.perm)
    W = rand(5, 5)
    nearest = (W - sm.Permutation.from_dense(W).to_dense()).norm()
    for perm in itertools.permutations(range(5)):
        assert nearest <= (W - sm.Permutation(torch.tensor(perm), F64).to_dense()).norm() + 1e-12


def test_closed_families_stay_closed():
    D = sm.Diagonal(rand(12))
    B = sm.BlockDiagonal(rand(3, 4, 4))
    P = sm.Permutation.random((12, 12), dtype=F64)
    L = sm.LowRank(rand(12, 2), rand(2, 12))
    M = sm.Monarch.random((12, 12), 3, dtype=F64)
    for value, kind in [
        (D @ D, sm.Diagonal), (D + D, sm.Diagonal), (D.inverse(), sm.Diagonal), (2 * D, sm.Diagonal),
        (B @ B, sm.BlockDiagonal), (B + B, sm.BlockDiagonal), (D @ B, sm.BlockDiagonal), (B @ D, sm.BlockDiagonal),
        (P @ P, sm.Permutation), (P.mT, sm.Permutation), (2 * P, sm.Scaled),
        (L @ M, sm.LowRank), (M @ L, sm.LowRank), (L + L, sm.LowRank), (L.mT, sm.LowRank),
        (M @ M, sm.Product), (M + M, sm.Sum), (2 * M, sm.Monarch), (M.mT, sm.Transposed), (M.mT.mT, sm.Monarch),
    ]:  # fmt: skip
        assert type(value) is kind
    assert len((M @ D @ D @ P).factors) == 3  # the two diagonals became one
    assert len((M + M + M).terms) == 3
    cropped = sm.BlockDiagonal(rand(3, 4, 4), 12, 11)
    assert isinstance(cropped @ sm.BlockDiagonal(rand(3, 4, 4), 11, 12), sm.Product)


def test_low_rank_products_keep_the_smaller_rank():
    A, B = sm.LowRank(rand(9, 5), rand(5, 8)), sm.LowRank(rand(8, 2), rand(2, 7))
    assert (A @ B).rank == 2
    assert (B.mT @ A.mT).rank == 2


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: sm.Monarch(torch.ones(2, 3, 4), torch.ones(3, 2, 2)), ValueError, "k q = l r"),
        (lambda: sm.Monarch(torch.ones(2, 3, 3), torch.ones(3, 2, 2), 7), ValueError, "nrows"),
        (lambda: sm.Monarch(torch.ones(2, 3, 3), torch.ones(3, 2, 2), 0), ValueError, "nrows"),
        (lambda: sm.Monarch(torch.ones(2, 3, 3), torch.ones(3, 2, 2).double()), TypeError, "dtype"),
        (lambda: sm.Monarch(torch.ones(5, 2, 3, 3), torch.ones(3, 2, 2)), ValueError, "batch"),
        (lambda: sm.Monarch(torch.ones(2, 3, 3), None), TypeError, "right must be a torch.Tensor"),
        (lambda: sm.Monarch(torch.ones(2, 3, 3).long(), torch.ones(3, 2, 2).long()), TypeError, "floating"),
        (lambda: sm.LowRank(torch.ones(3, 2), torch.ones(3, 4)), ValueError, "share r"),
        (lambda: sm.LowRank.from_dense(torch.ones(3, 4), 4), ValueError, "at most"),
        (lambda: sm.BlockDiagonal(torch.ones(3, 4)), ValueError, "at least 3"),
        (lambda: sm.BlockDiagonal.from_dense(torch.ones(3, 4), 4), ValueError, "at most"),
        (lambda: sm.Diagonal.from_dense(torch.ones(3, 4)), ValueError, "square"),
        (lambda: sm.Diagonal.random((3, 4)), ValueError, "square"),
        (lambda: sm.Permutation(torch.tensor([0, 0, 1])), ValueError, "once"),
        (lambda: sm.Permutation(torch.tensor([0.0, 1.0])), TypeError, "int64"),
        (lambda: sm.Permutation(torch.tensor([0, 1]), torch.int64), TypeError, "floating"),
        (lambda: sm.Dense(torch.ones(3)), ValueError, "at least 2"),
        (lambda: sm.Dense.random((3,)), ValueError, "shape"),
        (lambda: sm.Dense.random((3, 0)), ValueError, "at least 1 row"),
        (lambda: sm.Dense.random(3), TypeError, "sequence"),
        (lambda: sm.Product(()), TypeError, "non-empty"),
        (lambda: sm.Product((sm.Dense(torch.ones(2, 3)), sm.Dense(torch.ones(2, 3)))), ValueError, "inner sizes"),
        (lambda: sm.Sum((sm.Dense(torch.ones(2, 3)), sm.Dense(torch.ones(3, 2)))), ValueError, "cannot add"),
        (lambda: sm.Inverse(sm.Dense(torch.ones(2, 3))), ValueError, "square"),
        (lambda: sm.Kronecker((torch.ones(2, 2),)), TypeError, "StructuredMatrix"),
    ],
)
def test_constructors_say_what_is_wrong(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_gradients_flow_to_factors_that_are_not_leaves():
    """A value is no module: a hypernetwork's outputs can be its factors."""
    code = rand(4).requires_grad_()
    left = (code[:, None] * rand(4, 24)).sum(0).view(2, 3, 4)
    M = 2 * sm.Monarch(left, rand(4, 2, 3))
    M.linear(rand(5, 12)).square().sum().backward()
    assert code.grad is not None
    assert code.grad.abs().sum() > 0


def test_scipy_operators_follow_numpys_dtypes():
    A = sm.Monarch.random((6, 8), 2, generator=torch.Generator().manual_seed(0))
    S, D = A.to_scipy(), A.to(F64).to_dense().numpy()
    v = rand(8).numpy()
    assert S.dtype == "float32"
    assert_close(torch.from_numpy(S @ v), torch.from_numpy(D @ v))
    assert_close(torch.from_numpy(S @ (v + 2j * v)), torch.from_numpy(D @ (v + 2j * v)))
    assert (S @ v.astype("float32")).dtype == "float32"
    with pytest.raises(TypeError, match="bfloat16"):
        A.to(torch.bfloat16).to_scipy()
    with pytest.raises(ValueError, match="batch"):
        sm.Monarch.random((2, 6, 8), 2).to_scipy()


def test_scipy_solves_with_a_monarch():
    from scipy.sparse.linalg import gmres

    M = sm.Monarch(torch.eye(4).expand(3, 4, 4) + rand(3, 4, 4) / 9, torch.eye(3).expand(4, 3, 3) + rand(4, 3, 3) / 9)
    b = rand(12)
    x, info = gmres(M.to_scipy(), b.numpy(), rtol=1e-12)
    assert info == 0
    assert_close(torch.from_numpy(x), M.solve(b), 1e-9)


def test_common_mistakes_are_told_the_way_out():
    A = sm.Monarch.random((6, 8), 2)
    with pytest.raises(ValueError, match=r"A\.linear\(X\)"):
        A @ torch.ones(3, 8)
    for call in (lambda: A @ rand(8).numpy(), lambda: rand(6).numpy() @ A):
        with pytest.raises(TypeError, match="to_scipy"):
            call()
