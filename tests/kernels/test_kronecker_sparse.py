"""The Kronecker-sparse kernels against the float64 reference; see also test_block_diagonal (the case d = 1)."""

import importlib

import pytest
import torch

from structmat_kernels.kronecker_sparse import kronecker_sparse
from structmat_kernels.kronecker_sparse import op as kron_op
from structmat_kernels.kronecker_sparse.reference import kronecker_sparse as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.kronecker_sparse.kernel")

BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# a, d, q, p, tokens: every kernel, powers of two, primes, one row or column, rectangles, more tokens than a tile.
SHAPES = [
    (1, 32, 2, 2, 70),
    (4, 1, 2, 2, 9),
    (3, 2, 2, 2, 140),
    (2, 16, 8, 8, 40),
    (2, 17, 5, 7, 9),
    (2, 16, 3, 4, 33),
    (1, 67, 4, 1, 5),
    (2, 19, 1, 6, 5),
    (1, 32, 16, 16, 35),
    (3, 5, 23, 17, 9),
    (2, 3, 64, 20, 33),
    (1, 16, 40, 37, 17),
    (2, 4, 19, 21, 1),
    (1, 1, 130, 200, 20),
    (1, 1, 1, 1, 1),
    (2, 16, 4, 4, 0),
]


def operands(a, d, q, p, tokens, dtype, device, batch=(), factor_batch=()):
    gen = torch.Generator().manual_seed(a + 10 * d + 100 * q + 1000 * p + tokens)
    x = torch.randn(*batch, tokens, a * p * d, generator=gen).to(device, dtype)
    blocks = torch.randn(*factor_batch, a, d, q, p, generator=gen).to(device, dtype)
    lead = torch.broadcast_shapes(batch, factor_batch)
    return x, blocks, torch.randn(*lead, tokens, a * q * d, generator=gen).to(device, dtype)


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
    check(gradients(kronecker_sparse, x, blocks, grad, backend="triton"), expected, dtype)


@pytest.mark.parametrize("shape", [(1, 64, 2, 2, 64), (2, 16, 8, 8, 64), (1, 32, 32, 32, 64)], ids=str)
def test_error_is_that_of_a_dense_product(shape, device):
    # The interpreter truncates float32 to bfloat16, where a GPU rounds.
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16):
        x, blocks, _ = operands(*shape, dtype, device)
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=device)
        dense = reference(eye, blocks.double())  # (n, m)
        exact = x.double() @ dense
        error = (kronecker_sparse(x, blocks, backend="triton").double() - exact).norm()
        assert error <= 1.5 * ((x @ dense.to(dtype)).double() - exact).norm()


def test_shapes_reach_every_kernel():
    for dtype in (torch.float32, torch.bfloat16):
        kinds = {kernel.config(t, a, d, q, p, dtype)["kind"] for a, d, q, p, t in SHAPES if t}
        assert kinds == {"lanes", "tile", "batched"}
    kinds = {kernel.weights_config(t, a, d, q, p, torch.float32)["kind"] for a, d, q, p, t in SHAPES if t}
    assert kinds == {"lanes", "tile", "batched"}


CONFIGS = [
    (2, 20, 4, 3, {"kind": "lanes", "BT": 4, "BD": 16, "num_warps": 4}),
    (2, 20, 4, 3, {"kind": "tile", "SA": 1, "SD": 16, "BT": 16, "BK": 64, "BN": 64, "steps": 3, "num_warps": 4}),
    (2, 20, 4, 3, {"kind": "tile", "SA": 1, "SD": 8, "BT": 16, "BK": 16, "BN": 16, "steps": 1, "num_warps": 4}),
    (5, 3, 4, 3, {"kind": "tile", "SA": 2, "SD": 3, "BT": 16, "BK": 16, "BN": 16, "steps": 1, "num_warps": 4}),
    (1, 6, 18, 33, {"kind": "batched", "SD": 4, "BT": 16, "BK": 16, "BN": 16, "num_warps": 4}),
]


