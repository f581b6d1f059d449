"""Low-rank matrices by their pivots: the same matrices as products of two factors, in fewer numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat as sm
from structmat import PivotedLowRank, PivotedLowRankConfig, surgery
from structmat.testing import assert_close

F64 = torch.float64


def rand(*shape, dtype=F64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 5), (5, 7), (2, 3, 6, 4)], ids=str)
def test_it_is_the_low_rank_matrix_that_it_was_made_from(shape, dtype):
    m, n = shape[-2:]
    for rank in range(1, min(m, n) + 1):
        A = sm.LowRank(rand(*shape[:-1], rank, dtype=dtype), rand(*shape[:-2], rank, n, dtype=dtype, seed=1))
        B = PivotedLowRank.from_low_rank(A)
        assert B.rank == rank
        assert B.num_params * m == B.batch_shape.numel() * rank * (m + n - rank) * m
        assert_close(B.to_dense(), A.to_dense())
        assert_close(B.low_rank().to_dense(), A.to_dense())


def test_batches_of_the_factors_broadcast():
    A = sm.LowRank(rand(3, 1, 6, 2), rand(4, 2, 5))
    assert_close(PivotedLowRank.from_low_rank(A).to_dense(), A.to_dense())


def test_pivots_are_rows_of_the_matrix():
    W = rand(9, 6)
    A = PivotedLowRank.from_dense(W, 4)
    D = A.to_dense()
    for i, place in enumerate(A.perm.tolist()):
        if place < 4:
            assert torch.equal(D[i], A.pivots[place])
    assert_close(D, sm.LowRank.from_dense(W, 4).to_dense())


@pytest.mark.parametrize("W", [torch.zeros(5, 4), torch.ones(5, 4), torch.eye(5, 4)], ids=["zero", "one", "eye"])
def test_matrices_of_lower_rank_than_asked_for(W):
    A = PivotedLowRank.from_dense(W.double(), 3)
    assert all(t.isfinite().all() for t in (A.pivots, A.rest))
    torch.testing.assert_close(A.to_dense(), sm.LowRank.from_dense(W.double(), 3).to_dense())


def test_coefficients_stay_small():
    """Of a matrix whose leading rows are nearly dependent."""
    left = rand(300, 100)
    left[:100] = rand(100, 1) + 1e-9 * left[:100]
    A = sm.LowRank(left, rand(100, 200, seed=1))
    B = PivotedLowRank.from_low_rank(A)
    assert B.rest.abs().max() < 20
    assert_close(B.to_dense(), A.to_dense())


@settings(max_examples=200, deadline=None)
@given(m=st.integers(1, 60), n=st.integers(1, 60), share=st.floats(0.001, 1))
def test_the_config_takes_the_largest_rank_of_the_budget(m, n, share):
    budget = max(1, round(share * m * n))
    config = PivotedLowRankConfig(max_params=budget)
    ranks = [r for r in range(1, min(m, n) + 1) if r * (m + n - r) <= budget]
    if ranks:
        assert config.resolve(m, n) == {"rank": ranks[-1]}
        assert config.num_params(m, n) == PivotedLowRankConfig.params_of(m, n, ranks[-1]) <= budget
    else:
        with pytest.raises(sm.BudgetError, match=f"at least {m + n - 1} parameters"):
            config.resolve(m, n)


@pytest.mark.parametrize("outputs", [False, True])
def test_calibrated_it_is_the_calibrated_low_rank_matrix(outputs):
    W, x = rand(12, 8), rand(100, 8, seed=1) * torch.logspace(0, -2, 8, dtype=F64)
    moments = sm.Moments.of(x, rand(100, 12, seed=2) * torch.logspace(0, -1, 12, dtype=F64) if outputs else None)
    whole = sm.project(W, sm.LowRankConfig(rank=5), moments)
    found = sm.project(W, PivotedLowRankConfig(rank=5), moments)
    assert isinstance(found.matrix, PivotedLowRank)
    assert_close(found.matrix.to_dense(), whole.matrix.to_dense())
    assert found.calibrated_error == pytest.approx(whole.calibrated_error)
    assert found.matrix.num_params == whole.matrix.num_params - 25


def test_an_allocation_of_it_loses_less_and_survives_a_file(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 16))
    x = torch.randn(200, 24) * torch.logspace(0, -2, 24)
    calibration = surgery.calibrate(model, [x])
    plans = [
        surgery.allocate(model, 0.6, cls(ratio=1), calibration=calibration, progress=False)
        for cls in (sm.LowRankConfig, PivotedLowRankConfig)
    ]
    assert (plans[1].error or 1) < (plans[0].error or 0)
    assert plans[1].params <= 0.6 * (24 * 40 + 40 * 16)
    report = surgery.compress_(model, plans[1], calibration=calibration, progress=False)
    assert report.params_after == plans[1].params
    assert any(str(row.structure).startswith("pivoted lowrank") for row in report.rows)
    surgery.save_file(model, tmp_path / "model.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 16))
    surgery.load_file(other, tmp_path / "model.safetensors")
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_rounded_once(dtype):
    W = rand(20, 30).to(dtype)
    A = PivotedLowRank.from_dense(W, 6)
    exact = PivotedLowRank.from_dense(W.double(), 6)
    assert A.dtype == dtype
    assert torch.equal(A.pivots, exact.pivots.to(dtype))
    assert torch.equal(A.rest, exact.rest.to(dtype))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: PivotedLowRank.from_dense(rand(3, 4), 4), ValueError, r"at most min\(m, n\) = 3"),
        (lambda: PivotedLowRank.random((3, 4), 4), ValueError, r"at most min\(m, n\) = 3, got 4"),
        (lambda: PivotedLowRank.from_low_rank(sm.LowRank.random((3, 4), 5)), ValueError, "inner size from 1 to"),
        (
            lambda: PivotedLowRank.from_low_rank(sm.LowRank(torch.full((3, 2), torch.nan), torch.ones(2, 4))),
            ValueError,
            "NaN",
        ),
        (lambda: PivotedLowRank(rand(2, 4), rand(3, 1), torch.arange(5)), ValueError, r"must share r and batch"),
        (lambda: PivotedLowRank(rand(2, 4), rand(3, 2), torch.arange(4)), ValueError, r"perm must have shape \(5,\)"),
        (lambda: PivotedLowRank(rand(2, 4), rand(3, 2), torch.arange(5.0)), TypeError, "int64"),
        (lambda: PivotedLowRank(rand(2, 4), rand(3, 2).float(), torch.arange(5)), TypeError, "float32"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_derivatives_in_every_mode_and_of_batches_that_meet():
    A = PivotedLowRank.random((5, 4), 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x, v = rand(3, 4).requires_grad_(), rand(3, 4, seed=1)
    assert torch.autograd.gradcheck(A.linear, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: A.linear(x).pow(3), x)
    assert_close(torch.func.jvp(A.linear, (x.detach(),), (v,))[1], v @ A.to_dense().mT)
    batch = PivotedLowRank.random((2, 5, 4), 2, dtype=F64)
    y = rand(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: y @ batch, y)
    assert torch.autograd.gradcheck(batch.linear, x)
