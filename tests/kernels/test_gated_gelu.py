"""The gated unit's kernel against the definition in float64."""

import math

import pytest
import torch

from structmat.testing import relative_error
from structmat_kernels.gated_gelu import gated_gelu
from structmat_kernels.gated_gelu import op as gated_op
from structmat_kernels.gated_gelu.reference import gated_gelu as reference

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: The interpreter truncates float32 to bfloat16.
BOUND = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}
SHAPES = [(2,), (1, 2), (7, 6), (3, 5, 22), (2, 4096), (5, 2600), (33, 128), (2, 1, 3, 14)]
EMPTY = [(0, 4), (3, 0)]


def operand(shape, dtype=torch.float32, device="cpu"):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def test_the_definition():
    x = operand((3, 8), torch.float64)
    for row, found in zip(x.tolist(), reference(x).tolist(), strict=True):
        for a, b, y in zip(row[:4], row[4:], found, strict=True):
            assert y == pytest.approx(a * 0.5 * (1 + math.erf(a / math.sqrt(2))) * b, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_values_and_gradients_on_poisoned_memory(shape, dtype, device, poisoned):
    x = operand(shape, dtype, device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, wanted = gated_gelu(x, backend="triton"), reference(wide)
    assert y.dtype == dtype and y.shape == wanted.shape and y.is_contiguous()
    grad = operand(y.shape, dtype, device).flip(-1)
    (found,), (exact,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(wanted, wide, grad.double())
    assert found.shape == x.shape and found.dtype == dtype
    if y.numel():
        assert relative_error(y, wanted) <= BOUND[dtype] and relative_error(found, exact) <= BOUND[dtype]


def test_large_and_small_entries(device):
    a = torch.tensor([-1e4, -40.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 40.0, 1e4], device=device)
    x = torch.cat([a, torch.full_like(a, 3.0)]).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, wanted = gated_gelu(x, backend="triton"), reference(wide)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
    pairs = (torch.autograd.grad(t.sum(), leaf)[0].double() for t, leaf in ((y, x), (wanted, wide)))
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "every other"])
def test_layouts(layout, device, poisoned):
    x = operand((6, 20), device=device)
    made = {
        "rows apart": lambda: torch.nn.functional.pad(x, (3, 1), value=math.nan)[:, 3:-1],
        "transposed": lambda: x.mT.contiguous().mT,
        "every other": lambda: torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(1)[:, ::2],
    }[layout]()
    assert torch.equal(made, x) and not made.is_contiguous()
    grad = operand((10, 6), device=device).mT
    made.requires_grad_()
    y = gated_gelu(made, backend="triton")
    assert torch.equal(y, gated_gelu(x, backend="triton"))
    (found,) = torch.autograd.grad(y, made, grad)
    wide = x.double().requires_grad_()
    assert relative_error(found, torch.autograd.grad(reference(wide), wide, grad.double())[0]) <= 1e-6


def test_second_derivatives_forward_mode_and_vmap(device):
    x = operand((3, 6), device=device)

    def call(x):
        return gated_gelu(x, backend="triton")

    for function in (torch.func.hessian, torch.func.jacfwd):
        found, wanted = (function(lambda x, f=f: f(x).sin().sum())(t) for f, t in ((call, x), (reference, x.double())))
        assert relative_error(found, wanted) <= 1e-5
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf).sum(), leaf, create_graph=True)
    wide = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(wide).sum(), wide, create_graph=True)
    (second,), (exact,) = torch.autograd.grad(first.sum(), leaf), torch.autograd.grad(exact.sum(), wide)
    assert relative_error(second, exact) <= 1e-5
    stack = operand((4, 2, 6), device=device)
    for dim in (0, 1):
        rows = stack.movedim(dim, 0).contiguous()
        assert torch.equal(torch.func.vmap(call, dim)(stack), torch.stack([call(row) for row in rows]))
    gradient = torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(stack)
    wide = torch.func.vmap(torch.func.grad(lambda x: reference(x).sum()))(stack.double())
    assert relative_error(gradient, wide) <= 1e-6


def test_the_operators_are_registered_properly(device):
    x = operand((3, 10), device=device).requires_grad_()
    torch.library.opcheck(gated_op._gated, (x.detach(),))
    for need in (True, False):
        torch.library.opcheck(gated_op._backward, (operand((3, 5), device=device), x.detach(), [need]))


def test_who_takes_the_kernel(device, monkeypatch):
    called = []
    real = gated_op._differentiable
    monkeypatch.setattr(gated_op, "_differentiable", lambda x: called.append(x.dtype) or real(x))
    x = operand((2, 8), device=device)
    gated_gelu(x)
    gated_gelu(x, backend="torch")
    gated_gelu(x.double())
    assert called == ([torch.float32] if device == "cuda" else [])
    monkeypatch.setattr(gated_op, "MEASURED", False)
    gated_gelu(x)
    assert len(called) == (device == "cuda")
    gated_gelu(x, backend="triton")
    assert called[-1] == torch.float32
    torch.testing.assert_close(torch.compile(gated_gelu, fullgraph=True, backend="aot_eager")(x), reference(x))


def test_bad_input_is_named():
    for x in (torch.ones(()), torch.ones(3, 5)):
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2 h\), got"):
            gated_gelu(x)
    with pytest.raises(TypeError, match="float64"):
        gated_gelu(torch.ones(2, 4, dtype=torch.float64), backend="triton")


@pytest.mark.gpu
def test_same_bits_again(same_bits_everywhere):
    x = operand((1000, 6144), torch.bfloat16, "cuda").requires_grad_()

    def step():
        leaf = x.detach().requires_grad_()
        y = gated_gelu(leaf)
        return [y, *torch.autograd.grad(y, leaf, torch.ones_like(y))]

    same_bits_everywhere(step)


@pytest.mark.gpu
def test_more_than_32_bits_of_places():
    x = torch.zeros(1 << 20, 2200, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1
    assert gated_gelu(x)[-1].double().allclose(torch.full((1100,), 0.8413, device="cuda").double(), atol=5e-3)
