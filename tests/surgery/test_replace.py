"""replace_ and densify_."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery


def test_replace_draws_like_a_fresh_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, dtype=torch.float64))
    old = model[0].bias
    surgery.replace_(model, structmat.MonarchConfig(nblocks=4, ratio=0.5))
    assert model[0].weight.dtype == model[0].bias.dtype == torch.float64
    assert model[0].bias is not old
    assert not torch.equal(model[0].bias, old)
    out = model(torch.randn(2000, 512, dtype=torch.float64)) - model[0].bias
    assert out.std().item() == pytest.approx(3**-0.5, rel=0.02)
    bare = nn.Sequential(nn.Linear(8, 8, bias=False))
    surgery.replace_(bare, structmat.LowRankConfig(rank=2))
    assert bare[0].bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_densify_is_exact(dtype):
    torch.manual_seed(0)
    A = structmat.Monarch.random((12, 10), 2, dtype=dtype) @ structmat.Diagonal.random((10, 10), dtype=dtype)
    model = nn.Sequential(structmat.nn.StructuredLinear(A), structmat.nn.LowRankLinear(12, 7, rank=3, dtype=dtype))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    dense = [layer.weight().to(wide).to_dense() for layer in model]
    biases = [layer.bias for layer in model]
    report = surgery.densify_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    for layer, exact, bias in zip(model, dense, biases, strict=True):
        assert torch.equal(layer.weight, exact.to(dtype))
        assert layer.bias is bias
    assert report.rows[0].structure == "Product(monarch 2x2 width 10, Diagonal) to dense"
    assert report.model_params_after == sum(p.numel() for p in model.parameters())


def test_densify_keeps_ties():
    model = nn.Sequential(structmat.nn.LowRankLinear(8, 8, rank=2), structmat.nn.LowRankLinear(8, 8, rank=2))
    model[1].weight = model[0].weight
    surgery.densify_(model)
    assert model[0].weight is model[1].weight


def test_densify_leaves_own_layers_alone():
    class Own(structmat.nn.LowRankLinear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(*(Own(8, 8, rank=2) if i else structmat.nn.LowRankLinear(8, 8, rank=2) for i in range(2)))
    report = surgery.densify_(model)
    assert [row.name for row in report.compressed] == ["0"]
    assert report.skipped[0].skipped == "its class Own has a forward method of its own"


def test_densify_leaves_shared_factors_alone():
    half = nn.Sequential(structmat.nn.LowRankLinear(8, 8, rank=2), structmat.nn.LowRankLinear(8, 8, rank=2))
    half[1].weight.left = half[0].weight.left
    half.append(structmat.nn.LowRankLinear(8, 8, rank=2))
    report = surgery.densify_(half, filter_fn=lambda name, module: True)
    assert [row.name for row in report.compressed] == ["2"]
    assert report.skipped[0].skipped == "its weight is tied to 1.weight.left"
    assert half[1].weight.left is half[0].weight.left
