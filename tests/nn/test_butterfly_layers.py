"""Butterfly layers beyond what every layer is tested for."""

import pytest
import torch
from torch import nn

from structmat import Butterfly
from structmat.nn import ButterflyLinear, OrthogonalButterflyLinear, parameter_groups
from structmat.testing import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("size", "dtype"), [((8, 8), torch.float32), ((6, 6), torch.complex64), ((15, 4), torch.float32)], ids=str
)
def test_orthogonal_stays_orthogonal(size, dtype):
    """Rows or columns, after 1000 steps of Adam towards a matrix that is not."""
    layer = OrthogonalButterflyLinear(*size, bias=False, dtype=dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    target = torch.randn(size[1], size[0], dtype=dtype)
    first = last = None
    for _ in range(1000):
        loss = (layer.weight().to_dense() - target).abs().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
        first = last if first is None else first
    assert last < 0.9 * first
    W = layer.weight().to_dense().detach()
    gram = W @ W.mH if size[1] <= size[0] else W.mH @ W
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ButterflyLinear(24, 36),
        lambda: ButterflyLinear(10, 12, nblocks=3, increasing_stride=False),
        lambda: OrthogonalButterflyLinear(12, 12),
    ],
)
def test_every_parameter_changes_in_one_step(make):
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(50, layer.in_features)).square().mean().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        changed = p != before[name]
        if "generators" in name:  # an exponential's generator: all but the diagonals, which it does not use
            changed |= torch.eye(p.shape[-2], dtype=torch.bool)[:, :, None]
        assert changed.all(), name


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1000, 1000)], ids=str)
def test_output_variance_at_every_number_of_blocks(size, width):
    """That of nn.Linear: over many draws, for the squares of products of many factors have heavy tails."""
    draws = 4000 if size[0] < 100 else 4
    layer = ButterflyLinear(*size, bias=False, nblocks=width)
    B = Butterfly.random((draws, size[1], size[0]), nblocks=width)
    assert layer.weight().patterns == B.patterns
    variance = B.to_dense().square().sum(-1).mean().item()  # of outputs of inputs from N(0, 1)
    assert abs(3 * variance - 1) < 0.1


def test_a_fast_transform_is_learned_from_samples():
    """The Hadamard transform of size 8, from random pairs."""
    n = 8
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    dense = torch.kron(H, torch.kron(H, H)) / n**0.5
    layer = ButterflyLinear(n, n, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(1000):
        x = torch.randn(32, n)
        loss = (layer(x) - x @ dense.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(layer.weight().to_dense(), dense.double(), 1e-2)


def test_factors_are_not_decayed():
    model = nn.Sequential(ButterflyLinear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 4))
    model[3].requires_grad_(False)
    decayed, others = parameter_groups(model, 0.3)
    assert decayed["params"] == [model[2].weight] and decayed["weight_decay"] == 0.3
    assert {id(p) for p in others["params"]} == {
        id(p) for p in model.parameters() if p is not model[2].weight and p.requires_grad
    }
    assert others["weight_decay"] == 0


def test_a_layer_computes_with_its_butterfly():
    layer = ButterflyLinear(30, 12, nblocks=2, dtype=torch.float64)
    x = torch.randn(3, 30, dtype=torch.float64)
    assert_close(layer(x), x @ layer.weight().to_dense().mT + layer.bias)
    with pytest.raises(ValueError, match="nblocks must be at least 1"):
        ButterflyLinear(4, 4, nblocks=0)
