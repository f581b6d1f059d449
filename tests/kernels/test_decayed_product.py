"""The decayed product: the kernel and its derivatives against the definition in float64."""

import pytest
import torch

from structmat.nn import ImplicitFilter
from structmat.testing import relative_error
from structmat_kernels.decayed_product import decayed_product
from structmat_kernels.decayed_product import op as product_op
from structmat_kernels.decayed_product.reference import decayed_product as reference

pytest.importorskip("triton")

# directions, channels, width, length: one of everything, primes, more than a tile of each.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 131, 33, 2), (2, 2, 70, 257), (1, 128, 128, 128)]
EMPTY = [(1, 0, 3, 4), (1, 3, 4, 0), (0, 3, 4, 5)]


def operands(shape, device="cpu", dtype=torch.float32):
    """weight, h, times, rates, and a gradient."""
    directions, channels, width, length = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    weight, h = normal(directions, channels, width), normal(directions, width, length)
    return weight, h, normal(length).abs(), 3 * normal(channels).abs(), normal(directions, channels, length)


def gradients(function, weight, h, times, rates, grad):
    inputs = [t.detach().requires_grad_() for t in (weight, h, times, rates)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_values_and_gradients(shape, shift, device, poisoned):
    data = operands(shape, device)
    found = gradients(lambda *args: decayed_product(*args, shift=shift, backend="triton"), *data)
    wanted = gradients(lambda *args: reference(*args, shift), *(t.double() for t in data))
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape and f.is_contiguous()
        assert w.norm() == 0 or relative_error(f, w) <= 2e-6


def test_operands_of_any_strides(device, poisoned):
    weight, h, times, rates, _ = operands((2, 5, 9, 33), device)
    wanted = reference(*(t.double() for t in (weight, h, times, rates)), 0.0)
    part = torch.full((2, 7, 12), float("nan"), device=device)[:, 1:6, 2:11].copy_(weight)
    found = decayed_product(part, h.mT.contiguous().mT, times.repeat_interleave(2)[::2], rates, backend="triton")
    assert relative_error(found, wanted) <= 2e-6


def test_only_what_is_needed(device):
    weight, h, times, rates, grad = operands((2, 5, 9, 33), device)
    wanted = gradients(lambda *args: reference(*args, 0.0), *(t.double() for t in (weight, h, times, rates, grad)))
    for place in range(4):
        inputs = [weight, h, times, rates]
        inputs[place] = inputs[place].clone().requires_grad_()
        (found,) = torch.autograd.grad(decayed_product(*inputs, backend="triton"), inputs[place], grad)
        assert relative_error(found, wanted[1 + place]) <= 2e-6


def test_second_derivatives(device):
    def second(function, *data):
        inputs = [t.detach().requires_grad_() for t in data]
        first = torch.autograd.grad(function(*inputs[:4]).sin(), inputs[:4], inputs[4], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    data = operands((2, 3, 5, 7), device)
    found = second(lambda *args: decayed_product(*args, shift=0.5, backend="triton"), *data)
    wanted = second(lambda *args: reference(*args, 0.5), *(t.double() for t in data))
    assert all(relative_error(f, w) <= 1e-5 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dims", [(0, 0, None, None), (None, 2, 0, 1)], ids=str)
def test_vmap_and_per_sample_gradients(dims, device):
    data = operands((2, 3, 5, 7), device)[:4]
    args = [t if d is None else torch.stack([t, 2 * t], d) for t, d in zip(data, dims, strict=True)]

    def results(function):
        grad = torch.func.grad(lambda *ts: function(*ts).sin().sum(), (0, 1, 2, 3))
        return [torch.func.vmap(function, dims)(*args), *torch.func.vmap(grad, dims)(*args)]

    found = results(lambda *ts: decayed_product(*ts, shift=0.5, backend="triton"))
    for f, w in zip(found, results(lambda *ts: reference(*ts, 0.5)), strict=True):
        assert relative_error(f, w) <= 1e-5
    tangents = tuple(t.flip(0) for t in data)
    for f, w in zip(
        torch.func.jvp(lambda *ts: decayed_product(*ts, backend="triton"), data, tangents),
        torch.func.jvp(lambda *ts: reference(*ts, 0.0), data, tangents),
        strict=True,
    ):
        assert relative_error(f, w) <= 1e-5


def test_compiled(device):
    torch._dynamo.reset()
    data = operands((2, 3, 5, 7), device)
    compiled = torch.compile(lambda *ts: decayed_product(*ts, backend="triton"), fullgraph=True, backend="aot_eager")
    wanted = gradients(lambda *args: reference(*args, 0.0), *(t.double() for t in data))
    for f, w in zip(gradients(compiled, *data), wanted, strict=True):
        assert relative_error(f, w) <= 2e-6


def test_opcheck(device):
    *data, grad = operands((2, 3, 5, 7), device)
    torch.library.opcheck(product_op._forward, (*data, 0.5))
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        torch.library.opcheck(product_op._backward, (grad, *data, 0.5, needs))


def test_a_filter_by_the_kernel(device, monkeypatch):
    """Also inside an autocast region."""
    torch.manual_seed(0)
    f = ImplicitFilter(37, 150, directions=2, shift=0.1).to(device)
    direction = torch.randn(2, 37, 150, device=device)
    f.deltas.requires_grad_()
    inputs = [f.deltas, *f.parameters()]
    wanted = f()
    gradients = torch.autograd.grad(wanted, inputs, direction)
    monkeypatch.setattr(product_op._backend, "_DEFAULT", "triton")
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            found = f()
        assert relative_error(found, wanted) <= 1e-5
        for g, w in zip(torch.autograd.grad(found, inputs, direction), gradients, strict=True):
            assert relative_error(g, w) <= 1e-4


def test_other_dtypes():
    data = [t.requires_grad_() for t in operands((2, 3, 5, 7), dtype=torch.float64)[:4]]
    assert torch.autograd.gradcheck(lambda *ts: decayed_product(*ts, shift=0.5), data)
    with pytest.raises(TypeError, match="kernels take bfloat16, float16, float32"):
        decayed_product(*data, backend="triton")
    with pytest.raises(TypeError, match=r"the kernel takes float32, got torch\.float16"):
        decayed_product(*(t.detach().half() for t in data), backend="triton")


def test_when_the_kernel_is_chosen(monkeypatch):
    small, large = torch.zeros(2, 3, 4), torch.zeros(2, 512, 512)
    monkeypatch.setattr(product_op._backend, "use_triton", lambda backend, *tensors: backend != "torch")
    for measured in (False, True):
        monkeypatch.setattr(product_op, "MEASURED", measured)
        assert product_op._runs(None, large, large) == measured and product_op._runs("triton", small, small.mT)
        assert not product_op._runs(None, small, small.mT) and not product_op._runs("torch", large, large)
        assert not product_op._runs(None, large.half(), large.half())


def test_errors():
    weight, h, times, rates, _ = operands((2, 3, 5, 7))
    for args, error, message in [
        ((weight[0], h, times, rates), ValueError, r"got \(3, 5\) and \(2, 5, 7\)"),
        ((weight[:1], h, times, rates), ValueError, r"got \(1, 3, 5\) and \(2, 5, 7\)"),
        ((weight, h.mT, times, rates), ValueError, r"got \(2, 3, 5\) and \(2, 7, 5\)"),
        ((weight, h, times[None], rates), ValueError, r"times must have shape \(7,\), got \(1, 7\)"),
        ((weight, h, times, rates[:2]), ValueError, r"rates must have shape \(3,\), got \(2,\)"),
        ((weight, h.double(), times, rates), TypeError, "h must have the dtype of weight"),
        ((weight, h, times, rates.to("meta")), ValueError, "rates must be on the device of weight"),
    ]:
        with pytest.raises(error, match=message):
            decayed_product(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 768, 128, 4096), (1, 100, 64, 999), (2, 130, 17, 8)], ids=str)
def test_graphs_streams_and_equal_bits(shape, same_bits_everywhere):
    data = operands(shape, "cuda")
    function = lambda *args: decayed_product(*args, shift=0.1, backend="triton")  # noqa: E731
    found = same_bits_everywhere(lambda: gradients(function, *data))
    wanted = gradients(lambda *args: reference(*args, 0.1), *(t.double() for t in data))
    for f, w in zip(found, wanted, strict=True):
        assert relative_error(f, w) <= 5e-6
