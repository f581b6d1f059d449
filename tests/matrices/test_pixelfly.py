"""Pixelfly matrices beyond the market: projection at the same budget, gamma, configs, errors."""

from itertools import pairwise

import pytest
import torch

import structmat as sm
from structmat import layouts

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def error(A, W):
    return ((A.to_dense() - W).norm() / W.norm()).item()


LAYOUTS = {
    "square": layouts.flat_butterfly((64, 64), 8, 2),
    "rectangular": layouts.flat_butterfly((32, 96), 8, 1),
    "grid 3 x 7": layouts.block_diagonal((24, 35), (8, 5)),
    "cut": layouts.banded((43, 61), 6, 1),
    "bigbird": layouts.bigbird((64, 64), 8),
    "empty": layouts.Layout(torch.zeros(4, 4, dtype=torch.bool), 8),
    "one block": layouts.full((12, 12), 12),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_members_are_exact(name, dtype):
    layout = LAYOUTS[name]
    for rank in (0, 1, 2):
        A = sm.Pixelfly.random(layout.shape, layout, rank, dtype=dtype, generator=generator(rank)) * 3.0
        found = sm.Pixelfly.from_dense(A.to_dense(), layout, rank, gamma=0.3)
        assert A.to_dense().norm() == 0 or error(found, A.to_dense()) < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.9, -2.0, 1.5])
def test_gamma_changes_the_factors_only(gamma):
    W = torch.randn(2, 24, 32, dtype=F64, generator=generator())
    layout = layouts.block_diagonal((24, 32), 8)
    found = sm.Pixelfly.from_dense(W, layout, 3, gamma=gamma)
    assert found.gamma.shape == (2, 1)
    assert (found.gamma == gamma).all()
    reference = sm.Pixelfly.from_dense(W, layout, 3)
    torch.testing.assert_close(found.to_dense(), reference.to_dense())
    # On the blocks W is met exactly.
    inside = layout.entries()
    torch.testing.assert_close(found.to_dense()[:, inside], W[:, inside])


def test_batches_are_projected_each_for_itself():
    W = torch.stack([s * torch.randn(24, 32, dtype=F64, generator=generator(i)) for i, s in enumerate((1.0, 1e-9, 0))])
    layout = layouts.block_diagonal((24, 32), 8)
    found = sm.Pixelfly.from_dense(W, layout, 3)
    for i in range(3):
        alone = sm.Pixelfly.from_dense(W[i], layout, 3)
        difference = (found.to_dense()[i] - W[i]).norm() - (alone.to_dense() - W[i]).norm()
        assert abs(difference) <= 1e-3 * W[i].norm()  # sweeps end when none of the batch gains any more
    assert (found.to_dense()[2] == 0).all()


def _matrices():
    yield "gaussian", torch.randn(64, 64, dtype=F64, generator=generator(1))
    i = torch.arange(64, dtype=F64)
    yield "smooth", 1 / (1 + (i[:, None] - i).abs())
    yield "low rank", torch.randn(64, 6, dtype=F64, generator=generator(2)) @ torch.randn(6, 64, dtype=F64)
    yield "blocks", layouts.flat_butterfly((64, 64), 8, 4).entries() * torch.randn(64, 64, dtype=F64)
    scales = 2.0 ** -torch.arange(64, dtype=F64)
    yield "decaying", torch.linalg.qr(torch.randn(64, 64, dtype=F64, generator=generator(3)))[0] * scales


MATRICES = dict(_matrices())


@pytest.mark.parametrize("name", MATRICES)
def test_never_above_blocks_or_rank_alone_and_monotone(name):
    W = MATRICES[name]
    layout = LAYOUTS["square"]
    masked = error(sm.BlockSparse.from_dense(W, layout), W)
    errors = []
    for rank in (0, 1, 2, 4, 8, 16, 32):
        e = error(sm.Pixelfly.from_dense(W, layout, rank), W)
        assert e <= masked + 1e-12
        assert rank == 0 or e <= error(sm.LowRank.from_dense(W, rank), W) + 1e-12
        errors.append(e)
    assert all(b <= a + 1e-9 for a, b in pairwise(errors))
    strides = [error(sm.Pixelfly.from_dense(W, layouts.flat_butterfly((64, 64), 8, s), 4), W) for s in (1, 2, 4, 8)]
    assert all(b <= a + 1e-9 for a, b in pairwise(strides))


