"""The Hadamard kernel against the reference and against Sylvester's matrix."""

import importlib

import pytest
import scipy.linalg
import torch

from structmat.testing import relative_error
from structmat_kernels.hadamard import hadamard
from structmat_kernels.hadamard import op as had_op
from structmat_kernels.hadamard.reference import hadamard as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.hadamard.kernel")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUND = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 5e-3}


SHAPES = [(5, 1), (1, 2), (7, 4), (33, 8), (9, 16), (40, 64), (3, 512), (2, 4096), (2, 8192), (1, 32768)]


def rows(T, n, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(T, n, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("n", [1, 2, 4, 32, 256])
def test_reference_is_sylvesters_matrix(n):
    H = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    x = rows(3, n, torch.float64)
    torch.testing.assert_close(reference(x, 0.5), 0.5 * x @ H)
    assert torch.equal(reference(torch.eye(n, dtype=torch.int64)), H.long())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, n", SHAPES)
def test_parity_on_poisoned_memory(T, n, dtype, device, poisoned):
    x = rows(T, n, dtype, device)
    exact = reference(x.double(), n**-0.5)
    y = hadamard(x, scale=n**-0.5, backend="triton")
    assert y.dtype == dtype and y.shape == x.shape
    assert relative_error(y, exact) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_in_integers(dtype, device):
    """Small integers pass through float32 without rounding: what comes out is the integer transform, bit for bit."""
    n = 128
    x = (torch.arange(9 * n, device=device) * 37 % 3 - 1).reshape(9, n)
    y = hadamard(x.to(dtype), backend="triton")
    assert torch.equal(y.long(), reference(x))


def test_error_is_that_of_a_rounded_transform(device):
    for dtype in DTYPES if device == "cuda" else DTYPES[:2]:  # the interpreter truncates float32 to bfloat16
        x = rows(4, 1024, dtype, device)
        exact = reference(x.double(), 1 / 32)
        rounded = relative_error(exact.to(dtype), exact)
        assert relative_error(hadamard(x, scale=1 / 32, backend="triton"), exact) <= 1.5 * rounded + 1e-7


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 1, "part": 64, "num_warps": 1},
        {"rows": 4, "part": 64, "num_warps": 4},
        {"rows": 2, "part": 32, "num_warps": 1},
        {"rows": 8, "part": 8, "num_warps": 1},
    ],
    ids=str,
)
def test_any_configuration(config, device, poisoned):
    x = rows(11, 64, device=device)
    assert relative_error(kernel.hadamard(x, 0.3, config), reference(x.double(), 0.3)) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [4096, 8192, 16384])
def test_matrix_units(n, dtype, device, poisoned):
    """The products of half precision, for which config asks from 65 rows on."""
    assert "A" in kernel.config(67, n, dtype)
    x = rows(2 * 67, n, dtype, device)[::2]
    exact = reference(x.double(), n**-0.5)
    rounded = relative_error(exact.to(dtype), exact)
    allowed = 1.5 * rounded if device == "cuda" or dtype == torch.float16 else 1e-2
    assert relative_error(kernel.hadamard(x, n**-0.5), exact) <= allowed


def test_configurations_cover_every_size():
    for log in range(16):
        n = 1 << log
        for T in (1, 100, 1 << 20):
            c = kernel.config(T, n)
            assert n % c["part"] == 0 and n // c["part"] <= 8 and c["rows"] * c["part"] <= 4096 * c["num_warps"]


def test_strides_and_batches(device):
    x = rows(6, 32, device=device)

    def compare(x):
        torch.testing.assert_close(hadamard(x, backend="triton"), reference(x))

    compare(torch.cat((x, x), 1)[:, 32:])
    compare(x[::2])
    compare(x.T.contiguous().T)
    compare(x[:1].expand(4, -1))
    compare(x[:, :1].expand(-1, 64))
    compare(x.reshape(2, 3, 32).transpose(0, 1))
    compare(x[0])
    compare(x[:0])
    compare(x[None, :, None])