@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_any_configuration(case, device, poisoned):
    a, d, q, p, config = case
    x, blocks, grad = operands(a, d, q, p, 37, torch.float32, device)
    y, gx, gblocks = gradients(reference, x.double(), blocks.double(), grad.double())
    x, blocks, grad = x[None], blocks[None], grad[None]
    found_y = kernel.product(x, blocks, y.shape[-1], config)
    found_gx = kernel.product(grad, blocks.mT, gx.shape[-1], config)
    split = config | {"splits": 2, "steps": -(-37 // (2 * config["BT"]))}
    found_gblocks = kernel.weights(grad, x, blocks, split)
    check((found_y[0], found_gx[0], found_gblocks[0]), (y, gx, gblocks), torch.float32)


@pytest.mark.parametrize("d, q, p", [(16, 2, 2), (1, 3, 4), (8, 18, 16)])
def test_strides_and_batches(d, q, p, device):
    a, tokens = 2, 6
    x, blocks, grad = operands(a, d, q, p, tokens, torch.float32, device, (3, 1), (2,))

    def compare(x, blocks, grad):
        expected = gradients(reference, x.double(), blocks.double(), grad.double())
        check(gradients(kronecker_sparse, x, blocks, grad, backend="triton"), expected, torch.float32)

    compare(x, blocks, grad)
    x, blocks, grad = x[0, 0], blocks[0], grad[0, 0]
    compare(torch.cat((x, x), -1)[:, : x.shape[1]], blocks, torch.cat((grad, grad))[::2])
    compare(x.T.contiguous().T, blocks.mT.contiguous().mT, grad.T.contiguous().T)
    compare(x[:1].expand(tokens, -1), blocks[:, :1].expand(-1, d, -1, -1), grad[:1, :1].expand_as(grad))
    compare(x.expand(2, 2, -1, -1), blocks.expand(2, 1, -1, -1, -1, -1), grad.expand(2, 2, -1, -1))


def test_only_the_needed_gradients(device):
    x, blocks, grad = operands(2, 4, 3, 2, 5, torch.float32, device)
    gx = torch.autograd.grad(kronecker_sparse(x.requires_grad_(), blocks, backend="triton"), x, grad)[0]
    torch.testing.assert_close(gx, reference(grad, blocks.mT))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(kronecker_sparse(x, blocks, backend="triton"), blocks, grad)


def test_transforms(device):
    x, blocks, grad = operands(2, 2, 3, 2, 5, torch.float32, device, (4,), (4,))

    def f(x, blocks):
        return kronecker_sparse(x, blocks, backend="triton")

    torch.testing.assert_close(torch.func.vmap(f)(x, blocks), reference(x, blocks))
    torch.testing.assert_close(
        torch.func.vmap(f, (1, None), 1)(x.transpose(0, 1), blocks[0]), reference(x, blocks[0]).transpose(0, 1)
    )

    def loss(g):
        return lambda x, blocks: (g(x, blocks).sin() * grad[0]).sum()

    for args in ((0, 1), (0,)):
        found, expected = (
            torch.func.vmap(torch.func.grad(loss(g), args), (0, None))(x, blocks[1]) for g in (f, reference)
        )
        for u, v in zip(found, expected, strict=True):
            torch.testing.assert_close(u, v)
    tangents = (torch.ones_like(x), blocks.flip(0))
    found, expected = (torch.func.jvp(g, (x, blocks), tangents) for g in (f, reference))
    for u, v in zip(found, expected, strict=True):
        torch.testing.assert_close(u, v)


def test_second_derivatives(device):
    def second(function, *tensors):
        inputs = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(inputs[0], inputs[1]).sin(), inputs[:2], inputs[2], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    tensors = operands(2, 2, 3, 2, 5, torch.float32, device)
    exact = second(reference, *(t.double() for t in tensors))
    found = second(lambda x, blocks: kronecker_sparse(x, blocks, backend="triton"), *tensors)
    check(found, exact, torch.float32, ("x", "blocks", "grad"))


def test_compiled(device):
    x, blocks, grad = operands(2, 2, 3, 2, 5, torch.float32, device)
    compiled = torch.compile(kronecker_sparse, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, x, blocks, grad, backend="triton")
    check(found, gradients(reference, x.double(), blocks.double(), grad.double()), torch.float32)


def test_opcheck(device):
    x, blocks, grad = operands(2, 2, 3, 2, 5, torch.float32, device, (2,), (2,))
    torch.library.opcheck(kron_op._product, (x, blocks))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(kron_op._backward, (grad, x, blocks, needs))


def test_other_dtypes_and_backends():
    x, blocks, _ = operands(2, 2, 3, 2, 5, torch.float64, "cpu")
    assert torch.autograd.gradcheck(kronecker_sparse, (x.requires_grad_(), blocks.requires_grad_()))
    dense = torch.zeros(12, 8, dtype=torch.float64)
    for A in range(2):
        for D in range(2):
            dense[A * 6 + D : A * 6 + D + 6 : 2, A * 4 + D : A * 4 + D + 4 : 2] = blocks[A, D].detach()
    torch.testing.assert_close(kronecker_sparse(x, blocks), x @ dense.T)
    with pytest.raises(TypeError, match="bfloat16, float16, float32"):
        kronecker_sparse(x, blocks, backend="triton")


def test_errors():
    x, blocks, _ = operands(2, 2, 3, 2, 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, tokens, 8\).*got \(5, 7\)"):
        kronecker_sparse(x[:, 1:], blocks)
    with pytest.raises(ValueError, match=r"got \(8,\)"):
        kronecker_sparse(x[0], blocks)
    with pytest.raises(ValueError, match="blocks must have shape"):
        kronecker_sparse(x, blocks[0])
    with pytest.raises(TypeError, match="dtype of x"):
        kronecker_sparse(x, blocks.double())
    with pytest.raises(ValueError, match="device of x"):
        kronecker_sparse(x, blocks.to("meta"))
    with pytest.raises(ValueError, match="backend must be"):
        kronecker_sparse(x, blocks, backend="cuda")


GPU_SHAPES = [(1, 128, 2, 2, 999), (4, 1, 32, 32, 999), (2, 32, 8, 8, 999), (1, 64, 64, 64, 999)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_graphs_streams_and_equal_bits(shape, dtype, same_bits_everywhere):
    x, blocks, grad = operands(*shape, dtype, "cuda")
    expected = same_bits_everywhere(lambda: gradients(kronecker_sparse, x, blocks, grad, backend="triton"))
    check(expected, gradients(reference, x.double(), blocks.double(), grad.double()), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d, q", [(512, 2), (1, 32), (16, 64)])
def test_offsets_beyond_32_bits(d, q):
    n = 1024
    tokens = (1 << 31) // n + 40
    gen = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randn(n // (d * q), d, q, q, generator=gen, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, n, generator=gen, device="cuda", dtype=torch.bfloat16).repeat(tokens // 64 + 1, 1)[:tokens]
    y = kronecker_sparse(x, blocks, backend="triton")
    assert torch.equal(y[-64:], kronecker_sparse(x[-64:].clone(), blocks, backend="triton"))
    gblocks = kernel.weights(y[None], x[None], blocks[None])
    whole = kernel.weights(y[None, :64], x[None, :64], blocks[None]).double() * (tokens / 64)
    assert (gblocks.double() - whole).norm() <= 2e-2 * whole.norm()