@pytest.mark.parametrize("name", MATRICES)
def test_budgets(name):
    """The search is never above a flat butterfly or a low rank of as many parameters, and monotone in the budget."""
    W, errors = MATRICES[name], []
    for ratio in (0.15, 0.3, 0.5, 0.8):
        budget = int(ratio * 64 * 64)
        found = sm.project(W, sm.PixelflyConfig(block=8, ratio=ratio))
        assert found.matrix.num_params <= budget
        assert found.bound is None
        assert found.error <= found.guarantee + 1e-9
        rest = sm.project(W, sm.LowRankConfig(max_params=budget - 1)).error
        masked = sm.project(W, sm.BlockSparseConfig(block=8, pattern="flat_butterfly", max_params=budget - 1)).error
        rule = sm.project(W, sm.PixelflyConfig(block=8, ratio=ratio, split="rule")).error
        assert found.error <= min(rest, masked, rule) + 1e-12
        errors.append(found.error)
    assert all(b <= a + 1e-9 for a, b in pairwise(errors))


@pytest.mark.parametrize("name", MATRICES)
def test_budgets_of_free_blocks(name):
    W = MATRICES[name]
    for ratio in (0.15, 0.5):
        budget = int(ratio * 64 * 64)
        config = sm.PixelflyConfig(block=8, ratio=ratio, pattern="top_k")
        found = sm.project(W, config)
        assert found.matrix.num_params <= budget
        assert config.num_params(64, 64) <= budget
        alone = (
            sm.LowRankConfig(max_params=budget - 1),
            sm.BlockSparseConfig(block=8, max_params=budget - 1),
            sm.PixelflyConfig(block=8, ratio=ratio, pattern="top_k", split="rule"),
        )
        assert found.error <= min(sm.project(W, c).error for c in alone) + 1e-12


def test_a_density_chooses_blocks_and_loads_into_another_choice():
    layout = layouts.random((40, 60), (8, 6), 0.2, seed=5)
    A = sm.Pixelfly.random((40, 60), layout, 2, dtype=F64, generator=generator())
    found = sm.Pixelfly.from_dense(A.to_dense(), 0.2, 2, block=(8, 6))
    assert found.layout == layout
    assert error(found, A.to_dense()) < 1e-10
    assert sm.Pixelfly.random((40, 60), 0.2, 2, block=(8, 6)).layout == layouts.random((40, 60), (8, 6), 0.2)
    one = sm.nn.StructuredLinear(found, bias=False)
    other = sm.nn.StructuredLinear(sm.Pixelfly.random((40, 60), 0.2, 2, block=(8, 6), dtype=F64), bias=False)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(torch.ones(60, dtype=F64)), one(torch.ones(60, dtype=F64)))
    stack = torch.stack([A.to_dense(), 2 * A.to_dense()]).float()
    batch = sm.Pixelfly.from_dense(stack, 0.2, 2, block=(8, 6))
    assert batch.shape == (2, 40, 60) and batch.dtype == torch.float32 and batch.layout == layout
    torch.testing.assert_close(batch.to_dense(), stack, rtol=1e-5, atol=1e-5)
    given = sm.PixelflyConfig(block=8, pattern="top_k", max_params=1500, rank=3).resolve(64, 64)
    assert given == {"layout": 17 / 64, "rank": 3, "block": 8}


def test_rank_zero_trains():
    """Factors without entries are no parameters: DDP, clipping and optimizers see only what has a gradient."""
    layer = sm.nn.PixelflyLinear(32, 32, block=8, max_stride=2, rank=0)
    layer(torch.ones(3, 32)).square().sum().backward()
    assert all(p.numel() and p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())
    for norm in (1.0, 2.0, float("inf")):
        for foreach in (True, False):
            assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm, foreach=foreach).isfinite()
    torch.optim.AdamW(layer.parameters()).step()
    twin = sm.nn.PixelflyLinear(32, 32, block=8, max_stride=2, rank=0)
    twin.load_state_dict(layer.state_dict())
    compiled = torch.compile(twin.double(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(3, 32).double()), layer(torch.ones(3, 32)).double())


def test_low_precision_is_rounded_once():
    W = torch.randn(64, 64, generator=generator())
    layout = LAYOUTS["square"]
    exact = error(sm.Pixelfly.from_dense(W.double(), layout, 8), W.double())
    for dtype, eps in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        found = sm.Pixelfly.from_dense(W.to(dtype), layout, 8)
        assert found.dtype == dtype
        assert abs(error(found.to(F64), W.double()) - exact) < eps


