"""Layouts and splits that are chosen with moments in view, and orders of hidden units."""

import pytest
import torch

import structmat as sm
from structmat import layouts
from structmat.calibrated import fit, metric_of
from structmat.permutation_search import Member, head_order, permuted_moments, search_order

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uneven(m, n, outputs=False):
    """A matrix whose large entries meet small inputs (and gradients)."""
    g = generator()
    x = torch.randn(400, n, generator=g, dtype=F64) * torch.logspace(1, -1, n, dtype=F64)
    grads = torch.randn(400, m, generator=g, dtype=F64) * torch.logspace(1, -1, m, dtype=F64) if outputs else None
    W = torch.randn(m, n, generator=g, dtype=F64) * torch.logspace(-0.5, 0.5, n, dtype=F64)
    return W, sm.Moments.of(x, grads)


def damped(W, value, moments, damping=0.1):
    return metric_of(moments, W).damped(damping).squared(W - value.to_dense())


@pytest.mark.parametrize("outputs", [False, True])
def test_blocks_are_chosen_by_what_they_do_to_outputs(outputs):
    W, moments = uneven(40, 60, outputs)
    config = sm.BlockSparseConfig(block=8, density=0.3)
    plain = sm.project(W, config)
    result = sm.project(W, config, moments)
    fixed = fit(plain.matrix, W, moments, 0.1)
    assert damped(W, result.matrix, moments) < 0.9 * damped(W, fixed, moments)
    # The blocks of largest norm once columns and rows are as large as what they meet.
    metric = metric_of(moments, W).damped(0.1)
    seen = W * metric.S.diagonal().sqrt()
    seen = seen if metric.T is None else seen * metric.T.diagonal().sqrt()[:, None]
    assert torch.equal(result.matrix.layout.mask, layouts.top_k(seen, 8, 0.3).mask)
    assert not torch.equal(result.matrix.layout.mask, plain.matrix.layout.mask)


def test_alike_inputs_change_nothing():
    """Where all inputs are alike both choices agree."""
    W = torch.randn(32, 32, generator=generator(), dtype=F64)
    config, moments = (
        sm.BlockSparseConfig(block=8, density=0.5),
        sm.Moments(torch.eye(32, dtype=F64), torch.zeros(32), 9),
    )
    result, plain = sm.project(W, config, moments), sm.project(W, config)
    assert torch.equal(result.matrix.layout.mask, plain.matrix.layout.mask)
    assert result.error <= plain.error + 1e-12


@pytest.mark.parametrize("pattern", ["flat_butterfly", "top_k"])
@pytest.mark.parametrize("split", ["search", "rule"])
def test_pixelfly_searches_in_the_metric(pattern, split):
    W, moments = uneven(64, 48)
    config = sm.PixelflyConfig(block=8, ratio=0.5, pattern=pattern, split=split)
    result, plain = sm.project(W, config, moments), sm.project(W, config)
    assert result.matrix.num_params <= 64 * 48 // 2
    assert damped(W, result.matrix, moments) <= damped(W, fit(plain.matrix, W, moments, 0.1), moments) + 1e-12
    if split == "rule":
        assert result.matrix.num_params == config.num_params(64, 48)


def test_pixelfly_takes_another_split_where_moments_ask_for_it():
    """A matrix of low rank where inputs are, and blocks where hardly any are."""
    g = generator()
    W = sm.LowRank.random((64, 64), 4, generator=g, dtype=F64).to_dense()
    W = W + 4 * W.std() * layouts.block_diagonal((64, 64), 8).entries() * torch.randn(64, 64, generator=g, dtype=F64)
    x = torch.randn(500, 64, generator=g, dtype=F64)
    x[:, ::2] *= 1e-3
    config = sm.PixelflyConfig(block=8, ratio=0.4)
    result, moments = sm.project(W, config, sm.Moments.of(x), damping=1e-3), sm.Moments.of(x)
    best = min(
        damped(W, fit(sm.Pixelfly._project(W, layout, rank)[0], W, moments, 1e-3), moments, 1e-3)
        for layout, rank in config._splits(64, 64, 1)
    )
    rounding = 1e-24 * damped(W, torch.zeros_like(W), moments, 1e-3)  # the matrix is one of these
    assert damped(W, result.matrix, moments, 1e-3) <= 1.05 * best + rounding


