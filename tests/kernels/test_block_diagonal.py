"""Block-diagonal kernels against the float64 reference: the Kronecker-sparse kernels with d = 1, and cuBLAS's."""

import importlib

import pytest
import torch

from structmat_kernels.block_diagonal import block_diagonal
from structmat_kernels.block_diagonal import op as block_op
from structmat_kernels.block_diagonal.reference import block_diagonal as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.block_diagonal.kernel")

BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# k, q, p, n, tokens: joined small blocks, 64s, several tiles in both directions, cuBLAS's, missing blocks.
SHAPES = [
    (7, 5, 3, 21, 70),
    (7, 5, 3, 17, 9),
    (5, 1, 4, 9, 5),
    (3, 4, 1, 3, 5),
    (4, 32, 32, 128, 35),
    (3, 16, 64, 150, 130),
    (2, 129, 67, 134, 7),
    (2, 70, 200, 333, 20),
    (1, 30, 300, 1, 3),
    (2, 256, 257, 514, 5),
    (3, 256, 260, 600, 5),
    (3, 300, 256, 200, 5),
    (2, 256, 256, 512, 1),
    (2, 256, 256, 512, 0),
    (4, 3, 3, 0, 2),
]


def operands(k, q, p, n, tokens, dtype, device, batch=(), factor_batch=()):
    gen = torch.Generator().manual_seed(k + 10 * q + 100 * p + 1000 * n + tokens)
    x = torch.randn(*batch, tokens, n, generator=gen).to(device, dtype)
    blocks = torch.randn(*factor_batch, k, q, p, generator=gen).to(device, dtype)
    lead = torch.broadcast_shapes(batch, factor_batch)
    return x, blocks, torch.randn(*lead, tokens, k, q, generator=gen).to(device, dtype)


def gradients(function, x, blocks, grad, **options):
    x, blocks = x.detach().requires_grad_(), blocks.detach().requires_grad_()
    y = function(x, blocks, **options)
    return y.detach(), *torch.autograd.grad(y, (x, blocks), grad)


def check(found, expected, dtype, names=("y", "gx", "gblocks")):
    for name, f, e in zip(names, found, expected, strict=True):
        assert f.dtype == dtype and f.shape == e.shape, name
        error = torch.linalg.vector_norm(f.double() - e)
        assert error <= BOUND[dtype] * torch.linalg.vector_norm(e), f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_on_poisoned_memory(shape, dtype, device, poisoned):
    x, blocks, grad = operands(*shape, dtype, device)
    expected = gradients(reference, x.double(), blocks.double(), grad.double())
    check(gradients(block_diagonal, x, blocks, grad, backend="triton"), expected, dtype)


