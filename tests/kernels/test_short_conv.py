"""The short convolution: the reference against a loop, the kernels against the reference in float64."""

import importlib

import pytest
import torch
from torch import nn

from structmat.nn import ShortConv
from structmat.testing import relative_error
from structmat_kernels.short_conv import op as conv_op
from structmat_kernels.short_conv import short_conv
from structmat_kernels.short_conv.reference import short_conv as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.short_conv.kernel")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# In the interpreter bfloat16 is truncated, where a GPU rounds.
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# batch, channels, length, taps: one of everything, filters longer than the input, primes, more than a tile.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 1, 8),
    (2, 3, 1, 3),
    (3, 3, 2, 5),
    (2, 1, 3, 2),
    (2, 5, 8, 6),
    (2, 7, 67, 4),
    (1, 3, 521, 7),
    (2, 3, 1024, 3),
    (3, 130, 5, 3),
    (0, 3, 4, 3),
    (2, 3, 0, 3),
]


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch):
    """cuDNN's float32 convolutions would be those of tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loop(x, weight, bias):
    channels, taps = weight.shape
    y = torch.zeros_like(x)
    for c in range(channels):
        for t in range(x.shape[-1]):
            y[..., c, t] = 0 if bias is None else bias[c]
            for j in range(taps):
                if t - (taps - 1) + j >= 0:
                    y[..., c, t] += weight[c, j] * x[..., c, t - (taps - 1) + j]
    return y


def operands(shape, dtype, device="cpu", bias=True):
    """x, weight, bias or None, and a gradient."""
    batch, channels, length, taps = shape
    generator = torch.Generator().manual_seed(batch + 10 * channels + 100 * length + taps)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight, grad = normal(batch, channels, length), normal(channels, taps), normal(batch, channels, length)
    return x, weight, normal(channels) if bias else None, grad


def gradients(function, x, weight, bias, grad, **options):
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs, **options)
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


def exact(x, weight, bias, grad):
    return gradients(reference, *(None if t is None else t.double() for t in (x, weight, bias, grad)))


def check(found, expected, dtype, bound=None):
    names = ("y", "gx", "gweight", "gbias")[: len(expected)]
    for name, f, e in zip(names, found, expected, strict=True):
        assert f.dtype == dtype and f.shape == e.shape, name
        if e.numel():
            assert relative_error(f, e) <= (bound or BOUND[dtype]), name


def layouts(x):
    """x in other layouts of memory, with NaN between its entries."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3), float("nan"))
    wide[:, ::2, 1:-2] = x
    flipped = x.flip(0).transpose(0, 1).contiguous().transpose(0, 1).flip(0)
    spread = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    return {"channels": x.mT.contiguous().mT, "part": wide[:, ::2, 1:-2], "batch": flipped, "spread": spread}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:7] + SHAPES[10:], ids=str)
