"""The Monarch product on a CUDA device: graphs, streams, equal bits, long inputs, precision, autocast."""

import importlib

import pytest
import torch

import structmat
from structmat.testing import relative_error
from structmat_kernels.monarch import monarch, monarch_transposed, reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
launch = importlib.import_module("structmat_kernels.monarch.launch")
launch_backward = importlib.import_module("structmat_kernels.monarch.launch_backward")

pytestmark = pytest.mark.gpu
BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# l, s, r, k, q, p, nrows, ncols
SHAPES = {
    "small blocks": (16, 16, 16, 16, 16, 16, 256, 256),
    "wide": (64, 48, 64, 64, 64, 40, 3001, 2559),
    "cublas": (4, 256, 160, 4, 160, 192, 1000, 768),
    "uneven": (6, 50, 20, 4, 30, 33, 299, 131),
    "large uneven": (6, 150, 20, 4, 30, 33, 899, 131),  # gradients by the reference
}
STAGES = {"path": "stages", "TT": 16, "BA": 64, "JB": 16, "BU": 32, "BR": 64, "BATCHED": True, "STAGES": 2}
STAGES |= {"num_warps": 8, "right_warps": 4}
PATHS = {
    "resident": {"path": "resident", "TT": 16, "JB": 16, "STAGES": 1, "CTAS": 1, "num_warps": 8},
    "stages": STAGES,
    "joined": STAGES | {"BATCHED": False, "TT": 32},
    "left in registers": STAGES | {"JB": 8, "CTAS": 1},
    "cublas": {"path": "cublas"},
}


def operands(shape, tokens, dtype, batch=()):
    """x, left, right, bias of size about 1."""
    l, s, r, k, q, p, nrows, ncols = shape
    generator = torch.Generator("cuda").manual_seed(l + tokens)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device="cuda", dtype=dtype).mul_(scale)

    left, right = normal(*batch, l, s, r, scale=r**-0.5), normal(*batch, k, q, p, scale=p**-0.5)
    return normal(*batch, tokens, ncols), left, right, normal(nrows)


def close(got, expected, bound=None, name=""):
    assert got.shape == expected.shape, name
    error = (got.detach().double() - expected).norm() / expected.norm()
    assert error <= (BOUND[got.dtype] if bound is None else bound), f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [3, 1999])
@pytest.mark.parametrize("name", SHAPES)
def test_graphs_streams_and_equal_bits(name, tokens, dtype, same_bits_everywhere):
    shape = SHAPES[name]
    tensors = [t.requires_grad_() for t in operands(shape, tokens, dtype, (2,) if tokens == 3 else ())]

    def product():
        y = monarch(*tensors[:3], shape[6], tensors[3], "silu", backend="triton")
        return [y.detach(), *torch.autograd.grad(y.sum(), tensors)]

    def transposed():
        x = monarch_transposed(y, *tensors[1:3], shape[7], backend="triton")
        return [x.detach(), *torch.autograd.grad(x.sum(), [y, *tensors[1:3]])]

    y = same_bits_everywhere(product)[0].requires_grad_()
    same_bits_everywhere(transposed)


@pytest.mark.parametrize("path", PATHS)
def test_graphs_of_every_path(path, same_bits_everywhere):
    x, left, right, bias = (t[None] for t in operands(SHAPES["small blocks"], 1999, torch.bfloat16))
    (y,) = same_bits_everywhere(lambda: [launch.forward(x, left, right, bias, 256, "gelu", PATHS[path])])
    expected = reference.monarch(*(t.double() for t in (x, left, right)), 256, bias.double(), "gelu")
    close(y, expected)


def gradients(function, tensors, cotangent):
    inputs = [t.detach().requires_grad_() for t in tensors]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, cotangent)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_million_tokens(dtype):
    tensors = operands((8, 8, 8, 8, 8, 8, 64, 64), 2**20, dtype)[:3]
    cotangent = tensors[0].flip(-1)
    found = gradients(lambda *t: monarch(*t, 64, backend="triton"), tensors, cotangent)
    expected = gradients(lambda *t: reference.monarch(*t, 64), [t.double() for t in tensors], cotangent.double())
    for name, f, e in zip(("y", "x", "left", "right"), found, expected, strict=True):
        many = name in ("left", "right") and dtype == torch.float32  # sums over a million tokens
        close(f, e, 1e-5 if many else None, name)


LONG = (33, 64, 33, 33, 33, 64, 2112, 2056)
TOKENS = 2**20 + 3  # times 2056 features: more than 2^31 elements
SAMPLES = torch.cat([torch.arange(65), torch.arange(2**20 - 4000, 2**20 - 3900), torch.arange(2**20 - 61, TOKENS)])


def long_operands():
    x, left, right, bias = (t[None] for t in operands(LONG, TOKENS, torch.bfloat16))
    assert x.numel() > 2**31
    return x, left, right, bias