def test_derivatives(device):
    x, grad = rows(3, 16, device=device), rows(3, 16, device=device, seed=1)

    def f(x):
        return hadamard(x, scale=0.5, backend="triton")

    def second(function):
        inputs = [t.detach().requires_grad_() for t in (x, grad)]
        first = torch.autograd.grad(function(inputs[0].square()), inputs[0], inputs[1], create_graph=True)[0]
        return first, *torch.autograd.grad(first.sin().sum(), inputs)

    for u, v in zip(second(f), second(lambda x: reference(x, 0.5)), strict=True):
        torch.testing.assert_close(u, v)
    y, dy = torch.func.jvp(f, (x,), (grad,))
    torch.testing.assert_close((y, dy), (reference(x, 0.5), reference(grad, 0.5)))
    nested = torch.func.vmap(torch.func.grad(lambda x: f(x.sin()).square().sum()), 1)(x.T)
    expected = torch.func.vmap(torch.func.grad(lambda x: reference(x.sin(), 0.5).square().sum()), 1)(x.T)
    torch.testing.assert_close(nested, expected)
    curvature = torch.func.hessian(lambda x: f(x.sin()).sum())(x[0])
    torch.testing.assert_close(curvature.diagonal(), -x[0].sin() * f(torch.ones(16, device=device)))
    mapped = torch.func.vmap(f, 1, 1)(torch.stack((x, grad), 1))
    torch.testing.assert_close(mapped, torch.stack((reference(x, 0.5), reference(grad, 0.5)), 1))


def test_compiled_and_opcheck(device):
    x = rows(3, 16, device=device).requires_grad_()
    y = torch.compile(hadamard, fullgraph=True, backend="aot_eager")(x, scale=0.25, backend="triton")
    torch.testing.assert_close(y, reference(x, 0.25))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], reference(torch.ones_like(x), 0.25))
    for shape in ((3, 16), (2, 0, 4), (5, 1)):
        torch.library.opcheck(had_op._hadamard, (torch.ones(shape, device=device), 1.0))


def test_other_dtypes_and_errors():
    x = rows(3, 8, torch.float64)
    z = torch.complex(x, x.flip(0))
    for t in (x, z):
        assert torch.autograd.gradcheck(lambda t: hadamard(t, scale=0.5), (t.requires_grad_(),))
    torch.testing.assert_close(hadamard(hadamard(z), scale=1 / 8), z)
    assert hadamard(torch.ones(1, 1 << 16)).sum() == 1 << 16
    with pytest.raises(ValueError, match=r"power of two.*got 12; the nearest sizes are 8 and 16"):
        hadamard(torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"power of two.*got 0"):
        hadamard(torch.ones(2, 0))
    with pytest.raises(ValueError, match="scalar"):
        hadamard(torch.ones(()))
    with pytest.raises(ValueError, match="up to 32768"):
        hadamard(torch.ones(1, 1 << 16), backend="triton")
    with pytest.raises(TypeError, match="bfloat16, float16, float32"):
        hadamard(x, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1 << k for k in range(16)])
def test_all_sizes_graphs_streams_and_equal_bits(n, dtype, same_bits_everywhere):
    x = rows(257, n, dtype, "cuda")
    exact = reference(x.double(), n**-0.5)
    (y,) = same_bits_everywhere(lambda: [hadamard(x, scale=n**-0.5, backend="triton")])
    rounded = relative_error(exact.to(dtype), exact)
    assert relative_error(y, exact) <= 1.5 * rounded + (2e-7 if dtype == torch.float32 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 8192])
def test_offsets_beyond_32_bits(n):
    T = (1 << 31) // n + 40
    x = rows(64, n, torch.bfloat16, "cuda").repeat(T // 64 + 1, 1)[:T]
    y = hadamard(x, backend="triton")
    # As many rows as make the same kernel.
    assert torch.equal(y[-80:], hadamard(x[-80:].clone(), backend="triton"))
