"""Products of chained Kronecker-sparse factors against dense products."""

import functools
import importlib

import pytest
import torch

from structmat import KroneckerSparse
from structmat.testing import relative_error
from structmat_kernels.kronecker_merge import kronecker_merge
from structmat_kernels.kronecker_merge import op as merge_op
from structmat_kernels.kronecker_merge.reference import kronecker_merge as reference
from structmat_kernels.kronecker_merge.reference import shapes

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.kronecker_merge.kernel")

BOUND = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}
#: (b, c) of the factors, a and d.
CHAINS = {
    "one": ([(3, 5)], 2, 7),
    "two": ([(2, 2), (2, 2)], 1, 1),
    "dyadic": ([(2, 2)] * 3, 3, 4),
    "uneven": ([(3, 5), (1, 2), (7, 1), (2, 3)], 5, 1),
    "long": ([(2, 2)] * 5, 1, 3),
}


def draw(name, mirror, dtype=torch.float32, device="cpu", batch=()):
    radices, a, d = CHAINS[name]
    generator = torch.Generator().manual_seed(len(name) + mirror)
    found = shapes(radices, a, d, mirror)
    return [torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in found]


def dense(values):
    return functools.reduce(torch.matmul, [KroneckerSparse(v.double()).to_dense() for v in values])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_reference_is_the_product(name, mirror):
    values = draw(name, mirror, torch.float64, batch=(2,))
    product = KroneckerSparse(reference(values, mirror).movedim(-3, -1))
    assert relative_error(product.to_dense(), dense(values)) <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_parity_on_poisoned_memory(name, mirror, dtype, device, poisoned):
    values = draw(name, mirror, dtype, device, batch=(2,))
    got = kronecker_merge(values, mirror, backend="triton")
    assert got.dtype == dtype and got.is_contiguous()
    assert relative_error(got, reference([v.double() for v in values], mirror)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients(name, mirror, dtype, device, poisoned):
    values = draw(name, mirror, dtype, device, batch=(2,))
    doubles = [v.double().requires_grad_() for v in values]
    exact = reference(doubles, mirror)
    grad = exact.detach().cos().to(dtype)
    leaves = [v.requires_grad_() for v in values]
    got = torch.autograd.grad(kronecker_merge(leaves, mirror, backend="triton"), leaves, grad)
    expected = torch.autograd.grad(exact, doubles, grad.double())
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) <= 2 * BOUND[dtype]


def test_higher_derivatives_and_transforms(device):
    values = draw("dyadic", True, device=device)

    def loss(*v, backend):
        return kronecker_merge(v, True, backend=backend).sin().sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jvp(f, (values[1],), (values[1],))[1]):

        def run(backend, transform=transform):
            def f(v):
                return loss(values[0], v, *values[2:], backend=backend)

            found = transform(f)
            return found if isinstance(found, torch.Tensor) else found(values[1])

        assert relative_error(run("triton"), run("torch")) <= 1e-5
    stacked = torch.stack((values[2], -values[2]))
    got = torch.vmap(lambda v: kronecker_merge([*values[:2], v, *values[3:]], True, backend="triton"))(stacked)
    expected = reference(values, True)
    assert relative_error(got, torch.stack((expected, -expected))) <= 1e-6


def test_compiled_and_opcheck(device):
    values = [v.requires_grad_() for v in draw("uneven", False, device=device)]
    compiled = torch.compile(kronecker_merge, fullgraph=True, backend="aot_eager")
    got = compiled(values, backend="triton")
    expected = reference(values)
    assert relative_error(got, expected) <= 1e-6
    for g, e in zip(*(torch.autograd.grad(y.square().sum(), values) for y in (got, expected)), strict=True):
        assert relative_error(g, e) <= 1e-6
    flat = torch.cat([v.detach().reshape(1, -1) for v in values], 1)
    torch.library.opcheck(merge_op._merge, (flat, "3x5 1x2 7x1 2x3", 5, 1, False))


def test_other_dtypes_empty_batches_and_errors():
    for dtype in (torch.float64, torch.complex64):
        values = [v.to(dtype) for v in draw("two", False)]
        assert torch.equal(kronecker_merge(values), reference(values))
    empty = kronecker_merge(draw("dyadic", False, batch=(0,)), backend="triton")
    assert empty.shape == (0, 3, 4, 8, 8)
    values = draw("two", False)
    with pytest.raises(ValueError, match="at least one factor"):
        kronecker_merge([])
    with pytest.raises(TypeError, match=r"values\[1\] must have the dtype of values\[0\]"):
        kronecker_merge([values[0], values[1].double()])
    with pytest.raises(ValueError, match=r"values\[1\] must have shape \(\*batch, a, b, c, d\)"):
        kronecker_merge([values[0], values[1][None]])
    with pytest.raises(ValueError, match="chained with rank 1"):
        kronecker_merge([values[0], values[0]])
    with pytest.raises(ValueError, match="in the mirror"):
        kronecker_merge(values, True)
