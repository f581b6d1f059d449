"""BlockSparseLinear and PixelflyLinear."""

import copy

import pytest
import torch
from torch import nn

import structmat as sm
from structmat import layouts

LAYERS = {
    "block-sparse": lambda i, o, **k: sm.nn.BlockSparseLinear(i, o, layout=0.2, block=16, **k),
    "butterfly": lambda i, o, **k: sm.nn.BlockSparseLinear(i, o, layout=layouts.flat_butterfly((o, i), 16, 4), **k),
    "pixelfly": lambda i, o, **k: sm.nn.PixelflyLinear(i, o, block=16, max_stride=2, rank=8, **k),
    "pixelfly of a budget": lambda i, o, **k: sm.nn.PixelflyLinear(i, o, block=16, ratio=0.4, **k),
}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


@pytest.mark.parametrize("sizes", [(256, 256), (256, 100), (90, 300)], ids=str)
def test_variance_of_nn_linear(make, sizes):
    torch.manual_seed(0)
    x = torch.randn(512, sizes[0])
    variances = [make(*sizes)(x).var().item() for _ in range(8)]
    dense = [nn.Linear(*sizes)(x).var().item() for _ in range(8)]
    assert abs((sum(variances) / sum(dense)) ** 0.5 - 1) < 0.1


def test_call_bias_and_training(make):
    torch.manual_seed(0)
    layer = make(96, 64)
    x, y = torch.randn(4, 5, 96), torch.randn(4, 5, 64)
    weight = layer.weight().to_dense()
    torch.testing.assert_close(layer(x), x @ weight.mT + layer.bias)
    assert make(96, 64, bias=False).bias is None
    assert layer(x[0, 0]).shape == (64,)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    first = None
    for _ in range(30):
        loss = (layer(x) - y).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    # Zeros stay zeros.
    A = layer.weight()
    if isinstance(A, sm.BlockSparse):
        assert (A.to_dense()[~A.layout.entries()] == 0).all()


def test_copies_compile_and_meta(make):
    torch.manual_seed(0)
    layer = make(96, 64)
    x = torch.randn(3, 96)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    meta = make(96, 64, device="meta")
    assert meta(x.to("meta")).shape == (3, 64)
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(layer.state_dict())
    assert torch.equal(meta(x), layer(x))
    layer.reset_parameters()
    assert not torch.equal(twin(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_from_linear():
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).eval()
    linear.weight.requires_grad_(False)
    found = sm.nn.BlockSparseLinear.from_linear(linear, 0.5, block=16)
    assert found.weight().layout == layouts.top_k(linear.weight, 16, 0.5)
    assert torch.equal(found.bias, linear.bias)
    assert not found.training
    assert not found.weight.values.requires_grad
    whole = sm.nn.PixelflyLinear.from_linear(linear, block=16, max_stride=1, rank=64)
    torch.testing.assert_close(whole(torch.ones(96)), linear(torch.ones(96)))
    part = sm.nn.PixelflyLinear.from_linear(linear, block=16, ratio=0.5)
    assert part.weight().num_params <= 96 * 64 // 2
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        sm.nn.PixelflyLinear.from_linear(nn.ReLU())


def test_compress_and_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    sm.surgery.compress_(model, sm.PixelflyConfig(block=16, ratio=0.6))
    path = tmp_path / "model.safetensors"
    sm.surgery.save_file(model, path)
    fresh = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    sm.surgery.load_file(fresh, path)
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), model(x))


def test_errors():
    with pytest.raises(ValueError, match="layout must have the shape"):
        sm.nn.BlockSparseLinear(8, 16, layout=layouts.full((8, 16), 4))
    with pytest.raises(ValueError, match="block must be at most"):
        sm.nn.PixelflyLinear(16, 16)
    with pytest.raises(sm.BudgetError, match="at least"):
        sm.nn.PixelflyLinear(256, 256, ratio=0.05)
