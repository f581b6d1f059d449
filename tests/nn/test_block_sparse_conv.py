"""BlockSparseConv2d and PixelflyConv2d equal nn.Conv2d with their dense kernel."""

import copy

import pytest
import torch
from torch import nn

import structmat as sm
from structmat import layouts
from structmat.nn import BlockSparseConv2d, PixelflyConv2d, parameter_groups
from structmat.testing import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def block_sparse(i, o, kernel, **options):
    return BlockSparseConv2d(i, o, kernel, layout=0.5, block=(min(4, o), 2 if i % 2 == 0 else 1), **options)


def pixelfly(i, o, kernel, **options):
    return PixelflyConv2d(i, o, kernel, block=(min(4, o), 2 if i % 2 == 0 else 1), max_stride=1, rank=1, **options)


MAKERS = {"block-sparse": block_sparse, "pixelfly": pixelfly}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


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
    (1, {"stride": 2, "bias": False}),
    (3, {"padding": 1}),
    ((3, 2), {"padding": (2, 0), "stride": (2, 3)}),
    ((1, 4), {"dilation": (1, 2), "bias": False}),
    (3, {"padding": "same", "dilation": (3, 1)}),
    (3, {"padding": (1, 2), "padding_mode": "circular"}),
    (3, {"padding": 2, "dilation": 2, "stride": 2, "padding_mode": "replicate"}),
]