# ---------------------------------------------------------------- orders of hidden units
CONFIGS = {
    "monarch": sm.MonarchConfig(nblocks=4, rank=2),
    "uneven monarch": sm.MonarchConfig(nblocks=(3, 5), rank=2),
    "diagonal": sm.BlockDiagonalConfig(nblocks=4),
    "butterfly blocks": sm.BlockSparseConfig(block=8, pattern="flat_butterfly", density=0.75),
    "pixelfly": sm.PixelflyConfig(block=8, max_stride=1, rank=2),
    "sum": sm.SumConfig((sm.BlockDiagonalConfig(nblocks=4), sm.LowRankConfig(rank=1))),
}


def hidden(config, units=64, width=32, heads=None, dtype=F64, seed=0):
    g = generator(seed)
    first = config.random((units, width), generator=g, dtype=dtype).to_dense()
    second = config.random((width, units), generator=g, dtype=dtype).to_dense()
    if heads is None:
        order = torch.randperm(units, generator=g)
    else:
        size = units // heads
        order = torch.cat([h * size + torch.randperm(size, generator=g) for h in torch.randperm(heads, generator=g)])
    return [Member(first[order], None, config, False), Member(second[:, order], None, config, True)]


def errors(members, order):
    found = [m.permuted(order) for m in members]
    return [sm.project(m.weight, m.config, m.moments).error for m in found]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_hidden_structure_is_found(config):
    members = hidden(config)
    order = search_order(members, None, False, 0.1, 0)
    assert sorted(order.tolist()) == list(range(64))
    before, after = (sum(e * e for e in errors(members, o)) for o in (torch.arange(64), order))
    assert after <= (0.1 if config is CONFIGS["uneven monarch"] else 1e-6) * before  # that one has groups of many sizes
    assert torch.equal(order, search_order(members, None, False, 0.1, 0))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float32])
def test_other_dtypes(dtype):
    members = hidden(CONFIGS["monarch"], dtype=dtype)
    assert max(errors(members, search_order(members, None, False, 0.1, 0))) <= 1e-5


@pytest.mark.parametrize("move", [False, True])
def test_units_stay_in_their_heads(move):
    members = hidden(CONFIGS["diagonal"], heads=4)
    order = search_order(members, 4, move, 0.1, 0)
    inside = order.view(4, 16) // 16
    assert (inside == inside[:, :1]).all()
    heads = inside[:, 0]
    assert torch.equal(heads, torch.arange(4)) or move
    assert torch.equal(head_order(order, 4), (heads[:, None] * 16 + torch.arange(16)).flatten())
    assert (max(errors(members, order)) <= 1e-6) == move  # the heads have been shuffled


@pytest.mark.parametrize("outputs", [False, True])
def test_with_moments_the_calibrated_error_falls(outputs):
    g, members = generator(3), hidden(CONFIGS["monarch"])

    def moments(m, n):
        x, y = (torch.randn(300, k, generator=g, dtype=F64) @ torch.randn(k, k, generator=g, dtype=F64) for k in (n, m))
        return sm.Moments.of(x, y if outputs else None)

    members = [Member(m.weight, moments(*m.weight.shape), m.config, m.columns) for m in members]
    order = search_order(members, None, False, 0.1, 0)
    before = [sm.project(m.weight, m.config, m.moments).calibrated_error for m in members]
    after = [sm.project(p.weight, p.config, p.moments).calibrated_error for p in (m.permuted(order) for m in members)]
    assert sum(e * e for e in after) < 0.4 * sum(e * e for e in before)


def test_moments_follow_the_order():
    g = generator()
    x, y, order = torch.randn(50, 6, generator=g), torch.randn(50, 4, generator=g), torch.tensor([2, 0, 3, 1])
    moved = permuted_moments(sm.Moments.of(x, y), order, columns=False)
    assert torch.allclose(moved.outputs, sm.Moments.of(x, y[:, order]).outputs)
    moved = permuted_moments(sm.Moments.of(y), order, columns=True)
    assert torch.allclose(moved.inputs, sm.Moments.of(y[:, order]).inputs)
    assert torch.allclose(moved.mean, sm.Moments.of(y[:, order]).mean)


def test_low_rank_keeps_its_order_and_tiny_ones_work():
    assert torch.equal(search_order(hidden(sm.LowRankConfig(rank=3)), None, False, 0.1, 0), torch.arange(64))
    for units in (1, 2, 3):
        members = hidden(sm.BlockDiagonalConfig(nblocks=1), units=units, width=2)
        assert sorted(search_order(members, None, False, 0.1, 0).tolist()) == list(range(units))


def test_many_units_are_assigned_in_parts(monkeypatch):
    monkeypatch.setattr("structmat.permutation_search._MOST", 24)
    members = hidden(CONFIGS["diagonal"])
    assert max(errors(members, search_order(members, None, False, 0.1, 0))) < min(errors(members, torch.arange(64)))
