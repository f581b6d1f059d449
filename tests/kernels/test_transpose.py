"""The transposing copy: the kernel against the definition, entry by entry the same."""

import pytest
import torch

from structmat_kernels.transpose import op as transpose_op
from structmat_kernels.transpose import reference, supported, transpose

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, rows, columns: one of everything, primes, more than a tile, more tiles of one kind than of the other.
SHAPES = [(1, 1, 1), (2, 1, 7), (3, 5, 1), (2, 8, 16), (1, 67, 131), (3, 64, 64), (1, 3, 200), (1, 130, 5), (2, 65, 64)]
EMPTY = [(0, 3, 4), (2, 0, 3), (2, 3, 0)]


def operands(shape, dtype, device="cpu"):
    """Two operands and a gradient of the result; numbers that the dtypes have exactly, sums too."""
    generator = torch.Generator().manual_seed(0)
    x, other, grad = (torch.randint(-60, 60, shape, generator=generator).to(device, dtype) for _ in range(3))
    return x, other, grad.mT.contiguous()


def layouts(t):
    """The same values in other places of memory, between NaN."""
    batch, rows, cols = t.shape
    wide = t.new_full((batch, rows + 3, 2 * cols + 1), float("nan"))
    return {
        "columns": t.mT.contiguous().mT,
        "part": wide[:, 1 : rows + 1, 1 : cols + 1].copy_(t),
        "strided": wide.clone()[:, 2 : rows + 2, 1::2].copy_(t),
        "batch last": t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_values(shape, dtype, device, poisoned):
    x, other, _ = operands(shape, dtype, device)
    for options in ({}, {"other": other}, {"dtype": torch.float16}, {"other": other, "dtype": torch.float32}):
        found, wanted = transpose(x, backend="triton", **options), reference.transpose(x, **options)
        assert found.is_contiguous() and found.dtype == options.get("dtype", dtype)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("layout", ["columns", "part", "strided", "batch last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape, layout, device, poisoned):
    x, other, _ = operands(shape, torch.float32, device)
    found = transpose(layouts(x)[layout], other, backend="triton")
    assert torch.equal(found, (x + other).mT)
    assert torch.equal(transpose(x, layouts(other)[layout], backend="triton"), found)
    alone = transpose(layouts(x)[layout], backend="triton")
    assert torch.equal(alone, x.mT) and alone.is_contiguous()
    assert torch.equal(transpose(x[:, :1].expand(-1, 3, -1), backend="triton"), x[:, :1].expand(-1, 3, -1).mT)


def test_a_sum_is_rounded_once_more(device):
    """To the dtype of x first, as a sum that stands alone."""
    x = torch.tensor([[2048.0, 1.0]], dtype=torch.float16, device=device)
    other = torch.tensor([[1.0, 2.0**-12]], dtype=torch.float16, device=device)
    found = transpose(x, other, dtype=torch.float32, backend="triton")
    assert torch.equal(found, (x + other).mT.float()) and found.flatten().tolist() == [2048.0, 1.0]


@pytest.mark.parametrize("batch", [(), (2, 3), (1, 2, 2)], ids=str)
def test_batches(batch, device):
    x, other, _ = operands((*batch, 5, 9), torch.float32, device)
    assert torch.equal(transpose(x, other, backend="triton"), (x + other).mT)


def test_what_is_transposed_already_is_not_copied(device):
    x = operands((2, 5, 9), torch.float32, device)[0].mT
    for backend in ("torch", "triton"):
        assert transpose(x, backend=backend).data_ptr() == x.data_ptr()
        assert transpose(x, dtype=torch.float16, backend=backend).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("add", [True, False])
def test_gradients_of_any_order(add, dtype, device):
    x, other, grad = operands((2, 5, 9), torch.float32, device)
    weight = torch.linspace(-1, 1, 9, device=device)

    def results(function):
        a, b = x.clone().requires_grad_(), other.clone().requires_grad_()
        y = function(a, b if add else None, dtype)
        inputs = [a, b] if add else [a]
        first = torch.autograd.grad(y, inputs, grad.to(y.dtype), retain_graph=True)
        bent = function(torch.sin(a), b * a if add else None, dtype).square()
        again = torch.autograd.grad(bent.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((t * weight).sin().sum() for t in again), inputs)
        return [y.detach(), *first, *again, *second]

    found = results(lambda a, b, d: transpose(a, b, dtype=d, backend="triton"))
    for f, w in zip(found, results(reference.transpose), strict=True):
        torch.testing.assert_close(f, w)


def test_only_one_operand_requires_grad(device):
    x, other, grad = operands((2, 5, 9), torch.float32, device)
    for first, second in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(first), other.clone().requires_grad_(second)
        transpose(a, b, backend="triton").backward(grad)
        assert (a.grad is not None, b.grad is not None) == (first, second)
        assert torch.equal(a.grad if first else b.grad, grad.mT)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_gradients_of_both_operands_accumulate(batch, device):
    """They are equal, but must not be the same memory, to which the next ones are added."""
    x, other, _ = operands((*batch, 5, 9), torch.float32, device)
    a, b = x.clone().requires_grad_(), other.clone().requires_grad_()
    for _ in range(2):
        transpose(a, b, backend="triton").square().sum().backward()
    for leaf in (a, b):
        torch.testing.assert_close(leaf.grad, 4 * (x + other))


@pytest.mark.parametrize("dims", [(0, 0), (2, None), (None, 1)], ids=str)
def test_vmap_jvp_and_per_sample_gradients(dims, device):
    many, one, _ = operands((4, 2, 5, 9), torch.float32, device)
    args = [(t if dim is not None else t[0]) for t, dim in zip((many, one), dims, strict=True)]
    args = [t if not dim else t.movedim(0, dim) for t, dim in zip(args, dims, strict=True)]
    mapped = torch.func.vmap(lambda a, b: transpose(a, b, backend="triton"), dims)(*args)
    assert torch.equal(mapped, torch.func.vmap(lambda a, b: (a + b).mT, dims)(*args))
    alone = torch.func.vmap(lambda a: transpose(a, backend="triton"))(many)
    assert torch.equal(alone, many.mT)

    def loss(function):
        return torch.func.vmap(torch.func.grad(lambda a, b: function(a, b).sin().sum(), (0, 1)), dims)(*args)

    for f, w in zip(loss(lambda a, b: transpose(a, b, backend="triton")), loss(lambda a, b: (a + b).mT), strict=True):
        torch.testing.assert_close(f, w)
    for tangents in ((many, one), (one, torch.zeros_like(one))):
        _, found = torch.func.jvp(lambda a, b: transpose(a, b, backend="triton"), (many, one), tangents)
        assert torch.equal(found, (tangents[0] + tangents[1]).mT)
    _, found = torch.func.jvp(lambda b: transpose(many, b, backend="triton"), (one,), (many,))
    assert torch.equal(found, many.mT)


def test_opcheck(device):
    x, other, _ = operands((2, 5, 9), torch.float32, device)
    for a, b, dtype in (
        (x, other, torch.float32),
        (x[0], x.new_empty(0), torch.float16),
        (x.mT, other.mT, torch.float32),
    ):
        torch.library.opcheck(transpose_op._transpose, (a, b, dtype))


@pytest.mark.parametrize("add", [True, False])
def test_compiled(add, device):
    torch._dynamo.reset()
    x, other, grad = operands((2, 5, 9), torch.float32, device)

    def run(function):
        a, b = x.clone().requires_grad_(), other.clone().requires_grad_()
        y = function(a * 2, b * 3 if add else None)
        return [y.detach(), *torch.autograd.grad(y, [a, b] if add else [a], grad)]

    compiled = torch.compile(
        lambda a, b: transpose(a, b, backend="triton"), fullgraph=True, backend="aot_eager", dynamic=False
    )
    for f, w in zip(run(compiled), run(reference.transpose), strict=True):
        assert torch.equal(f, w)
    with torch.no_grad():
        assert torch.equal(compiled(x, other if add else None), reference.transpose(x, other if add else None))


def test_other_dtypes():
    for dtype in (torch.float64, torch.complex64, torch.int64):
        x, other, _ = operands((2, 3, 4), torch.int64)
        found = transpose(x.to(dtype), other.to(dtype))
        assert torch.equal(found, (x + other).mT.to(dtype)) and found.is_contiguous()
        with pytest.raises(TypeError, match="bfloat16, float16, float32"):
            transpose(x.to(dtype), backend="triton")
    x = operands((2, 3, 4), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(transpose, (x, x.detach().clone().requires_grad_()))
    with pytest.raises(TypeError, match=r"writes bfloat16, float16, float32, got dtype=torch\.float64"):
        transpose(x.detach().float(), dtype=torch.float64, backend="triton")


def test_when_the_kernel_is_chosen(monkeypatch):
    small, large = torch.zeros(8, 8), torch.zeros(512, 512)
    monkeypatch.setattr(transpose_op._backend, "use_triton", lambda backend, *tensors: backend != "torch")
    assert supported(large) and not supported(small) and not supported(large, backend="torch")
    assert supported(small, backend="triton") and not supported(large, torch.float64)
    monkeypatch.setattr(transpose_op, "MEASURED", False)
    assert not supported(large) and supported(large, backend="triton")
    monkeypatch.setattr(transpose_op._backend, "_DEFAULT", "triton")
    assert supported(large) and supported(small)


def test_errors():
    x = torch.zeros(2, 3, 4)
    for args, error, message in [
        ((x[0, 0],), ValueError, r"x must have shape \(\*batch, rows, columns\), got \(4,\)"),
        ((x, x.mT), ValueError, r"other must have the shape of x, \(2, 3, 4\), got \(2, 4, 3\)"),
        ((x, x[0]), ValueError, "other must have the shape of x"),
        ((x, x.double()), TypeError, "other must have the dtype of x, torch.float32, got torch.float64"),
        ((x, x.to("meta")), ValueError, "other must be on the device of x"),
    ]:
        with pytest.raises(error, match=message):
            transpose(*args)
    with pytest.raises(ValueError, match="backend must be"):
        transpose(x, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 4096, 768), (3, 1999, 193), (300, 10, 7), (1, 1 << 17, 8)], ids=str)
def test_graphs_streams_and_equal_bits(shape, dtype, same_bits_everywhere):
    x, other, grad = operands(shape, dtype, "cuda")

    def step():
        a, b = x.clone().requires_grad_(), other.clone().requires_grad_()
        y = transpose(a, b, backend="triton")
        return y.detach(), *torch.autograd.grad(y, [a, b], grad)

    y, first, second = same_bits_everywhere(step)
    assert torch.equal(y, (x + other).mT) and torch.equal(first, grad.mT) and torch.equal(second, grad.mT)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """In the batch, and inside one matrix."""
    for shape in ((2100, 1024, 1024), (1, 1 << 21, 1050)):
        x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
        x[-1, -3:, -5:] = torch.arange(15, device="cuda").view(3, 5)
        y = transpose(x, backend="triton")
        assert torch.equal(y[-1, -5:, -3:], x[-1, -3:, -5:].mT) and int(y.count_nonzero()) == 14
        del x, y
