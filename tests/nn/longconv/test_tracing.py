"""Compilation, export, vmap and checkpointing of long convolutions."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv
from structmat.nn.longconv import circular_convolution, long_convolution
from structmat.testing import assert_close

WAYS = [
    ("causal", "fft"),
    ("causal", "monarch"),
    ("bidirectional", "fft"),
    ("bidirectional", "butterfly"),
    ("circular", "fft"),
]
ways = pytest.mark.parametrize(("mode", "algorithm"), WAYS, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "algorithm", "autocast"), [*((*way, False) for way in WAYS), ("causal", "fft", True)], ids=str
)
def test_compiled_forward_and_backward(mode, algorithm, autocast):
    layer = LongConv(3, 12, mode=mode, algorithm=algorithm)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    u, gate = torch.randn(2, 2, 3, 12, requires_grad=True).unbind(0)
    inputs = [u, gate, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, z = layer(u, gate, gate), compiled(u, gate, gate)
    assert_close(z, y, 1e-6)
    want = torch.autograd.grad(y.square().sum(), inputs)
    found = torch.autograd.grad(z.square().sum(), inputs)
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        # Inside an autocast region torch.compile casts the backward pass of every matrix product, also of those of the
        # filter's network that are not cast forward.
        assert_close(a, b, 2e-2 if autocast and i >= 2 else 1e-5)


@pytest.mark.parametrize("algorithm", ["fft", pytest.param("monarch", marks=pytest.mark.slow)])
def test_compiled_with_a_dynamic_length(algorithm):
    layer = LongConv(3, 64, filter="explicit", algorithm=algorithm)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (64, 37):
        u = torch.randn(2, 3, length)
        assert_close(compiled(u), layer(u), 1e-6)


@ways
def test_exported_for_any_batch(mode, algorithm):
    layer = LongConv(3, 32, mode=mode, algorithm=algorithm)
    shapes = {"u": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(layer, (torch.randn(4, 3, 30),), dynamic_shapes=shapes).module()
    u = torch.randn(5, 3, 30)
    assert_close(program(u), layer(u), 1e-6)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_exported_for_any_length(mode):
    layer = LongConv(3, 32, mode=mode)
    shapes = {"u": {0: torch.export.Dim.AUTO, 2: torch.export.Dim("length", min=3, max=32)}}
    program = torch.export.export(layer, (torch.randn(4, 3, 30),), dynamic_shapes=shapes).module()
    for length in (30, 3, 17, 32):
        u = torch.randn(5, 3, length)
        assert_close(program(u), layer(u), 1e-6)


@pytest.mark.parametrize("number", [5, 16])
@pytest.mark.parametrize("kind", [ExplicitFilter, ImplicitFilter])
def test_filters_exported_for_any_length(kind, number):
    for low, high in [(2, number), (number + 1, 1000)]:
        layer = LongConv(3, number, filter=kind(3, number, extend="zero"))
        shapes = {"u": {2: torch.export.Dim("length", min=low, max=high)}}
        program = torch.export.export(layer, (torch.randn(2, 3, low + 2),), dynamic_shapes=shapes).module()
        for length in (low, low + 3, high):
            u = torch.randn(2, 3, length)
            assert_close(program(u), layer(u), 1e-6)


@pytest.mark.parametrize("algorithm", ["fft", "monarch"])
def test_vmap_and_per_sample_gradients(algorithm):
    u, k, k_rev = torch.randn(4, 3, 9), torch.randn(4, 3, 9), torch.randn(3, 5)

    def convolution(u, k):
        return long_convolution(u, k, k_rev, algorithm=algorithm)

    want = torch.stack([convolution(a, b) for a, b in zip(u, k, strict=True)])
    assert_close(torch.func.vmap(convolution)(u, k), want, 1e-6)
    assert_close(torch.func.vmap(convolution, in_dims=(0, None))(u, k[0])[0], want[0], 1e-6)
    grads = torch.func.vmap(torch.func.grad(lambda a, b: convolution(a, b).square().sum(), 1))(u, k)
    for a, b, g in zip(u, k, grads, strict=True):
        assert_close(torch.func.grad(lambda b, a=a: convolution(a, b).square().sum())(b), g, 1e-5)


@ways
def test_vmap_over_a_layer(mode, algorithm):
    layer = LongConv(3, 9, mode=mode, algorithm=algorithm)
    u = torch.randn(4, 2, 3, 9)
    assert_close(torch.func.vmap(layer)(u), layer(u), 1e-6)
    assert_close(torch.func.vmap(circular_convolution, (0, None))(u, u[0, 0]), circular_convolution(u, u[0, 0]), 1e-6)
    params = dict(layer.named_parameters())

    def loss(params, u):
        return torch.func.functional_call(layer, params, (u,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, u)
    total = torch.autograd.grad(layer(u).square().sum(), list(params.values()))
    for name, want in zip(params, total, strict=True):
        assert_close(grads[name].sum(0), want, 1e-4)


@ways
def test_checkpointed(mode, algorithm):
    filter = ExplicitFilter(3, 12, directions=2 if mode == "bidirectional" else 1, dropout=0.5)
    layer = LongConv(3, 12, filter=filter, mode=mode, algorithm=algorithm)
    u = torch.randn(2, 3, 12, requires_grad=True)
    inputs = [u, *layer.parameters()]
    found = []
    for run in (layer, lambda u: checkpoint(layer, u, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run(u).square().sum(), inputs))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.slow
@ways
def test_inductor(mode, algorithm):
    layer = LongConv(3, 12, mode=mode, algorithm=algorithm)
    u = torch.randn(2, 3, 12, requires_grad=True)
    y, z = layer(u), torch.compile(layer, fullgraph=True)(u)
    assert_close(z, y, 1e-5)
    want = torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])
    for a, b in zip(torch.autograd.grad(z.square().sum(), [u, *layer.parameters()]), want, strict=True):
        assert_close(a, b, 1e-4)