def test_reference_is_the_loop(shape, bias):
    x, weight, b, _ = operands(shape, torch.float64, bias=bias)
    y = reference(x, weight, b)
    assert y.shape == x.shape
    torch.testing.assert_close(y, loop(x, weight, b))
    z = torch.complex(x, x.flip(0))
    w = torch.complex(weight, weight.flip(0))
    b = None if b is None else torch.complex(b, b)
    torch.testing.assert_close(reference(z, w, b), loop(z, w, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_rounds_once(dtype, device):
    x, weight, bias, _ = operands((2, 33, 257, 8), dtype, device)
    bias = 8 * bias
    y = reference(x.double(), weight.double(), bias.double())
    # cuDNN rounds before it adds the bias.
    most = 1.05 if device == "cpu" else 1.5
    assert relative_error(reference(x, weight, bias), y) <= most * relative_error(y.to(dtype), y) + 2e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_on_poisoned_memory(shape, dtype, device, poisoned):
    data = operands(shape, dtype, device)
    check(gradients(short_conv, *data, backend="triton"), exact(*data), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", range(1, 9))
def test_every_number_of_taps(taps, bias, device, poisoned):
    for dtype in (torch.float32, torch.float16):
        data = operands((2, 3, 37, taps), dtype, device, bias)
        check(gradients(short_conv, *data, backend="triton"), exact(*data), dtype)


def test_rounds_once(device):
    for dtype in DTYPES if device == "cuda" else DTYPES[:2]:
        x, weight, bias, _ = operands((2, 3, 257, 8), dtype, device)
        y = reference(x.double(), weight.double(), bias.double())
        found = short_conv(x, weight, bias, backend="triton")
        assert relative_error(found, y) <= 1.05 * relative_error(y.to(dtype), y) + 2e-7


@pytest.mark.parametrize("along", [True, False])
def test_any_tile_and_number_of_splits(along, device, poisoned, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 7)
    x, weight, bias, grad = operands((3, 5, 37, 6), torch.float32, device)
    expected = exact(x, weight, bias, grad)
    x = x[None] if along else x.mT.contiguous().mT[None]
    for config in ({"BC": 2, "BT": 16, "num_warps": 4}, {"BC": 8, "BT": 4, "num_warps": 2}):
        y = kernel.forward(x, weight[None], bias[None], config)
        gx = torch.empty_like(x)
        both = kernel.backward(grad[None], x, weight[None], gx, True, config)
        check((y[0], gx[0], both[0, :, :6], both[0, :, 6]), expected, torch.float32)


@pytest.mark.parametrize("dtype, shape", [(torch.float32, (3, 5, 37, 3)), (torch.float16, (1, 70, 70, 6))], ids=str)
def test_layouts_and_batches(dtype, shape, device, poisoned):
    x, weight, bias, grad = operands(shape, dtype, device)
    expected = exact(x, weight, bias, grad)
    for name, a in layouts(x).items():
        found = gradients(short_conv, a, weight.mT.contiguous().mT, bias, layouts(grad)[name], backend="triton")
        check(found, expected, dtype)
        assert found[0].is_contiguous()
        assert (found[1].mT if name == "channels" else found[1]).is_contiguous()
    check(gradients(short_conv, x.mT.contiguous().mT, weight, bias, grad, backend="triton"), expected, dtype)
    check(gradients(short_conv, x, weight, bias, grad.mT.contiguous().mT, backend="triton"), expected, dtype)
    constant = grad[:1, :1, :1].expand_as(grad)
    check(gradients(short_conv, x, weight, bias, constant, backend="triton"), exact(x, weight, bias, constant), dtype)
    check([short_conv(x[0], weight, bias, backend="triton")], [expected[0][0]], dtype)
    many = x.expand(2, *x.shape).transpose(0, 1)
    check([short_conv(many, weight, bias, backend="triton")[:, 1]], [expected[0]], dtype)


def test_only_the_needed_gradients(device):
    x, weight, bias, grad = operands((2, 3, 11, 3), torch.float32, device)
    _, *expected = exact(x, weight, bias, grad)
    for i in range(3):
        inputs = [x.clone(), weight.clone(), bias.clone()]
        y = short_conv(*(t.requires_grad_(i == k) for k, t in enumerate(inputs)), backend="triton")
        torch.testing.assert_close(torch.autograd.grad(y, inputs[i], grad)[0], expected[i].float())


def test_transforms(device):
    x, weight, bias, grad = operands((4, 3, 11, 3), torch.float32, device)
    weights, biases = torch.stack([weight, -weight, weight.flip(0), weight]), torch.stack([bias] * 4)

    def f(x, weight, bias=None):
        return short_conv(x, weight, bias, backend="triton")

    for dims, args in [
        ((0, None, None), (x, weight, bias)),
        ((2, None), (x.movedim(0, 2), weight)),
        ((0, 0, 0), (x, weights, biases)),
        ((None, 1), (x, weights.movedim(0, 1))),
        ((0, None, 0), (x, weight, biases)),
    ]:
        torch.testing.assert_close(torch.func.vmap(f, dims)(*args), torch.func.vmap(reference, dims)(*args))

    def loss(g):
        return lambda *args: (g(*args).sin() * grad[0]).sum()

    for argnums in ((0, 1, 2), (1,), (0,)):
        found, expected = (
            torch.func.vmap(torch.func.grad(loss(g), argnums), (0, None, None))(x, weight, bias) for g in (f, reference)
        )
        torch.testing.assert_close(found, expected)
    for args in ((x, weight, bias), (x, weight)):
        tangents = tuple(t.flip(0) for t in args)
        torch.testing.assert_close(torch.func.jvp(f, args, tangents), torch.func.jvp(reference, args, tangents))


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(bias, device):
    def second(function, *tensors):
        inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
        some = [t for t in inputs[:3] if t is not None]
        first = torch.autograd.grad(function(*inputs[:3]).sin(), some, inputs[3], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [t for t in inputs if t is not None])

    data = operands((2, 3, 11, 4), torch.float32, device, bias)
    found = second(lambda *args: short_conv(*args, backend="triton"), *data)
    for f, e in zip(found, second(reference, *(None if t is None else t.double() for t in data)), strict=True):
        assert relative_error(f, e) <= 1e-5


@pytest.mark.parametrize("layout", ["channels", "part"])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled(bias, layout, device):
    x, weight, b, grad = operands((2, 3, 11, 4), torch.float32, device, bias)
    x = layouts(x)[layout]
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager")
    check(gradients(compiled, x, weight, b, grad, backend="triton"), exact(x, weight, b, grad), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, b, backend="triton"), reference(x, weight, b))


def test_opcheck(device):
    x, weight, bias, grad = operands((2, 3, 11, 4), torch.float32, device)
    G = [t.unsqueeze(0).repeat_interleave(2, 0) for t in (x, weight, bias, grad)]
    every = [[True, True, True], [True, False, False], [False, True, False], [False, False, True]]
    channels, none = G[0].mT.contiguous().mT, G[2][:, :0]
    for a, b, cases in ((G[0], G[2], every), (channels, none, every[:1]), (G[0][..., :0], G[2], every[:1])):
        torch.library.opcheck(conv_op._conv, (a, G[1], b))
        for needs in cases:
            torch.library.opcheck(conv_op._backward, (torch.ones_like(a), a, G[1], b, needs))


def test_other_dtypes_and_long_filters():
    for dtype in (torch.float64, torch.complex128):
        x, weight, bias, _ = (t.requires_grad_() for t in operands((2, 3, 5, 3), dtype))
        assert torch.autograd.gradcheck(short_conv, (x, weight, bias))
        assert torch.autograd.gradgradcheck(short_conv, (x, weight))
        with pytest.raises(TypeError, match="bfloat16, float16, float32"):
            short_conv(x, weight, bias, backend="triton")
    x, weight, bias, _ = operands((2, 3, 11, 9), torch.float32)
    torch.testing.assert_close(short_conv(x, weight, bias), loop(x, weight, bias))
    with pytest.raises(ValueError, match="up to 8 taps, got 9"):
        short_conv(x, weight, bias, backend="triton")


def test_errors():
    x, weight, bias, _ = operands((2, 3, 11, 4), torch.float32)
    for args, error, message in [
        ((x[:, 1:], weight), ValueError, r"x must have shape \(\*batch, 3, length\).*got \(2, 2, 11\)"),
        ((x[0, 0], weight), ValueError, r"got \(11,\)"),
        ((x, weight[:, None]), ValueError, r"weight must have shape .*got \(3, 1, 4\)"),
        ((x, weight[:, :0]), ValueError, r"taps > 0, got \(3, 0\)"),
        ((x, weight, bias[:2]), ValueError, r"bias must have shape \(3,\) or be None, got \(2,\)"),
        ((x, weight.double()), TypeError, "weight must have the dtype of x"),
        ((x, weight, bias.double()), TypeError, "bias must have the dtype of x"),
        ((x, weight, bias.to("meta")), ValueError, "bias must be on the device of x"),
    ]:
        with pytest.raises(error, match=message):
            short_conv(*args)
    with pytest.raises(ValueError, match="backend must be"):
        short_conv(x, weight, backend="cuda")


def test_kernels_that_no_device_has_seen_are_no_default(monkeypatch):
    x, weight, bias, _ = operands((2, 3, 11, 4), torch.float32)
    monkeypatch.setattr(conv_op._backend, "use_triton", lambda backend, *tensors: backend != "torch")
    for measured in (False, True):
        monkeypatch.setattr(conv_op, "MEASURED", measured)
        assert conv_op._runs(None, x, weight, bias) == conv_op._runs("auto", x, weight, bias) == measured
        assert conv_op._runs("triton", x, weight, bias) and not conv_op._runs("torch", x, weight, bias)
        assert not conv_op._runs("auto", x, weight.repeat(1, 3), bias)
    monkeypatch.setattr(conv_op, "MEASURED", False)
    monkeypatch.setattr(conv_op._backend, "_DEFAULT", "triton")
    assert conv_op._runs(None, x, weight, bias) and not conv_op._runs("auto", x, weight, bias)


def test_layer_by_kernels(device, monkeypatch):
    """ShortConv whole, in pieces and in an autocast region, as nn.Conv1d."""
    monkeypatch.setattr(conv_op._backend, "_DEFAULT", "triton")
    torch.manual_seed(0)
    layer = ShortConv(5, 3).to(device)
    conv = nn.Conv1d(5, 5, 3, padding=2, groups=5).to(device)
    conv.load_state_dict(layer.state_dict())
    x = torch.randn(2, 23, 5, device=device).mT
    expected = conv(x)[..., :23]
    torch.testing.assert_close(layer(x), expected)
    first, state = layer.prefill(x[..., :9])
    second, state = layer.prefill(x[..., 9:22], state)
    last, state = layer.step(x[..., 22], state)
    torch.testing.assert_close(torch.cat([first, second, last[..., None]], -1), expected)
    assert torch.equal(state.history, x[..., -2:]) and state.position == 23
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["along", "channels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2304, 512, 3), (5, 193, 1999, 8), (3, 64, 4096, 4), (300, 7, 10, 2)], ids=str)
def test_graphs_streams_and_equal_bits(shape, dtype, layout, same_bits_everywhere):
    x, weight, bias, grad = operands(shape, dtype, "cuda")
    x = x if layout == "along" else layouts(x)[layout]
    found = same_bits_everywhere(lambda: gradients(short_conv, x, weight, bias, grad, backend="triton"))
    expected = exact(x, weight, bias, grad)
    check(found, expected, dtype)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) <= 1.5 * relative_error(e.to(dtype), e) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["along", "channels"])
def test_offsets_beyond_32_bits(layout):
    """Of batch, of channels and of times."""
    generator = torch.Generator("cuda").manual_seed(0)
    for shape in ((2100, 1024, 1024), (1, 2100, 1 << 20)):
        x = torch.randn(1, shape[1], 1 << 10, generator=generator, device="cuda", dtype=torch.bfloat16)
        x = x.repeat(shape[0], 1, shape[2] >> 10)
        x = x if layout == "along" else x.mT.contiguous().mT
        weight = torch.randn(shape[1], 3, generator=generator, device="cuda", dtype=torch.bfloat16)
        y, gx, gweight = gradients(short_conv, x, weight, None, x, backend="triton")
        few = x[-1:, -5:, -1024:].contiguous()
        z, gz, _ = gradients(short_conv, few, weight[-5:], None, few, backend="triton")
        for f, e in ((y, z), (gx, gz)):
            assert relative_error(f[-1:, -5:, -1000:], e[..., -1000:].double()) <= 1e-3
        energy = (x[0, :, :1024].double() ** 2).sum(-1) * (x.numel() // (1024 * shape[1]))
        assert relative_error(gweight[:, 2], energy) <= 5e-3
        del x, y, gx