def test_large_blocks_are_a_library_product(device, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(kernel.kronecker_kernel, "product", refuse)
    monkeypatch.setattr(kernel.kronecker_kernel, "weights", refuse)
    gradients(block_diagonal, *operands(2, 256, 256, 500, 3, torch.float32, device), backend="triton")
    with pytest.raises(AssertionError, match="was launched"):
        block_diagonal(*operands(2, 255, 256, 512, 3, torch.float32, device)[:2], backend="triton")


@pytest.mark.parametrize("q, p, n", [(4, 3, 8), (256, 256, 500)])
def test_strides_and_batches(q, p, n, device):
    def compare(x, blocks, grad):
        expected = gradients(reference, x.double(), blocks.double(), grad.double())
        check(gradients(block_diagonal, x, blocks, grad, backend="triton"), expected, torch.float32)

    x, blocks, grad = operands(3, q, p, n, 4, torch.float32, device, (2, 1), (2,))
    if q < 256:
        compare(x, blocks, grad)
    x, blocks, grad = x[0, 0], blocks[0], grad[0, 0]
    compare(torch.cat((x, x), -1)[:, :n], blocks, torch.cat((grad, grad))[::2])
    compare(x.T.contiguous().T, blocks.mT.contiguous().mT, grad.transpose(0, 2).contiguous().transpose(0, 2))
    compare(x[:1].expand(4, -1), blocks[:1].expand(3, -1, -1), grad[:1, :1].expand_as(grad))
    compare(x.expand(2, 2, -1, -1), blocks, grad.expand(2, 2, -1, -1, -1))


def test_transforms_and_second_derivatives(device):
    x, blocks, grad = operands(3, 4, 3, 8, 5, torch.float32, device, (2,), (2,))

    def f(x, blocks):
        return block_diagonal(x, blocks, backend="triton")

    torch.testing.assert_close(torch.func.vmap(f)(x, blocks), reference(x, blocks))

    def loss(g):
        return lambda x, blocks: (g(x, blocks).sin() * grad[0]).sum()

    per_sample = (torch.func.vmap(torch.func.grad(loss(g), (0, 1)), (0, None))(x, blocks[0]) for g in (f, reference))
    for u, v in zip(*per_sample, strict=True):
        torch.testing.assert_close(u, v)
    tangents = (torch.ones_like(x), blocks.flip(0))
    for u, v in zip(*(torch.func.jvp(g, (x, blocks), tangents) for g in (f, reference)), strict=True):
        torch.testing.assert_close(u, v)

    def second(function, *tensors):
        inputs = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(inputs[0], inputs[1]).sin(), inputs[:2], inputs[2], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    exact = second(reference, x.double(), blocks.double(), grad.double())
    check(second(f, x, blocks, grad), exact, torch.float32, ("x", "blocks", "grad"))


def test_compiled_and_opcheck(device):
    x, blocks, grad = operands(3, 4, 3, 8, 5, torch.float32, device)
    compiled = torch.compile(block_diagonal, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, x, blocks, grad, backend="triton")
    check(found, gradients(reference, x.double(), blocks.double(), grad.double()), torch.float32)
    x, blocks, grad = x[None], blocks[None], grad.flatten(-2)[None]
    torch.library.opcheck(block_op._product, (x, blocks))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(block_op._backward, (grad, x, blocks, needs))


def test_autocast_changes_no_dtype(device):
    """The callers cast operands; inside an autocast region the operation itself keeps to what it is given."""
    x, blocks, grad = operands(2, 256, 256, 512, 3, torch.float32, device)
    expected = gradients(block_diagonal, x, blocks, grad, backend="triton")
    with torch.autocast(device, torch.bfloat16):
        found = gradients(block_diagonal, x, blocks, grad, backend="triton")
    for u, v in zip(found, expected, strict=True):
        assert torch.equal(u, v)


def test_other_dtypes_and_errors():
    x, blocks, _ = operands(3, 4, 3, 8, 5, torch.float64, "cpu")
    assert torch.autograd.gradcheck(block_diagonal, (x.requires_grad_(), blocks.requires_grad_()))
    with pytest.raises(TypeError, match="bfloat16, float16, float32"):
        block_diagonal(x, blocks, backend="triton")
    with pytest.raises(ValueError, match=r"n at most 9 .*got \(5, 16\)"):
        block_diagonal(torch.cat((x, x), 1), blocks)
    with pytest.raises(ValueError, match=r"got \(8,\)"):
        block_diagonal(x[0], blocks)
    with pytest.raises(ValueError, match=r"\(\*batch, k, q, p\), got \(4, 3\)"):
        block_diagonal(x, blocks[0])
    with pytest.raises(TypeError, match="dtype of x"):
        block_diagonal(x, blocks.float())
    with pytest.raises(ValueError, match="device of x"):
        block_diagonal(x, blocks.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 64, 64, 4096, 999), (128, 32, 32, 4090, 999), (4, 512, 512, 2048, 999)], ids=str
)
def test_graphs_streams_and_equal_bits(shape, dtype, same_bits_everywhere):
    x, blocks, grad = operands(*shape, dtype, "cuda")
    expected = same_bits_everywhere(lambda: gradients(block_diagonal, x, blocks, grad, backend="triton"))
    check(expected, gradients(reference, x.double(), blocks.double(), grad.double()), dtype)
    dense = gradients(reference, x, blocks, grad)
    exact = gradients(reference, x.double(), blocks.double(), grad.double())
    for f, r, e in zip(expected, dense, exact, strict=True):
        assert (f.double() - e).norm() <= 1.5 * (r.double() - e).norm() + 1e-7 * e.norm()


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, size = 1024, 64
    tokens = (1 << 31) // n + 40
    gen = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randn(n // size, size, size, generator=gen, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, n, generator=gen, device="cuda", dtype=torch.bfloat16).repeat(tokens // 64 + 1, 1)[:tokens]
    y = block_diagonal(x, blocks, backend="triton")
    assert torch.equal(y[-64:], block_diagonal(x[-64:].clone(), blocks, backend="triton"))