@pytest.mark.parametrize(("kernel", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("channels", [(8, 8), (6, 15), (1, 4), (7, 1)], ids=str)
def test_equals_the_dense_convolution(make, channels, kernel, options):
    layer = make(*channels, kernel, **options, dtype=torch.float64)
    conv = dense_like(layer, **{k: v for k, v in options.items() if k != "bias"})
    for shape in [(2, 9, 10), (1, 8, 8), (0, 9, 9)]:
        x = torch.randn(shape[0], channels[0], *shape[1:], dtype=torch.float64)
        assert_close(layer(x), conv(x))
    assert_close(layer(x.new_ones(channels[0], 7, 9)), conv(x.new_ones(channels[0], 7, 9)))


@pytest.mark.parametrize("cut", [False, True])
def test_one_layout_on_the_channels_at_every_offset(cut):
    m, n = (14, 24) if cut else (16, 24)  # the last row of blocks is cut
    layout = layouts.flat_butterfly((m, n), (4, 6), 2)
    layer = BlockSparseConv2d(n, m, (2, 3), layout=layout)
    assert layer.weight().num_params == 6 * layout.num_params
    for B in layer.kernel().permute(2, 3, 0, 1).flatten(0, 1):
        assert torch.equal(B != 0, layout.entries())
    point = BlockSparseConv2d(n, m, 1, layout=layouts.banded((m, n), (4, 5), 1))  # of a width that does not divide
    linear = sm.nn.BlockSparseLinear(n, m, layout=layouts.banded((m, n), (4, 5), 1))
    linear.load_state_dict(point.state_dict())
    x = torch.randn(2, n, 4, 5)
    assert_close(point(x), linear(x.movedim(1, -1)).movedim(-1, 1))
    fly = PixelflyConv2d(n, m, 3, block=(4, 6), max_stride=2, rank=2, dtype=torch.float64)
    value = fly.weight()
    assert value.layout.mask.equal(layout.mask.repeat(1, 9))
    outside = ~layout.entries().repeat(1, 9)
    assert torch.equal(value.to_dense()[outside], 0.5 * value.low_rank.to_dense()[outside])
    assert value.num_params == 9 * layout.num_params + 2 * (m + 9 * n) + 1


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_budget_is_not_exceeded(ratio, kernel):
    layer = PixelflyConv2d(32, 64, kernel, block=8, ratio=ratio)
    budget = int(ratio * 32 * 64 * kernel**2)
    assert budget - 64 - 32 * kernel**2 - 9 * 64 * 16 < layer.weight().num_params <= budget
    conv = nn.Conv2d(32, 64, kernel)
    assert PixelflyConv2d.from_conv2d(conv, block=8, ratio=ratio).weight().num_params <= budget


@pytest.mark.parametrize("kernel", [1, (3, 2)], ids=str)
@pytest.mark.parametrize("channels", [(8, 64), (64, 8), (30, 30), (3, 16)], ids=str)
def test_output_variance_is_that_of_a_convolution(make, channels, kernel):
    squares, expected = [], []
    for _ in range(60):
        x = torch.randn(4, channels[0], 6, 6)
        layer, conv = make(*channels, kernel), nn.Conv2d(*channels, kernel)
        squares.append(layer(x).square().mean())
        expected.append(conv(x).square().mean())
        assert layer.bias.abs().max() <= conv.weight[0].numel() ** -0.5 < 4 * layer.bias.abs().max()
    ratio = (torch.stack(squares).mean() / torch.stack(expected).mean()).item()
    assert abs(ratio - 1) < 0.1, f"variance {ratio:.3f} of nn.Conv2d's"


def test_gradients_and_a_step(make):
    layer = make(4, 6, (2, 3), padding=1, stride=2, dtype=torch.float64)
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
    kernel = layer.kernel().detach()
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.kernel(), kernel)
    decayed, others = parameter_groups(layer, 0.1)
    assert decayed["params"] == [] and len(others["params"]) == len(values)


def test_dtypes_autocast_compilation_and_copies(make):
    layer = make(8, 12, 3, padding="same")
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
    twin = make(8, 12, 3, padding="same", device="meta").to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    twin.reset_parameters()
    assert twin(x).isfinite().all() and not torch.equal(twin(x), layer(x))
    z = make(8, 12, 3, padding=1, dtype=torch.complex128)
    image = torch.randn(2, 8, 6, 5, dtype=torch.complex128)
    assert_close(z(image), dense_like(z, padding=1)(image))


@pytest.mark.parametrize("bias", [True, False])
def test_projection_of_a_convolution(make, bias):
    exact = make(8, 16, (3, 2), stride=2, padding=1, bias=bias, dtype=torch.float64)
    conv = dense_like(exact, stride=2, padding=1).eval()
    conv.weight.requires_grad_(False)
    if make is pixelfly:
        layer = PixelflyConv2d.from_conv2d(conv, block=(4, 2), max_stride=1, rank=1)
    else:
        layer = BlockSparseConv2d.from_conv2d(conv, 0.5, block=(4, 2))
        assert layer.weight().layout == exact.weight().layout
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    assert_close(layer(x), conv(x))
    assert not layer.training and not any(p.requires_grad for p in layer.weight.parameters())
    assert (layer.bias is not None) == bias and (not bias or layer.bias.requires_grad)
    assert (layer.stride, layer.padding) == ((2, 2), (1, 1))


def test_the_largest_blocks_over_all_offsets_are_kept():
    conv = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular")
    layer = BlockSparseConv2d.from_conv2d(conv, 0.25, block=2)
    norms = conv.weight.square().sum((2, 3)).reshape(4, 2, 4, 2).sum((1, 3)).flatten()
    kept = layer.weight().layout.mask[:, :4].flatten()
    assert kept.sum() == 4 and norms[kept].min() > norms[~kept].max()
    assert torch.equal(layer.kernel()[layer.kernel() != 0], conv.weight[layer.kernel() != 0])
    assert layer(torch.randn(8, 8, 8)).shape == (8, 8, 8)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: block_sparse(8, 8, 3, groups=2), ValueError, "a block-sparse matrix mixes all channels"),
        (lambda: pixelfly(8, 8, 3, groups=2), ValueError, "one PixelflyConv2d a group"),
        (lambda: block_sparse(8, 8, 3, padding="same", stride=2), ValueError, "needs stride 1"),
        (lambda: block_sparse(0, 8, 3), ValueError, "in_channels must be at least 1"),
        (lambda: BlockSparseConv2d(10, 8, 3, layout=0.5, block=4), ValueError, "divides the 10 input channels"),
        (lambda: PixelflyConv2d(10, 8, 3, block=4, ratio=0.9), ValueError, "divides the 10 input channels"),
        (lambda: BlockSparseConv2d(8, 4, 3, layout=layouts.full((8, 4), 2)), ValueError, "layout must have the shape"),
        (lambda: PixelflyConv2d(3, 8, 3), ValueError, "block must be at most"),
        (lambda: PixelflyConv2d(8, 8, 3, block=4, ratio=0.2), sm.BudgetError, "at least 289"),
        (lambda: PixelflyConv2d(8, 8, 3, block=4, rank=9), ValueError, "rank must be at most"),
        (lambda: block_sparse(8, 8, 3)(torch.ones(2, 7, 5, 5)), ValueError, r"x must have shape \(N, 8"),
        (lambda: BlockSparseConv2d.from_conv2d(nn.Linear(3, 3), 0.5), TypeError, "nn.Conv2d"),
        (lambda: PixelflyConv2d.from_conv2d(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "groups"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
