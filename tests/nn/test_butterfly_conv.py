"""Convolutions with butterflies equal nn.Conv2d with their dense kernel."""

import copy

import pytest
import torch
from torch import nn

from structmat import Butterfly
from structmat.nn import ButterflyConv2d, ButterflyLinear, parameter_groups
from structmat.testing import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense_like(layer, **options):
    """The nn.Conv2d of the same kernel and bias."""
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, bias=layer.bias is not None,
        dtype=layer.weight.dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(layer.kernel())
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
    return conv


OPTIONS = [
    (1, {}),
    (3, {"padding": 1}),
    ((3, 2), {"padding": (2, 0), "stride": (2, 3)}),
    ((1, 4), {"dilation": (1, 2), "bias": False}),
    (2, {"padding": "same", "dilation": (3, 1)}),
    ((2, 3), {"padding": "valid", "stride": 2}),
    (3, {"padding": (1, 2), "padding_mode": "circular"}),
    ((4, 3), {"padding": "same", "padding_mode": "reflect"}),
    (3, {"padding": 2, "dilation": 2, "stride": 2, "padding_mode": "replicate"}),
]


@pytest.mark.parametrize(("kernel", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("channels", [(8, 8), (6, 15), (1, 4), (7, 1)], ids=str)
def test_equals_the_dense_convolution(channels, kernel, options):
    layer = ButterflyConv2d(*channels, kernel, **options, dtype=torch.float64)
    conv = dense_like(layer, **{k: v for k, v in options.items() if k != "bias"})
    for shape in [(2, 9, 10), (1, 8, 8), (0, 9, 9)]:
        x = torch.randn(shape[0], channels[0], *shape[1:], dtype=torch.float64)
        assert_close(layer(x), conv(x))
    assert_close(layer(x.new_ones(channels[0], 7, 9)), conv(x.new_ones(channels[0], 7, 9)))


@pytest.mark.parametrize("structure", [{"nblocks": 3}, {"radices": [(2, 4), (6, 3)]}], ids=str)
def test_structures(structure):
    layer = ButterflyConv2d(12, 12, 3, **structure, dtype=torch.float64)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    assert_close(layer(x), dense_like(layer)(x))


def test_every_offset_has_an_independent_butterfly():
    """The columns of one offset are a butterfly of the channels' chain; with one entry it is a linear layer."""
    layer = ButterflyConv2d(16, 8, (2, 3), dtype=torch.float64)
    chain = Butterfly.structure(8, 16)
    assert layer.weight().num_params == 6 * chain.num_params
    for B in layer.kernel().detach().permute(2, 3, 0, 1).flatten(0, 1):
        assert_close(Butterfly.from_dense(B, chain).to_dense(), B)
    point = ButterflyConv2d(16, 8, 1, dtype=torch.float64)
    linear = ButterflyLinear(16, 8, dtype=torch.float64)
    linear.load_state_dict(point.state_dict())
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    assert_close(point(x), linear(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("kernel", [1, (3, 2)], ids=str)
@pytest.mark.parametrize("channels", [(8, 64), (64, 8), (30, 30), (3, 16)], ids=str)
def test_output_variance_is_that_of_a_convolution(channels, kernel):
    squares, expected = [], []
    for _ in range(100):
        x = torch.randn(4, channels[0], 6, 6)
        layer, conv = ButterflyConv2d(*channels, kernel), nn.Conv2d(*channels, kernel)
        squares.append(layer(x).square().mean())
        expected.append(conv(x).square().mean())
        assert layer.bias.abs().max() <= conv.weight[0].numel() ** -0.5 < 4 * layer.bias.abs().max()
    ratio = (torch.stack(squares).mean() / torch.stack(expected).mean()).item()
    assert abs(ratio - 1) < 0.1, f"variance {ratio:.3f} of nn.Conv2d's"


def test_gradients_and_a_step():
    layer = ButterflyConv2d(4, 6, (2, 3), padding=1, stride=2, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    conv = dense_like(layer, padding=1, stride=2)
    weights = torch.randn(layer(x).shape, dtype=torch.float64)
    (gx,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((conv(x) * weights).sum(), x)
    assert_close(gx, expected)
    values = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def loss(*parts):
        return torch.func.functional_call(layer, dict(zip(names, parts, strict=True)), (x[:1],))

    assert torch.autograd.gradcheck(loss, values)
    before = [p.detach().clone() for p in values]
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert all((p != old).all() for p, old in zip(values, before, strict=True))
    decayed, others = parameter_groups(layer, 0.1)
    assert decayed["params"] == [] and len(others["params"]) == len(before)


def test_dtypes_autocast_compilation_and_copies():
    layer = ButterflyConv2d(8, 12, 3, padding="same")
    x = torch.randn(2, 8, 6, 5)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_close(layer(x), exact)
    torch.compiler.reset()
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), exact)
    assert_close(torch.export.export(layer, (x,)).module()(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, exact)
    assert_close(copy.deepcopy(layer).bfloat16()(x.bfloat16()), exact)
    assert_close(layer(x.contiguous(memory_format=torch.channels_last)), exact)
    twin = ButterflyConv2d(8, 12, 3, padding="same", device="meta").to_empty(device="cpu")
    twin.reset_parameters()
    assert twin(x).isfinite().all() and not torch.equal(twin(x), layer(x))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    z = ButterflyConv2d(8, 12, 3, padding=1, dtype=torch.complex128)
    assert z.bias.imag.abs().max() > 0
    image = torch.randn(2, 8, 6, 5, dtype=torch.complex128)
    assert_close(z(image), dense_like(z, padding=1)(image))


@pytest.mark.parametrize("bias", [True, False])
def test_projection_of_a_convolution(bias):
    exact = ButterflyConv2d(8, 16, (3, 2), stride=2, padding=1, bias=bias, dtype=torch.float64)
    conv = dense_like(exact, stride=2, padding=1).eval()
    conv.weight.requires_grad_(False)
    layer = ButterflyConv2d.from_conv2d(conv)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    assert_close(layer(x), conv(x))
    assert not layer.training and not any(p.requires_grad for p in layer.weight.parameters())
    assert (layer.bias is not None) == bias and (not bias or layer.bias.requires_grad)
    small = ButterflyConv2d.from_conv2d(nn.Conv2d(16, 16, 3, padding="same", padding_mode="circular"), radices=[4, 4])
    assert small.weight().patterns == ((1, 4, 36, 4), (36, 4, 4, 1))
    assert small(torch.randn(16, 8, 8)).shape == (16, 8, 8)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: ButterflyConv2d(8, 8, 3, groups=2), ValueError, "groups must be 1, got 2"),
        (lambda: ButterflyConv2d(8, 8, 3, padding_mode="zero"), ValueError, "padding_mode must be one of"),
        (lambda: ButterflyConv2d(8, 8, 3, padding="full"), ValueError, '"valid" or "same"'),
        (lambda: ButterflyConv2d(8, 8, 3, padding="same", stride=2), ValueError, "needs stride 1"),
        (lambda: ButterflyConv2d(8, 8, (3, 3, 3)), ValueError, "kernel_size must be one integer or two"),
        (lambda: ButterflyConv2d(8, 8, 3, stride=0), ValueError, "stride must be at least 1"),
        (lambda: ButterflyConv2d(0, 8, 3), ValueError, "in_channels must be at least 1"),
        (lambda: ButterflyConv2d(8, 8.0, 3), TypeError, "out_channels must be an integer"),
        (lambda: ButterflyConv2d(8, 8, 3, radices=[2, 2]), ValueError, "radices must multiply"),
        (lambda: ButterflyConv2d(8, 8, 3)(torch.ones(2, 7, 5, 5)), ValueError, r"x must have shape \(N, 8"),
        (lambda: ButterflyConv2d(8, 8, 3)(torch.ones(8, 5)), ValueError, "x must have shape"),
        (lambda: ButterflyConv2d(8, 8, 3, dilation=2)(torch.ones(8, 5, 4)), ValueError, "at least as large"),
        (lambda: ButterflyConv2d(8, 8, 3)(torch.ones(8, 5, 5).double()), TypeError, "dtype"),
        (lambda: ButterflyConv2d.from_conv2d(nn.Linear(3, 3)), TypeError, "nn.Conv2d"),
        (lambda: ButterflyConv2d.from_conv2d(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "groups"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
