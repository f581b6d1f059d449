"""Layers that compress_ must not touch, and the reasons that it gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import structmat
from structmat import surgery


class Tied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)
        self.twin = nn.Linear(8, 8, bias=False)
        if how == "parameter":
            self.head.weight = self.embed.weight
        else:
            self.head.weight = nn.Parameter(self.embed.weight.data)
        self.twin.weight = self.body.weight
        self.free = nn.Linear(8, 8)
        self.free.bias = self.body.bias


@pytest.mark.parametrize("how", ["parameter", "storage"])
def test_tied_weights_are_left_alone(how):
    model = Tied(how)
    report = surgery.compress_(model, structmat.LowRankConfig(rank=2))
    assert {row.name: row.skipped for row in report.rows} == {
        "body": "its weight is tied to twin.weight",
        "head": "its weight is tied to embed.weight",
        "twin": "its weight is tied to body.weight",
        "free": None,
    }
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert model.free.bias is model.body.bias
    assert "left alone, its weight is tied to embed.weight: 1 (head)" in str(report)


def test_multihead_attention_is_safe():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True), "out": nn.Linear(16, 16)})
    report = surgery.compress_(model, structmat.LowRankConfig(rank=2))
    assert [row.name for row in report.compressed] == ["out"]
    assert "NonDynamicallyQuantizableLinear, a subclass" in (report.skipped[0].skipped or "")
    x = torch.randn(1, 3, 16)
    assert model["attention"](x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_off_its_fused_path(tmp_path, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    surgery.compress_(model, structmat.LowRankConfig(rank=4))
    assert isinstance(model.layers[1].linear2, structmat.nn.LowRankLinear)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    expected = model(x, src_key_padding_mask=mask)  # with gradients the fused path is not taken
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)
    surgery.save_file(model, tmp_path / "m.safetensors")
    loaded = nn.TransformerEncoder(layer, 2).eval()
    surgery.load_file(loaded, tmp_path / "m.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, src_key_padding_mask=mask), expected)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def adapted(layer):
    layer.adapter = nn.Parameter(torch.zeros(2, 2))


def patched(layer):
    layer.forward = lambda x: x


def emptied(layer):
    layer.weight = nn.Parameter(torch.empty(8, 0))


class Wrapped(torch.Tensor):
    pass


def wrapped(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Wrapped))


def float8(layer):
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (parametrizations.weight_norm, "is parametrized"),
        (parametrizations.orthogonal, "is parametrized"),
        (pruned, "its weight is not a parameter"),
        (adapted, "more than weight and bias: adapter"),
        (patched, "forward method has been replaced"),
        (emptied, "has shape (8, 0)"),
        (wrapped, "its weight is a Wrapped, not a plain tensor"),
        (float8, "dtype torch.float8_e4m3fn"),
    ],
)
def test_unusual_layers_are_left_alone(spoil, reason):
    model = nn.ModuleDict({"odd": nn.Linear(8, 8), "plain": nn.Linear(8, 8), "lazy": nn.LazyLinear(3)})
    spoil(model["odd"])
    report = surgery.compress_(model, structmat.LowRankConfig(rank=2))
    assert [row.name for row in report.compressed] == ["plain"]
    skipped = {row.name: row.skipped for row in report.skipped}
    assert reason in skipped["odd"]
    assert "it is a LazyLinear" in skipped["lazy"]
