"""compress_, replace_ and densify_: what is replaced, what is kept, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

MONARCH = structmat.MonarchConfig(nblocks=4, rank=2)


def mlp(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 36, **kwargs), nn.Tanh(), nn.Linear(36, 20, **kwargs))


def with_weights(model, weight_of):
    """The same model with dense weights: what the structured one must compute."""
    dense = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, structmat.nn.StructuredLinear):
            parent, _, key = name.rpartition(".")
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight = nn.Parameter(weight_of(module))
            layer.bias = module.bias
            dense.get_submodule(parent)._modules[key] = layer
    return dense


CONFIGS = [
    (MONARCH, structmat.nn.MonarchLinear, "monarch 4x4 rank 2"),
    (structmat.MonarchConfig(nblocks=(3, 2)), structmat.nn.MonarchLinear, "monarch 3x2 rank 4"),
    (structmat.LowRankConfig(rank=3), structmat.nn.LowRankLinear, "lowrank 3"),
    (structmat.BlockDiagonalConfig(nblocks=5), structmat.nn.BlockDiagonalLinear, "blockdiagonal 5"),
]


@pytest.mark.parametrize(("config", "cls", "words"), CONFIGS, ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_those_of_the_projected_weights(config, cls, words, dtype):
    model = mlp(dtype=dtype)
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    biases = [model[0].bias, model[2].bias]
    report = surgery.compress_(model, config)
    assert [type(model[0]), type(model[2])] == [cls, cls]
    assert report.rows[0].structure == words
    for layer, weight, bias, row in zip((model[0], model[2]), weights, biases, report.rows, strict=True):
        assert layer.weight.dtype == dtype
        assert layer.bias is bias
        projected = structmat.project(weight, config)
        torch.testing.assert_close(layer.weight().to_dense(), projected.matrix.to_dense(), rtol=0, atol=0)
        assert (row.error, row.bound) == (projected.error, projected.bound)
        error = (weight.double() - layer.weight().to(torch.float64).to_dense()).norm() / weight.double().norm()
        assert row.error == pytest.approx(error.item(), rel=1e-9)
        assert row.params_after == projected.matrix.num_params
        assert row.params_before == weight.numel()
        assert row.flops_before == 2 * weight.numel()
        assert row.flops_after == projected.matrix.flops
    x = torch.randn(7, 24, dtype=torch.float64)
    double = copy.deepcopy(model).to(torch.float64)
    dense = with_weights(double, lambda layer: layer.weight().to_dense().detach())
    torch.testing.assert_close(double(x), dense(x), rtol=1e-12, atol=1e-12)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    out = model(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(x.to(dtype).double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(13, 17), (17, 13), (1, 13), (13, 1), (1, 1)])
@pytest.mark.parametrize("config", [structmat.LowRankConfig(rank=1), structmat.BlockDiagonalConfig(nblocks=1)])
def test_prime_and_degenerate_sizes(size, config):
    model = nn.Sequential(nn.Linear(size[1], size[0], bias=False))
    weight = model[0].weight.detach().clone()
    surgery.compress_(model, config)
    x = torch.randn(5, size[1])
    expected = x @ structmat.project(weight, config).matrix.to_dense().mT
    torch.testing.assert_close(model(x), expected)
    assert model[0].bias is None


def test_prime_sizes_monarch():
    model = nn.Sequential(nn.Linear(97, 89))
    surgery.compress_(model, structmat.MonarchConfig(nblocks=4, ratio=0.5))
    assert model(torch.randn(2, 97)).shape == (2, 89)
    assert model[0].weight().num_params <= 0.5 * 97 * 89


def test_mode_trainability_and_attributes_are_kept():
    model = mlp().eval()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[2].tag = "mine"
    surgery.compress_(model, MONARCH)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model[0].parameters())
    assert model[2].weight.left.requires_grad
    assert not model[2].bias.requires_grad
    assert model[2].tag == "mine"
    surgery.densify_(model)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert not model[2].training
    assert model[2].tag == "mine"


def test_hooks_move_with_their_handles():
    model, seen = mlp(), []
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda m, i, o: seen.append("forward")),
        layer.register_forward_pre_hook(lambda m, a, k: seen.append("pre"), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, i, o: seen.append("backward")),
        layer.register_full_backward_pre_hook(lambda m, g: seen.append("backward pre")),
        layer.register_state_dict_post_hook(lambda m, s, p, l: seen.append("save")),
        layer.register_load_state_dict_post_hook(lambda m, keys: seen.append("load")),
        layer.register_load_state_dict_pre_hook(lambda m, *args: seen.append(type(m).__name__)),
    ]
    x = torch.randn(3, 24, requires_grad=True)
    surgery.compress_(model, MONARCH)
    del layer  # the new layer must not depend on the old one
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "forward", "backward pre", "backward", "save", "MonarchLinear", "load"]
    surgery.densify_(model)
    seen.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "forward", "backward pre", "backward", "save", "Linear", "load"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_the_old_layer_keeps_working_alone():
    model, seen = mlp(), []
    old = model[0]
    old.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    surgery.compress_(model, MONARCH)
    old.register_forward_hook(lambda m, i, o: seen.append("later"))
    x = torch.randn(2, 24)
    model(x)
    old(x)
    assert seen == ["MonarchLinear", "Linear", "later"]


def test_every_container():
    shared = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = shared
            self.again = shared
            self.items = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), shared)])
            self.named = nn.ModuleDict({"one": nn.Linear(8, 8)})

        def forward(self, x):
            for layer in (self.first, self.again, self.items[0], self.items[1], self.named["one"]):
                x = layer(x)
            return x

    model = Model()
    before = sum(p.numel() for p in model.parameters())
    report = surgery.compress_(model, structmat.LowRankConfig(rank=2))
    assert [row.name for row in report.compressed] == ["first", "items.0", "items.1.0", "named.one"]
    assert model.first is model.again is model.items[1][1]
    assert isinstance(model.first, structmat.nn.LowRankLinear)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert (report.model_params_before, report.model_params_after) == (
        before,
        sum(p.numel() for p in model.parameters()),
    )
    model(torch.randn(2, 8)).sum().backward()
    surgery.densify_(model)
    assert model.first is model.again is model.items[1][1]


def test_data_parallel_wrapper_is_walked_through():
    model = nn.DataParallel(nn.Linear(8, 8))
    surgery.compress_(model, structmat.LowRankConfig(rank=2))
    assert isinstance(model.module, structmat.nn.LowRankLinear)


def test_patterns_and_filter():
    model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp(), "head": nn.Linear(20, 20)})
    report = surgery.compress_(
        model,
        {"encoder.0": structmat.LowRankConfig(rank=2), "*coder.*": MONARCH, "nothing.*": MONARCH},
        filter_fn=lambda name, module: name != "decoder.2",
    )
    got = {row.name: (row.structure, row.skipped) for row in report.rows}
    assert got == {
        "encoder.0": ("lowrank 2", None),
        "encoder.2": ("monarch 4x4 rank 2", None),
        "decoder.0": ("monarch 4x4 rank 2", None),
        "decoder.2": (None, "filter_fn returned false"),
        "head": (None, "no pattern matches its name"),
    }
    assert report.unused_patterns == ("nothing.*",)
    assert isinstance(model["decoder"][2], nn.Linear)


def test_the_compressed_model_trains():
    model = mlp()
    surgery.compress_(model, MONARCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.randn(64, 24)
    y = x[:, :20]
    losses = []
    for _ in range(40):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_sizes_are_those_of_what_was_found():
    """A search takes what suits the matrix, which random matrices of its config do not tell."""
    torch.manual_seed(0)
    config = structmat.PixelflyConfig(block=8, ratio=0.5)
    model = nn.Sequential(nn.Linear(48, 64))
    model[0].weight.data = torch.randn(64, 3) @ torch.randn(3, 48) + torch.randn(64, 48) / 100
    report = surgery.compress_(model, config)
    value = model[0].weight()
    assert report.params_after == value.num_params <= 1536 and report.flops_after == value.flops
    assert value.num_params != config.num_params(64, 48) <= 1536
