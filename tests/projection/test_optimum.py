"""The projections are the optimum: they lose exactly the discarded singular values, and no search beats them."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

import structmat as sm
from structmat.projection import truncated_svd
from structmat.projection.blockwise import slice_ranks


def matrices(m, n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    yield "random", torch.randn(m, n, dtype=dtype, generator=generator)
    hilbert, cosine = 1 / (i + j + 1), torch.cos(torch.pi * (2 * j + 1) * i / (2 * n))
    phase = torch.exp(1j * i * j / n) if dtype.is_complex else torch.ones(m, n, dtype=dtype)
    yield "hilbert", hilbert * phase
    yield "cosine", cosine * phase


def discarded(W, k, l, ranks):
    """The norm of the discarded singular values, slice by slice, with SciPy and strided indexing."""
    m, n = W.shape
    s, p = -(-m // l), -(-n // k)
    padded = np.zeros((l * s, k * p), dtype=W.numpy().dtype)
    padded[:m, :n] = W.numpy()
    tails = [
        scipy.linalg.svdvals(padded[j::l, i * p : (i + 1) * p])[int(ranks[i, j]) :] for i in range(k) for j in range(l)
    ]
    return float(np.linalg.norm(np.concatenate(tails)))


SIZES = [
    ((64, 64), 4, None),
    ((64, 64), 8, 2),
    ((48, 96), 4, 3),
    ((97, 31), 4, None),  # primes
    ((31, 97), (3, 5), 2),
    ((52, 52), 4, None),  # slices of ranks 3 and 4
    ((13, 12), (2, 3), None),
    ((5, 5), 4, None),  # a block that lies wholly outside
    ((1, 40), (5, 1), 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(("shape", "nblocks", "rank"), SIZES, ids=str)
def test_monarch_loses_the_discarded_singular_values(shape, nblocks, rank, dtype):
    for name, W in matrices(*shape, dtype=dtype):
        size = sm.Monarch.structure(*shape, nblocks, rank)
        ranks = slice_ranks(size["l"], size["k"], size["q"])
        expected = discarded(W, size["k"], size["l"], ranks) / W.norm().item()
        result = sm.project(W, sm.MonarchConfig(nblocks=nblocks, rank=rank))
        assert abs(result.error - expected) <= 1e-12, name
        assert abs(result.bound - expected) <= 1e-12, name
        again = sm.Monarch.from_dense(result.matrix.to_dense(), nblocks, rank)
        difference = (again.to_dense() - result.matrix.to_dense()).norm() / W.norm()
        assert difference <= 1e-12, f"projecting the projection of {name} moves it by {difference:.1e}"


def test_uneven_slices_have_ranks_3_and_4():
    size = sm.Monarch.structure(52, 52, 4)
    ranks = slice_ranks(size["l"], size["k"], size["q"])
    assert sorted(set(ranks.flatten().tolist())) == [3, 4]
    assert int(ranks.sum()) == size["k"] * size["q"]
    M = sm.Monarch.random((52, 52), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to_dense()
    measured = [[torch.linalg.matrix_rank(M[j::4, 13 * i : 13 * i + 13]).item() for j in range(4)] for i in range(4)]
    assert measured == ranks.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (23, 51), (51, 23)], ids=str)
def test_low_rank_and_block_diagonal(shape, dtype):
    for name, W in matrices(*shape, dtype=dtype):
        for rank in (1, 5, 23):
            result = sm.project(W, sm.LowRankConfig(rank=rank))
            expected = np.linalg.norm(scipy.linalg.svdvals(W.numpy())[rank:]) / W.norm().item()
            assert abs(result.error - expected) <= 1e-12, name
            assert abs(result.bound - expected) <= 1e-12, name
        for nblocks in (1, 3, 7):
            result = sm.project(W, sm.BlockDiagonalConfig(nblocks=nblocks))
            kept = sm.BlockDiagonal(torch.ones_like(result.matrix.blocks), *shape).to_dense() != 0
            expected = (W.masked_fill(kept, 0).norm() / W.norm()).item()
            assert abs(result.error - expected) <= 1e-12, name
            assert abs(result.bound - expected) <= 1e-12, name


def test_batches_are_projected_one_by_one():
    W = torch.randn(2, 3, 13, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for project in (lambda w: sm.Monarch.from_dense(w, 3), lambda w: sm.LowRank.from_dense(w, 4)):
        batch = project(W).to_dense()
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(batch[i, j], project(W[i, j]).to_dense(), rtol=1e-12, atol=1e-12)
    assert sm.Monarch.from_dense(W[:0], 3).shape == (0, 3, 13, 11)


def test_fifty_searches_do_not_beat_it():
    """L-BFGS from random starts on 16 x 16: it comes near the projection, and never below."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 16, dtype=torch.float64, generator=generator)
    best = sm.project(W, sm.MonarchConfig(nblocks=4, rank=None))
    optimum = (best.error * W.norm().item()) ** 2
    template = best.matrix

    def objective(flat):
        leaf = torch.from_numpy(flat).requires_grad_()
        left, right = leaf.split([template.left.numel(), template.right.numel()])
        M = sm.Monarch(left.view_as(template.left), right.view_as(template.right))
        loss = (M.to_dense() - W).square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), gradient.numpy()

    found = []
    for _ in range(50):
        start = torch.randn(template.num_params, dtype=torch.float64, generator=generator).numpy() / 2
        found.append(
            scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).fun
        )
    assert min(found) >= optimum * (1 - 1e-10)
    assert min(found) <= optimum * (1 + 1e-3), "the search must come near, or it proves nothing"


