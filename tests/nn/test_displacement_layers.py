"""Layers of low displacement rank, Fastfood layers and the structured LSTM cell."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import structmat as sm
from structmat.nn import (
    CirculantLinear,
    FastfoodLinear,
    LDRConv2d,
    LDRLinear,
    StructuredLSTMCell,
    ToeplitzLikeLinear,
    ToeplitzLinear,
    parameter_groups,
)
from structmat.testing import assert_close

KINDS = ("subdiagonal", "tridiagonal", "toeplitz", "hankel", "vandermonde", "cauchy")
LAYERS = {
    **{kind: functools.partial(LDRLinear, kind=kind) for kind in KINDS},
    "open": functools.partial(LDRLinear, kind="subdiagonal", corner=False, rank=1),
    "toeplitzlike": functools.partial(ToeplitzLikeLinear, rank=3, e=0.5, f=2.0),
    "plain-toeplitz": ToeplitzLinear,
    "circulant": CirculantLinear,
    "fastfood": functools.partial(FastfoodLinear, pad=True),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@layers
@pytest.mark.parametrize("size", [(16, 16), (12, 18), (13, 7), (1, 3)], ids=str)
def test_forward_equals_the_dense_layer(make, size):
    layer = make(*size, dtype=torch.float64)
    assert (layer.in_features, layer.out_features) == size
    for shape in [(size[0],), (0, size[0]), (2, 3, size[0])]:
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(layer(x), nn.functional.linear(x, layer.weight().to_dense(), layer.bias), 1e-11)
    assert make(*size, bias=False).bias is None


@layers
@pytest.mark.parametrize("size", [(16, 64), (64, 16), (32, 32)], ids=str)
def test_output_variance_is_that_of_linear(make, size):
    layer = make(*size, bias=False, matrix_batch=300)
    for _ in range(2):
        std = layer(torch.randn(64, 300, size[0])).std().item()
        assert abs(std * 3**0.5 - 1) <= 0.05, f"standard deviation {std:.4f}, nn.Linear has {3**-0.5:.4f}"
        layer.reset_parameters()
    bound = size[0] ** -0.5
    bias = make(*size).bias
    assert bias.abs().max() <= bound and bias.std() > 0.3 * bound


def test_fastfood_has_its_variance_at_every_draw():
    for n in (1, 2, 256, 1024):
        W = FastfoodLinear(n, n, bias=False, dtype=torch.float64).weight().to_dense()
        assert_close(W.square().sum(-1), torch.full((n,), 1 / 3, dtype=torch.float64))


@layers
def test_every_parameter_changes_in_one_step(make):
    for batch in (None, 2):
        layer = make(12, 10, matrix_batch=batch)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = torch.randn(50, *(() if batch is None else (batch,)), 12)
        layer(x).square().mean().backward()
        optimizer.step()
        for name, p in layer.named_parameters():
            assert (p != before[name]).all(), name
        assert parameter_groups(layer, 0.1)[0]["params"] == []


def test_what_is_learned():
    names = {kind: {n for n, _ in LDRLinear(8, 6, kind=kind).named_parameters()} for kind in KINDS}
    generators = {"bias", "weight.left", "weight.right"}
    assert names["toeplitz"] == names["hankel"] == generators
    assert names["subdiagonal"] == names["tridiagonal"] == generators | {"weight.a", "weight.b"}
    assert names["vandermonde"] == generators | {"weight.A.diag"}
    assert names["cauchy"] == generators | {"weight.A.diag", "weight.B.diag"}
    fastfood = FastfoodLinear(8, 6)
    assert {n for n, _ in fastfood.named_parameters()} == {"bias", "weight.s", "weight.g", "weight.b"}
    assert [n for n, _ in fastfood.named_buffers()] == ["weight.perm"]


@layers
def test_copies_pickles_and_state_dicts(make, tmp_path):
    layer = make(12, 10)
    x = torch.randn(3, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for state in (torch.load(buffer, weights_only=True), load_file(tmp_path / "layer.safetensors")):
        fresh = make(12, 10)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), layer(x))


@layers
def test_autocast_and_half_precision(make):
    layer = make(12, 10)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert_close(y, layer.double()(x.double()))
    half = make(12, 10).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@layers
def test_meta_device_then_materialised(make):
    with torch.device("meta"):
        layer = make(24, 36)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 36)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    W = layer.weight().to_dense()
    assert 0.8 < W.norm() / (36 / 3) ** 0.5 < 1.2
    # What is not drawn anew is where the constructor puts it.
    for name, t in make(24, 36).named_parameters():
        if name.endswith(".diag"):
            assert torch.equal(t, dict(layer.named_parameters())[name])


@layers
def test_training_compiles_and_exports(make):
    layer = make(12, 10)
    target = torch.randn(10, 12) / 4
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    torch.compiler.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(40):
        x = torch.randn(64, 12)
        loss = (step(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    x = torch.randn(5, 12)
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_batch_is_so_many_layers(make, dtype):
    layer = make(10, 12, matrix_batch=3, dtype=dtype)
    W = layer.weight().to_dense()
    assert W.shape == (3, 12, 10) and layer.bias.shape == (3, 12)
    x = torch.randn(5, 3, 10, dtype=dtype)
    assert_close(layer(x), torch.einsum("tni,noi->tno", x, W) + layer.bias, 1e-11)


def test_circulant_rectangles_are_parts_of_a_square():
    for m, n in ((4, 6), (6, 4), (5, 5)):
        W = CirculantLinear(n, m).weight().to_dense()
        size = max(m, n)
        column = torch.cat([W[:, 0], W[0, 1 : size - m + 1].flip(0)])
        for i in range(m):
            for j in range(n):
                assert_close(W[i, j], column[(i - j) % size], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, (2, 3)], ids=str)
def test_convolutions(kind, size):
    layer = LDRConv2d(4, 6, size, stride=2, padding=1, kind=kind, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    assert_close(layer(x), nn.functional.conv2d(x, layer.kernel(), layer.bias, stride=2, padding=1), 1e-11)
    layer.reset_parameters()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    before = [p.detach().clone() for p in layer.parameters()]
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert all((p != old).any() for p, old in zip(layer.parameters(), before, strict=True))


# ---------------------------------------------------------------- recurrent
def dense_lstm(cell):
    """The ``nn.LSTMCell`` with the same weights."""
    bias = cell.bias_ih is not None
    twin = nn.LSTMCell(cell.input_size, cell.hidden_size, bias, dtype=cell.input_to_hidden.dtype)
    state = {
        "weight_ih": cell.input_to_hidden().to_dense().flatten(0, 1),
        "weight_hh": cell.hidden_to_hidden().to_dense().flatten(0, 1),
    }
    twin.load_state_dict({**state, **({"bias_ih": cell.bias_ih, "bias_hh": cell.bias_hh} if bias else {})})
    return twin


MAKERS = {
    "dense": None,
    "subdiagonal": functools.partial(sm.LDRSubdiagonal.random, rank=2),
    "toeplitz": functools.partial(sm.ToeplitzLike.random, rank=2),
    "monarch": sm.MonarchConfig(nblocks=2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_equals_the_dense_one(make, bias):
    cell = StructuredLSTMCell(5, 8, bias, make, make, dtype=torch.float64)
    twin = dense_lstm(cell)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    state = ours = None
    for step in x:
        state, ours = twin(step, state), cell(step, ours)
        for expected, got in zip(state, ours, strict=True):
            assert_close(got, expected)
    single = cell(x[0, 0], (ours[0][0], ours[1][0]))
    assert single[0].shape == (8,)
    assert_close(single[1], twin(x[0, 0], (state[0][0], state[1][0]))[1])


def test_lstm_starts_at_the_scale_of_the_dense_one():
    make = functools.partial(sm.ToeplitzLike.random, rank=2)
    for inputs, hidden in ((40, 160), (160, 40)):
        cell, twin = StructuredLSTMCell(inputs, hidden, True, make, make), nn.LSTMCell(inputs, hidden)
        for _ in range(2):
            for weights, size in ((cell.input_to_hidden, inputs), (cell.hidden_to_hidden, hidden)):
                std = weights().to_dense().square().mean().sqrt().item()
                assert abs(std * math.sqrt(3 * hidden) - 1) < 0.1, (inputs, hidden, size)
            assert abs(cell.bias_ih.std() / twin.bias_ih.std() - 1) < 0.25
            assert cell.bias_hh.abs().max() <= hidden**-0.5
            cell.reset_parameters()


def test_lstm_trains_copies_compiles_and_casts():
    make = functools.partial(sm.LDRSubdiagonal.random, rank=1)
    cell = StructuredLSTMCell(4, 6, hidden_to_hidden=make)
    x = torch.randn(3, 4)
    before = [p.detach().clone() for p in cell.parameters()]
    h, c = cell(x, cell(x))
    (h.square().mean() + c.square().mean()).backward()
    torch.optim.SGD(cell.parameters(), lr=1.0).step()
    assert all((p != old).all() for p, old in zip(cell.parameters(), before, strict=True))
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert torch.equal(twin(x)[0], cell(x)[0])
    fresh = StructuredLSTMCell(4, 6, hidden_to_hidden=make)
    fresh.load_state_dict(cell.state_dict())
    assert torch.equal(fresh(x)[1], cell(x)[1])
    torch.compiler.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, (h, c))[0], cell(x, (h, c))[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = cell(x, (h, c))
    assert low[0].dtype == low[1].dtype == torch.bfloat16
    assert_close(low[0], cell(x, (h, c))[0], 2e-2)
    assert "4, 6" in repr(cell)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: LDRLinear(4, 4, kind="companion"), ValueError, "kind must be one of subdiagonal"),
        (lambda: LDRLinear(4, 4, kind="toeplitz", corner=True), ValueError, "corner is for the kinds"),
        (lambda: LDRLinear(4, 4, rank=0), ValueError, "rank must be at least 1"),
        (lambda: LDRLinear(0, 4), ValueError, "in_features must be at least 1"),
        (lambda: ToeplitzLikeLinear(4, 4, e=1.0, f=1.0), ValueError, "common eigenvalue"),
        (lambda: FastfoodLinear(6, 4), ValueError, "power of two, got 6; pad=True pads inputs with zeros to 8"),
        (lambda: CirculantLinear(4.0, 4), TypeError, "in_features must be an integer"),
        (lambda: LDRConv2d(4, 4, 3, groups=2), ValueError, "groups must be 1"),
        (lambda: StructuredLSTMCell(4, 6, hidden_to_hidden=lambda *a, **k: None), TypeError, "hidden_to_hidden must"),
        (
            lambda: StructuredLSTMCell(4, 6, input_to_hidden=lambda s, **k: sm.Dense.random((6, 4))),
            ValueError,
            r"shape \(4, 6, 4\)",
        ),
        (lambda: StructuredLSTMCell(4, 6)(torch.ones(2, 3)), ValueError, r"x must have shape \(N, 4\)"),
        (
            lambda: StructuredLSTMCell(4, 6)(torch.ones(2, 4), (torch.ones(2, 6), torch.ones(3, 6))),
            ValueError,
            r"c must have shape \(2, 6\)",
        ),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_places_follow_the_module():
    value = sm.ToeplitzLike.random((6, 6), 2, dtype=torch.complex64).convert("cauchy")
    layer = sm.nn.StructuredLinear(value, bias=False)
    assert layer.to_empty(device="meta")(torch.ones(2, 6, dtype=torch.complex64, device="meta")).is_meta
    assert LDRLinear(4, 4, kind="toeplitz", device="meta").to_empty(device="cpu").weight().A.device.type == "cpu"


def test_what_makes_a_weight_must_be_callable():
    with pytest.raises(TypeError, match="hidden_to_hidden must be a function or a config"):
        StructuredLSTMCell(2, 3, hidden_to_hidden=3)
