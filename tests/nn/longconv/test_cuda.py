"""Long convolutions on a CUDA device: values, gradients, autocast, graphs, streaming, against float64 on the CPU."""

import pytest
import torch

from structmat.nn import LongConv, ShortConv
from structmat.nn.longconv import circular_convolution, long_convolution

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(found, wanted):
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return ((found - wanted).norm() / wanted.norm()).item()


def operands(batch, channels, length, taps, behind, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, channels, length), (channels, taps), (channels, behind), (channels,)]
    shapes += [(batch, channels, length)] * 2
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("length", "taps", "behind"), [(1, 1, 1), (2, 5, 3), (127, 127, 126), (1000, 33, 2000)])
@pytest.mark.parametrize("algorithm", ["fft", "monarch"])
def test_values_and_gradients(dtype, length, taps, behind, algorithm):
    given = operands(3, 5, length, taps, behind, dtype)
    wanted_in = [t.detach().double().requires_grad_() for t in given]
    here = [t.detach().cuda().requires_grad_() for t in given]
    wanted = long_convolution(*wanted_in)
    found = long_convolution(*here, algorithm=algorithm, order=3)
    assert found.dtype == dtype
    assert error(found, wanted) < TOLERANCES[dtype]
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(wanted, wanted_in, direction, allow_unused=True)
    got = torch.autograd.grad(found, here, direction.to("cuda", dtype), allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        if e is not None and e.norm() > 0:
            assert error(g, e) < 3 * TOLERANCES[dtype]


def test_circular_values():
    u, k = (torch.randn(2, 3, 35, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert error(circular_convolution(u.cuda(), k.cuda()), circular_convolution(u, k)) < 1e-12


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_autocast_leaves_the_convolution_alone(mode):
    torch.manual_seed(0)
    layer = LongConv(8, 300, mode=mode, filter="explicit").cuda()
    u = torch.randn(2, 8, 300, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        inside = layer(u)
        half = layer(u.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, layer(u))
    assert half.dtype == torch.bfloat16
    assert error(half, layer(u)) < 1e-2


def test_a_graph_holds_forward_and_backward():
    torch.manual_seed(0)
    layer, u = LongConv(6, 257).cuda(), torch.randn(4, 6, 257, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(layer(u).square().sum(), [u, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        u.copy_(torch.randn(4, 6, 257, device="cuda"))
    graph.replay()
    for captured, plain in zip(held, step(), strict=True):
        assert error(captured, plain) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_streaming_equals_the_whole(dtype):
    torch.manual_seed(0)
    layer, u = LongConv(7, 130).cuda(), torch.randn(2, 7, 130, device="cuda").to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    first, state = layer.prefill(u[..., :70])
    second, state = layer.prefill(u[..., 70:103], state)
    parts = [first, second]
    for t in range(103, 130):
        y, state = layer.step(u[..., t], state)
        parts.append(y[..., None])
    assert error(torch.cat(parts, -1), layer(u)) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)


@torch.no_grad()
def test_short_convolutions_stream():
    torch.manual_seed(0)
    layer, u = ShortConv(5, 3).cuda(), torch.randn(2, 5, 40, device="cuda")
    first, state = layer.prefill(u[..., :39])
    last, state = layer.step(u[..., 39], state)
    assert error(torch.cat([first, last[..., None]], -1), layer(u)) < 1e-5