def test_hadamard_is_recovered():
    W = torch.from_numpy(scipy.linalg.hadamard(256).astype(np.float64))
    result = sm.project(W, sm.MonarchConfig(nblocks=16, rank=1))
    assert result.error <= 1e-13
    assert result.matrix.num_params == 2 * 256 * 16


def test_dft_with_permuted_columns_is_recovered():
    """The DFT is a Monarch matrix after the row-column transpose of its input (four-step FFT, Bailey 1990)."""
    n, root = 256, 16
    W = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    permuted = W[:, torch.arange(n).view(root, root).T.flatten()]
    result = sm.project(permuted, sm.MonarchConfig(nblocks=root, rank=1))
    assert result.error <= 1e-12
    assert sm.project(W, sm.MonarchConfig(nblocks=root, rank=1)).error > 0.5, "without the permutation it is not one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_low_precision_is_decomposed_in_double_and_rounded_once(dtype):
    W = torch.randn(
        48, 40, generator=torch.Generator().manual_seed(0), dtype=torch.complex64 if dtype.is_complex else None
    )
    W = W.to(dtype)
    result = sm.project(W, sm.MonarchConfig(nblocks=4))
    assert result.matrix.dtype == dtype
    exact = sm.project(W.to(torch.complex128 if dtype.is_complex else torch.float64), sm.MonarchConfig(nblocks=4))
    assert abs(result.bound - exact.bound) <= 1e-12
    assert exact.error <= result.error <= exact.error + torch.finfo(dtype).eps


def test_truncated_svd_takes_the_full_decomposition_where_the_rest_is_small():
    """Singular values down to 1e-9: through the Gram matrix alone they would be lost."""
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator))
    S = torch.logspace(0, -9, 20, dtype=torch.float64)
    W = U * S @ U.mT
    for rank in (3, 10, 19, 20):
        left, right, lost = truncated_svd(W, rank)
        error = (W - left @ right).norm()
        assert abs(error - S[rank:].norm()) <= 1e-14
        assert abs(lost - S[rank:].norm()) <= 1e-14
        balance = torch.linalg.vector_norm(left, dim=0) / torch.linalg.vector_norm(right, dim=1)
        torch.testing.assert_close(balance, torch.ones_like(balance), rtol=1e-6, atol=0)


def test_zero_and_rank_beyond_size():
    left, right, lost = truncated_svd(torch.zeros(2, 4, 3), 5)
    assert left.shape == (2, 4, 5)
    assert right.shape == (2, 5, 3)
    assert not left.any()
    assert not right.any()
    assert not lost.any()
    assert sm.project(torch.zeros(8, 8), sm.MonarchConfig(nblocks=2)).error == 0


def test_pieces_of_a_large_matrix_make_the_same_factors(monkeypatch):
    """A matrix larger than a chunk is taken to double precision piece by piece."""
    from structmat.projection import truncated

    for dtype in (torch.float64, torch.complex128):
        W = torch.randn(2, 37, 23, dtype=dtype, generator=torch.Generator().manual_seed(0))
        whole = truncated_svd(W, 5)
        for chunk in (1, 200):
            monkeypatch.setattr(truncated, "_CHUNK", chunk)
            for A, B in ((W, whole), (W.mH, (whole[1].mH, whole[0].mH, whole[2]))):
                left, right, lost = truncated_svd(A, 5)
                torch.testing.assert_close(left @ right, B[0] @ B[1], rtol=0, atol=1e-12)
                torch.testing.assert_close(lost, B[2], rtol=1e-12, atol=0)
        monkeypatch.undo()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_entries_that_are_not_finite_are_named(bad):
    W = torch.ones(8, 8)
    W[3, 5] = bad
    for call in (lambda: sm.Monarch.from_dense(W, 2), lambda: sm.LowRank.from_dense(W, 2)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()
