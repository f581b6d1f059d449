"""Blocks plus low rank in the metric of inputs: exact members, monotone, and near to what block descent finds."""

from __future__ import annotations

import itertools

import pytest
import torch

import structmat
from structmat import Moments, PixelflyConfig, layouts
from structmat.calibrated import fit
from structmat.projection.weighted import Metric
from structmat.projection.weighted_pixelfly import InputMetric


def problem(m, n, dtype=torch.float64):
    g = torch.Generator().manual_seed(m + n)
    x = torch.randn(4 * n, n, generator=g, dtype=dtype) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    mix = torch.randn(n, n, generator=g, dtype=dtype)
    return torch.randn(m, n, generator=g, dtype=dtype), Moments.of(x @ mix.mT)


def damped(moments):
    return Metric(moments.inputs).damped(0.1)


@pytest.mark.parametrize(("m", "n"), [(32, 32), (17, 40), (40, 17), (23, 23), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_error_is_that_of_the_factors_and_falls(m, n, dtype):
    W, moments = problem(m, n, dtype)
    metric = damped(moments)
    layout = layouts.flat_butterfly((m, n), (min(8, m), min(8, n)), 1)
    rank = min(m, n) // 4
    errors = []
    for sweeps in (1, 2, 4, 8, 16, 32):
        inputs = InputMetric(W, metric)
        found = inputs.fit(layout, rank, sweeps)
        values, left, right = inputs.factors(found)
        dense = structmat.BlockSparse(values, layout).to_dense() + left @ right
        assert metric.squared(W - dense) == pytest.approx(found.error, rel=1e-8, abs=1e-10 * metric.squared(W))
        errors.append(found.error)
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(errors))
    alone = InputMetric(W, metric).fit(layout, 0, 9).error
    assert errors[-1] <= alone * (1 + 1e-9)


@pytest.mark.parametrize("empty", [True, False])
def test_low_rank_alone_is_the_closed_form(empty):
    W, moments = problem(24, 40)
    layout = layouts.flat_butterfly((24, 40), 8, 1)
    if empty:
        layout = structmat.layouts.Layout(torch.zeros_like(layout.mask), layout.block, layout.shape)
    found = InputMetric(W, damped(moments)).fit(layout, 6, 40)
    best = structmat.project(W, structmat.LowRankConfig(rank=6), moments)
    lost = damped(moments).squared(W - best.matrix.to_dense())
    assert found.error == pytest.approx(lost, rel=1e-9) if empty else found.error < lost


@pytest.mark.parametrize(("m", "n"), [(64, 64), (48, 96), (96, 40)])
def test_momentum_is_not_behind_block_descent(m, n):
    W, moments = problem(m, n)
    layout = layouts.flat_butterfly((m, n), 8, 2)
    start = structmat.Pixelfly.from_dense(W, layout, 8)
    old = fit(start, W, moments, 0.1)
    ours = InputMetric(W, damped(moments)).fit(layout, 8, 60, start.low_rank.left)
    assert ours.error <= 1.01 * damped(moments).squared(W - old.to_dense())


def test_single_precision_is_enough_for_a_sketch():
    W, moments = problem(64, 128)
    layout = layouts.flat_butterfly((64, 128), 16, 2)
    double = InputMetric(W, damped(moments)).fit(layout, 12, 20)
    single = InputMetric(W, damped(moments), torch.float32).fit(layout, 12, 20)
    assert single.left.dtype == torch.float32 and single.error == pytest.approx(double.error, rel=1e-3)


def test_output_moments_are_refused():
    W, moments = problem(8, 8)
    with pytest.raises(ValueError, match="inputs alone"):
        InputMetric(W, Metric(moments.inputs, torch.eye(8, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_sketch_is_near_to_the_projection(dtype, gradients):
    W, moments = problem(64, 96)
    if gradients:
        g = torch.Generator().manual_seed(5)
        moments = Moments.of(torch.randn(400, 96, generator=g), torch.randn(400, 64, generator=g))
    W, config = W.to(dtype), PixelflyConfig(block=8, ratio=0.6)
    whole = structmat.project(W, config, moments)
    assert (whole.calibrated_error or 1) <= (whole.plain_calibrated_error or 0)
    sketch = config._sketch(W, moments, 0.1, 2, {})
    assert sketch.dtype == dtype and sketch.num_params <= 0.6 * W.numel()
    metric = Metric(moments.inputs, moments.outputs).damped(0.1)
    lost = [metric.squared(W.double() - A.to(torch.float64).to_dense()) for A in (sketch, whole.matrix)]
    assert lost[0] <= 1.06 * lost[1]
