"""Layers are drop-in for nn.Linear."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import structmat as sm
from structmat.nn import (
    BlockDiagonalLinear,
    ButterflyLinear,
    KaleidoscopeLinear,
    LowRankLinear,
    MatrixParameters,
    MonarchLinear,
    OrthogonalButterflyLinear,
    StructuredLinear,
)
from structmat.testing import assert_close

LAYERS = {
    "monarch": lambda i, o, **kw: MonarchLinear(i, o, nblocks=4, **kw),
    "monarch-kl": lambda i, o, **kw: MonarchLinear(i, o, nblocks=(2, 3), rank=2, **kw),
    "lowrank": lambda i, o, **kw: LowRankLinear(i, o, rank=3, **kw),
    "blockdiagonal": lambda i, o, **kw: BlockDiagonalLinear(i, o, nblocks=3, **kw),
    "butterfly": lambda i, o, **kw: ButterflyLinear(i, o, **kw),
    "butterfly-blocks": lambda i, o, **kw: ButterflyLinear(i, o, nblocks=2, pad=True, **kw),
    "kaleidoscope": lambda i, o, **kw: KaleidoscopeLinear(i, o, width=2, **kw),
    "orthogonal": lambda i, o, **kw: OrthogonalButterflyLinear(i, o, **kw),
    "product": lambda i, o, **kw: StructuredLinear(
        sm.Monarch.random((o, i), 2, **{k: v for k, v in kw.items() if k != "bias"})
        @ sm.Permutation.random((i, i), **{k: v for k, v in kw.items() if k != "bias"}),
        kw.get("bias", True),
    ),
}
SIZES = [(24, 36), (37, 23), (13, 13)]
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@layers
@sizes
def test_forward_equals_the_dense_layer(make, size):
    layer = make(*size, dtype=torch.float64)
    assert (layer.in_features, layer.out_features) == size
    for shape in [(size[0],), (0, size[0]), (5, size[0]), (2, 3, 4, size[0])]:
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(layer(x), nn.functional.linear(x, layer.weight().to_dense(), layer.bias))
    bare = make(*size, bias=False, dtype=torch.float64)
    assert bare.bias is None
    assert not any("bias" in key for key in bare.state_dict())
    assert_close(bare(x), x @ bare.weight().to_dense().mT)


@pytest.mark.parametrize("size", [(384, 1536), (1536, 384), (50, 37), (5, 64), (1024, 1024)], ids=str)
@pytest.mark.parametrize("name", ["monarch", "lowrank", "blockdiagonal", "butterfly", "butterfly-blocks"])
def test_output_variance_is_that_of_linear(name, size):
    """Standard deviation 1/sqrt(3) within 5% for N(0, 1) inputs, without bias; the bias is uniform by fan-in."""
    outputs = []
    layer = LAYERS[name](*size)
    for _ in range(20):
        layer.reset_parameters()
        with torch.no_grad():
            outputs.append(layer.weight().linear(torch.randn(256, size[0])).flatten())
        bound = size[0] ** -0.5
        assert layer.bias is not None
        assert layer.bias.abs().max() <= bound
        assert layer.bias.std() > 0.3 * bound
    std = torch.cat(outputs).std().item()
    assert abs(std * 3**0.5 - 1) <= 0.05, f"standard deviation {std:.4f}, nn.Linear has {3**-0.5:.4f}"


@layers
def test_copies_pickles_and_state_dicts(make, tmp_path):
    layer = make(24, 36)
    x = torch.randn(3, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(24, 36)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = make(24, 36)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(x), layer(x))


def test_state_dict_keys():
    model = nn.ModuleDict({"fc": MonarchLinear(8, 8)})
    assert sorted(model.state_dict()) == ["fc.bias", "fc.weight.left", "fc.weight.right"]
    nested = StructuredLinear(sm.Product((sm.Dense.random((3, 8)), sm.Permutation.random((8, 8)))))
    assert sorted(nested.state_dict()) == ["bias", "weight.factors.0.weight", "weight.factors.1.perm"]
    assert [n for n, _ in nested.named_parameters()] == ["bias", "weight.factors.0.weight"]


def test_shared_factors_stay_one_parameter():
    M = sm.Monarch.random((8, 8), 2, dtype=torch.float64)
    layer = MatrixParameters(sm.Product((M, M.mT)))
    assert len(list(layer.parameters())) == 2
    layer().linear(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    D = layer().to_dense()
    assert_close(D, D.mT)


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_conversion(make, dtype):
    layer = make(24, 36).to(dtype)
    y = layer(torch.randn(3, 24, dtype=dtype))
    assert y.dtype == dtype
    assert layer.weight.dtype == dtype
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(3, 24, dtype=torch.float32))


@layers
def test_autocast_returns_its_dtype_and_trains(make):
    layer, dense = make(24, 36), nn.Linear(24, 36)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == dense(x).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    exact = layer.double()(x.double())
    assert_close(y, exact)


@layers
def test_meta_device_then_materialised(make):
    with torch.device("meta"):
        layer = make(24, 36)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 36)
    assert make(24, 36, device="meta").weight.device.type == "meta"
    if any(True for _ in layer.buffers()):
        return  # a permutation has no initialisation to come back from
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert 0.2 < layer(torch.randn(512, 24)).std() < 1


@layers
def test_training_reduces_the_loss_and_compiles_and_exports(make):
    layer = make(24, 36)
    target = torch.randn(36, 24) / 5
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2)
    torch.compiler.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(60):
        x = torch.randn(64, 24)
        loss = (step(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    x = torch.randn(5, 24)
    program = torch.export.export(layer, (x,))
    assert_close(program.module()(x), layer(x))


def test_compiled_model_of_several_layers():
    model = nn.Sequential(MonarchLinear(20, 40), nn.GELU(), LowRankLinear(40, 40, rank=4), BlockDiagonalLinear(40, 7))
    x = torch.randn(6, 20)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_functional_call_and_per_sample_gradients():
    layer = MonarchLinear(12, 8, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    xs = torch.randn(5, 12, dtype=torch.float64)

    def loss(p, x):
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    fast = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        slow = torch.func.grad(loss)(parameters, x)
        for name in slow:
            assert_close(fast[name][i], slow[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_keeps_everything_else(dtype, bias):
    linear = nn.Linear(29, 31, bias=bias, dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    for layer in (
        MonarchLinear.from_linear(linear, nblocks=(29, 31)),  # slices of one entry: exact
        LowRankLinear.from_linear(linear, rank=29),  # full rank: exact
        StructuredLinear.from_linear(linear, sm.BlockDiagonalConfig(nblocks=1)),
    ):
        assert not layer.training
        assert not any(p.requires_grad for p in layer.weight.parameters())
        assert (layer.bias is not None) == bias
        assert layer.weight.dtype == dtype
        x = torch.randn(4, 29, dtype=dtype)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        assert_close(layer(x), exact)
        if bias:
            assert layer.bias.requires_grad
            assert layer.bias is not linear.bias
            assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: MonarchLinear(3, 8), ValueError, "must not exceed"),
        (lambda: MonarchLinear(0, 8), ValueError, "in_features must be at least 1"),
        (lambda: MonarchLinear(8.0, 8), TypeError, "in_features must be an integer"),
        (lambda: StructuredLinear(torch.ones(3, 3)), TypeError, "StructuredMatrix"),
        (lambda: StructuredLinear(sm.Dense.random((1, 2, 3, 3))), ValueError, "at most one batch"),
        (lambda: StructuredLinear(sm.Dense.random((2, 3)), torch.ones(3)), ValueError, "bias must have shape"),
        (lambda: StructuredLinear(sm.Dense.random((2, 3)), torch.ones(2).double()), TypeError, "dtype"),
        (lambda: MonarchLinear.from_linear(nn.Conv1d(4, 4, 1)), TypeError, "nn.Linear"),
        (lambda: MonarchLinear(8, 8)(torch.ones(2, 9)), ValueError, "size 8"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_complex_layers():
    layer = MonarchLinear(12, 8, dtype=torch.complex64)
    x = torch.randn(256, 12, dtype=torch.complex64)
    assert_close(layer(x), x @ layer.weight().to_dense().mT + layer.bias)
    assert layer.bias.imag.abs().max() > 0


def test_a_module_taken_for_a_matrix_says_how_to_get_one():
    layer = MonarchLinear(8, 8)
    with pytest.raises(AttributeError, match=r"layer\.weight\(\)\.to_dense"):
        layer.weight.to_dense()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.weight.nonsense  # noqa: B018