def test_rank_zero_and_no_blocks_multiply():
    x = torch.randn(3, 32, dtype=F64, generator=generator())
    for layout, rank in ((LAYOUTS["empty"], 2), (layouts.full((32, 32), 16), 0), (LAYOUTS["empty"], 0)):
        A = sm.Pixelfly.random((32, 32), layout, rank, dtype=F64, generator=generator())
        torch.testing.assert_close(A.linear(x), x @ A.to_dense().mT)
        torch.testing.assert_close(A.mT.linear(x), x @ A.to_dense())
        std = (A.to_dense().square().sum(1).mean() * 3).sqrt()
        assert abs(std - (1.0 if layout.nnz + rank else 0.0)) < 0.35


def test_the_rule():
    config = sm.PixelflyConfig(ratio=0.25)
    budget = 1024 * 1024 // 4
    size = config.resolve(1024, 1024)
    blocks = size["layout"].num_params
    assert budget - blocks >= budget / 4 > budget - blocks - 32 * 32 * 32
    assert config.num_params(1024, 1024) <= budget < config.num_params(1024, 1024) + 2048
    assert sm.PixelflyConfig(max_params=budget, rank=8).resolve(1024, 1024)["rank"] == 8
    assert sm.PixelflyConfig(max_params=budget, max_stride=2).resolve(1024, 1024)["layout"].nnz == 64
    assert sm.PixelflyConfig(block=4).resolve(8, 12)["rank"] == 4


PARTS = sm.BlockSparse.random((8, 8), 0.5, block=2), sm.LowRank.random((8, 8), 2)
HALF = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: sm.Pixelfly(0.5, *PARTS), TypeError, "gamma"),
        (lambda: sm.Pixelfly(HALF, PARTS[1], PARTS[1]), TypeError, "block_sparse must be a BlockSparse"),
        (lambda: sm.Pixelfly(HALF.double(), *PARTS), TypeError, "block_sparse has dtype"),
        (lambda: sm.Pixelfly(HALF, PARTS[0], sm.LowRank.random((8, 9), 2)), ValueError, "one shape"),
        (lambda: sm.Pixelfly(HALF[0], *PARTS), ValueError, r"gamma must have shape \(\*batch, 1\), got \(\); give"),
        (lambda: sm.Pixelfly(torch.ones(2), *PARTS), ValueError, r"gamma must have shape .* got \(2,\)"),
        (
            lambda: sm.Pixelfly(torch.ones(2, 1), PARTS[0], sm.LowRank.random((3, 8, 8), 2)),
            ValueError,
            r"batches must broadcast, got \(2,\) of gamma",
        ),
        (lambda: sm.Pixelfly.from_dense(torch.ones(32, 32), LAYOUTS["empty"], 33), ValueError, "rank must be at most"),
        (lambda: sm.Pixelfly.from_dense(torch.ones(32, 32), LAYOUTS["empty"], 2, gamma=1), ValueError, "gamma"),
        (lambda: sm.Pixelfly.from_dense(torch.ones(32, 33), LAYOUTS["empty"], 2), ValueError, "layout must have"),
        (lambda: sm.Pixelfly.from_dense(torch.full((32, 32), torch.nan), LAYOUTS["empty"], 2), ValueError, "NaN"),
        (lambda: sm.Pixelfly.random((32, 32), 1.5, 2), ValueError, "density must be a number in"),
        (lambda: sm.Pixelfly.random((32, 32), "flat", 2), ValueError, "density must be a number in"),
        (lambda: sm.Pixelfly.from_dense(torch.ones(32, 32), 0, 2), ValueError, "density must be a number in"),
        (lambda: sm.Pixelfly.from_dense(torch.ones(16, 16), 0.5, 2), ValueError, "block must be at most"),
        (lambda: sm.PixelflyConfig(ratio=0.01).resolve(1024, 1024), sm.BudgetError, "at least 32769"),
        (
            lambda: sm.PixelflyConfig(ratio=0.5).resolve(64, 64),
            sm.BudgetError,
            "2048 of them .* gamma; the budget is 2048",
        ),
        (lambda: sm.PixelflyConfig(pattern="banded"), ValueError, "pattern must be"),
        (lambda: sm.PixelflyConfig(pattern="top_k"), ValueError, "needs a budget"),
        (lambda: sm.PixelflyConfig(pattern="top_k", ratio=0.2).resolve(64, 64), sm.BudgetError, "at least 1025"),
        (lambda: sm.PixelflyConfig(max_stride=2, rank=2, ratio=0.5), ValueError, "not all"),
        (lambda: sm.PixelflyConfig(split="best"), ValueError, "split"),
        (lambda: sm.PixelflyConfig(max_stride=3).resolve(256, 256), ValueError, "power of two"),
        (lambda: sm.PixelflyConfig().resolve(16, 16), ValueError, "block must be at most"),
        (lambda: sm.PixelflyConfig(rank=300).resolve(256, 256), ValueError, "rank must be at most"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