def test_offsets_beyond_32_bits():
    """One test for all paths: tests in other processes want memory too."""
    x, left, right, bias = long_operands()
    rows = SAMPLES.cuda()
    expected = reference.monarch(x[:, rows].double(), left.double(), right.double(), 2112, bias.double())
    for path, config in (("by rule", None), *PATHS.items()):
        if path == "resident":  # these factors do not fit on the chip
            continue
        y = launch.forward(x, left, right, bias, 2112, "", config)
        close(y[:, rows], expected, name=path)
        del y
        torch.cuda.empty_cache()


def test_gradients_beyond_32_bits():
    x, left, right, _ = long_operands()
    rows = SAMPLES.cuda()
    gy = torch.zeros(1, TOKENS, 2112, dtype=torch.bfloat16, device="cuda")  # of the sampled tokens only
    gy[:, rows] = operands(LONG, len(rows), torch.bfloat16)[0][None, :, :1] + 1
    expected = reference.monarch_backward(gy[:, rows].double(), x[:, rows].double(), left.double(), right.double())
    gx, gleft, gright, _ = launch_backward.backward(gy, x, left, right, 2056, True, True)
    for name, g, e in zip(("x", "left", "right"), (gx[:, rows], gleft, gright), expected, strict=True):
        close(g, e, name=name)
    gx[:, rows] = 0
    assert not gx.any()
    del x, gy, gx
    torch.cuda.empty_cache()


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", SHAPES)
def test_precision_of_float32(name, precision):
    shape = SHAPES[name]
    tensors = operands(shape, 1999, torch.float32)[:3]
    cotangent = operands(shape, 1999, torch.float32)[3].expand(1999, -1).sin()
    expected = gradients(lambda *t: reference.monarch(*t, shape[6]), [t.double() for t in tensors], cotangent.double())
    dense = torch.randn(2, 1024, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for setting in ("highest", "high"):
        precision(setting)
        # In tf32 no more than 1.5 times a dense product's error; gradients may have it from each of two products.
        product = dense[0].double() @ dense[1].double()
        tf32 = ((dense[0] @ dense[1]).double() - product).norm() / product.norm()
        forward = 5e-6 if setting == "highest" else 1.5 * tf32.item()
        found = gradients(lambda *t: monarch(*t, shape[6], backend="triton"), tensors, cotangent)
        for tensor, f, e in zip(("y", "x", "left", "right"), found, expected, strict=True):
            close(f, e, forward * (1 if tensor == "y" else 2**0.5), f"{setting} {tensor}")
        if setting == "high" and name != "large uneven":  # tf32 it is; cuBLAS has none for odd sizes
            assert (found[0].double() - expected[0]).norm() > 2e-5 * expected[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    layer = structmat.nn.MonarchLinear(300, 200, nblocks=4, device="cuda")
    x = torch.randn(3, 50, 300, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = layer(x)
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(y.float().square().sum(), [x, *parameters])
    assert y.dtype == dtype and all(g.dtype == torch.float32 for g in grads)
    M = layer.weight()
    narrow = [t.detach().to(dtype) for t in (x, M.left, M.right)]
    # The layer runs the kernel, on operands of the region's dtype.
    assert torch.equal(y, monarch(*narrow, 200, layer.bias.detach().to(dtype), backend="triton"))
    exact = layer.double()
    wide = x.detach().double().requires_grad_()
    z = exact(wide)
    close(y, z.detach(), 1.5 * BOUND[dtype])
    expected = torch.autograd.grad(z.square().sum(), [wide, *exact.parameters()])
    for g, e in zip(grads, expected, strict=True):
        close(g, e, 2 * BOUND[dtype])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one(name):
    shape = SHAPES[name]
    tensors = [t.to("cuda:1") for t in operands(shape, 70, torch.bfloat16)]
    cotangent = torch.ones(70, shape[6], dtype=torch.bfloat16, device="cuda:1")
    found = gradients(lambda *t: monarch(*t[:3], shape[6], t[3], backend="triton"), tensors, cotangent)
    doubles = [t.double() for t in tensors]
    expected = gradients(lambda *t: reference.monarch(*t[:3], shape[6], t[3]), doubles, cotangent.double())
    for f, e in zip(found, expected, strict=True):
        close(f, e)


def test_compiled_by_inductor():
    """By the default backend: one graph, varying token counts, the values and gradients of eager calls."""
    layer = structmat.nn.MonarchLinear(384, 640, device="cuda", dtype=torch.bfloat16)

    def step(x):
        return torch.nn.functional.gelu(layer(x)) * 2

    compiled = torch.compile(step, fullgraph=True)
    generator = torch.Generator("cuda").manual_seed(7)
    for tokens in (300, 300, 411, 77):
        x = torch.randn(2, tokens, 384, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        gy = torch.randn(2, tokens, 640, device="cuda", dtype=torch.bfloat16, generator=generator)
        results = [(f(x), *torch.autograd.grad(f(x), (x, *layer.parameters()), gy)) for f in (step, compiled)]
        for eager, fused in zip(*results, strict=True):
            assert relative_error(fused.double(), eager.double()) <= 1e-2
