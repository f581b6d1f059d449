"""The kaleidoscope layer and the convolution of learnable transforms."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from structmat import kaleidoscopes
from structmat.nn import KaleidoscopeConv2d, KaleidoscopeLinear, StructuredLinear, parameter_groups
from structmat.testing import assert_close, relative_error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("size", [(24, 36), (37, 23), (1, 1)], ids=str)
def test_forward_equals_the_dense_layer(size, dtype):
    layer = KaleidoscopeLinear(*size, width=2, expansion=2, dtype=dtype)
    for shape in [(size[0],), (0, size[0]), (2, 3, size[0])]:
        x = torch.randn(shape, dtype=dtype)
        assert_close(layer(x), x @ layer.weight().to_dense().mT + layer.bias)
    assert KaleidoscopeLinear(*size, bias=False).bias is None


@pytest.mark.parametrize("options", [{}, {"width": 2}, {"dtype": torch.complex64}], ids=str)
def test_every_parameter_changes_in_one_step(options):
    layer = KaleidoscopeLinear(12, 12, **options)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(50, 12, dtype=layer.weight.dtype)
    layer(x).abs().square().mean().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        assert (p != before[name]).all(), name


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1000, 1000)], ids=str)
def test_output_variance_is_that_of_linear(size, width):
    layer = KaleidoscopeLinear(*size, width=width)
    for _ in range(2):
        with torch.no_grad():
            std = layer.weight().linear(torch.randn(4000, size[0])).std().item()
        assert abs(3 * std**2 - 1) <= 0.1
        layer.reset_parameters()


def test_expanded_layers_have_it_on_average():
    variance = torch.stack(
        [KaleidoscopeLinear(64, 64, width=2, expansion=2).weight().to_dense().square().sum(-1) for _ in range(50)]
    )
    assert abs(3 * variance.mean() - 1) <= 0.1


def test_copies_and_state_dicts(tmp_path):
    layer, x = KaleidoscopeLinear(24, 36, width=2), torch.randn(3, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert "weight.factors.0.values" in layer.state_dict()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = KaleidoscopeLinear(24, 36, width=2)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(x), layer(x))
    with torch.device("meta"):
        empty = KaleidoscopeLinear(24, 36, width=2)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_compile_and_autocast():
    layer, x = KaleidoscopeLinear(24, 36, width=2), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x).double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    assert relative_error(y, layer(x)) < 1e-2
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert relative_error(half(x.bfloat16()), layer(x)) < 2e-2


def test_an_exact_member_is_a_start():
    perm = torch.randperm(30)
    layer, x = StructuredLinear(kaleidoscopes.permutation(perm), bias=False), torch.randn(4, 30)
    assert torch.equal(layer(x), x[:, perm])
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# -------------------------------------------------------------------- convolution
CONVOLUTIONS = [
    ((10, 12), 3, 1, "zeros"),
    ((7, 13), (3, 2), 0, "zeros"),
    ((5, 7), (7, 3), (2, 4), "zeros"),
    ((1, 1), 1, 0, "zeros"),
    ((2, 3), 2, 3, "zeros"),
    ((10, 12), (3, 5), (1, 2), "circular"),
    ((11, 13), (3, 2), 0, "circular"),
]


def convolved(layer, x):
    rows, columns = layer.padding
    padded = F.pad(x, (columns, columns, rows, rows), mode={"zeros": "constant"}.get(layer.padding_mode, "circular"))
    return F.conv2d(padded, layer.weight, layer.bias)


@pytest.mark.parametrize(("size", "kernel", "padding", "mode"), CONVOLUTIONS, ids=str)
def test_it_starts_as_the_exact_convolution(size, kernel, padding, mode):
    layer = KaleidoscopeConv2d(3, 4, kernel, size, padding, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = convolved(layer, x)
    assert expected.shape[2:] == layer.output_size
    assert_close(layer(x), expected)
    assert_close(layer(x[0]), expected[0])
    single = layer.to(torch.float32)
    assert_close(single(x.float()), expected)


def test_every_tensor_of_the_convolution_learns():
    layer = KaleidoscopeConv2d(2, 3, 3, 8, padding=1)
    x = torch.randn(4, 2, 8, 8)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    losses = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    for _ in range(5):
        loss = (layer(x) - x.flip(-1).sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in layer.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert relative_error(layer(x), convolved(layer, x)) > 1e-3  # it is no convolution any more


def test_the_convolution_converts_compiles_and_casts():
    layer, x = KaleidoscopeConv2d(2, 3, 3, (6, 5), padding=1), torch.randn(4, 2, 6, 5)
    expected = layer(x)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected.double())
    fresh = KaleidoscopeConv2d(2, 3, 3, (6, 5), padding=1)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        twin = copy.deepcopy(layer).to(dtype)
        assert twin(x.to(dtype)).dtype == dtype
        assert relative_error(twin(x.to(dtype)), expected) < 2e-2  # imaginary parts are kept
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = KaleidoscopeConv2d(2, 3, 3, (6, 5), padding=1)
    empty.to_empty(device="cpu").reset_parameters()
    assert_close(empty(x), convolved(empty, x).double())


def test_arguments_of_the_convolution():
    with pytest.raises(ValueError, match="padding <="):
        KaleidoscopeConv2d(1, 1, 3, 8, padding=2, padding_mode="circular")
    with pytest.raises(ValueError, match="kernel_size must be at most"):
        KaleidoscopeConv2d(1, 1, 9, 8)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        KaleidoscopeConv2d(1, 1, 3, 8, padding_mode="reflect")
    with pytest.raises(ValueError, match="dtype must be real"):
        KaleidoscopeConv2d(1, 1, 3, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match="x must have shape"):
        KaleidoscopeConv2d(1, 1, 3, 8)(torch.ones(1, 1, 9, 8))
    with pytest.raises(TypeError, match="x has dtype"):
        KaleidoscopeConv2d(1, 1, 3, 8)(torch.ones(1, 1, 8, 8).double())


def test_parameter_groups_spare_the_transforms():
    layer = KaleidoscopeConv2d(2, 3, 3, (5, 6))
    decayed, others = parameter_groups(layer, 0.1)
    assert [p is layer.weight for p in decayed["params"]] == [True]
    assert len(others["params"]) == len(list(layer.parameters())) - 1
