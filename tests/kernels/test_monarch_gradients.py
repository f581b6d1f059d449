"""Derivatives of the Monarch product of every order and mode, against the float64 reference."""

import pytest
import torch

from structmat_kernels.monarch import monarch, monarch_transposed, op, reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip

BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = [torch.float16, torch.bfloat16]
# l, s, r, k, q, p, nrows, ncols
RECTANGULAR = (3, 5, 4, 2, 6, 7, 13, 11)
WIDE = (2, 130, 4, 2, 4, 3, 255, 5)  # goes to cuBLAS
UNSERVED = (3, 130, 4, 6, 2, 3, 255, 5)  # goes to the reference


def embed(t):
    """t as a part of a larger tensor that is NaN elsewhere, at an odd address."""
    return t.new_full((*t.shape[:-2], t.shape[-2] + 2, t.shape[-1] + 5), float("nan"))[..., 1:-1, 3:-2].copy_(t)


def operands(shape, tokens, dtype, device, batch=(), factor_batch=None):
    """x, left, right, bias, of size about 1, and a gradient of the outputs."""
    l, s, r, k, q, p, nrows, ncols = shape
    generator = torch.Generator().manual_seed(l + 10 * s + 100 * r + tokens)
    of_factors = batch if factor_batch is None else factor_batch

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    x, bias = embed(normal(*batch, tokens, ncols)), normal(nrows)
    left, right = normal(*of_factors, l, s, r, scale=r**-0.5), normal(*of_factors, k, q, p, scale=p**-0.5)
    return x, left, right, bias, embed(normal(*torch.broadcast_shapes(batch, of_factors), tokens, nrows))


def close(got, expected, bound=None, name=""):
    assert got.shape == expected.shape, name
    error = (got.detach().double() - expected).norm()
    bound = BOUND[got.dtype] if bound is None else bound
    assert error <= bound * expected.norm(), f"{name}: {error / expected.norm()}"


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def product(x, left, right, bias, activation=None, backend="triton"):
    return monarch(x, left, right, bias.shape[-1], bias, activation, backend=backend)


def exact(x, left, right, bias, activation=None):
    return reference.monarch(x, left, right, bias.shape[-1], bias, activation)


def transposed(columns, backend="triton"):
    return lambda y, left, right: monarch_transposed(y, left, right, columns, backend=backend)


def compare(function, definition, tensors, cotangent, bound=None):
    """Value and all gradients against float64."""
    mine, right = leaves(tensors), leaves(tensors, torch.float64)
    y, expected = function(*mine), definition(*right)
    assert y.dtype == cotangent.dtype
    close(y, expected, bound)
    got = torch.autograd.grad(y, mine, cotangent)
    for i, (g, e) in enumerate(zip(got, torch.autograd.grad(expected, right, cotangent.double()), strict=True)):
        close(g, e, bound, f"gradient {i}")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_gradients_through_activations(device, activation, poisoned):
    *tensors, gy = operands(RECTANGULAR, 2, torch.float32, device)
    compare(lambda *t: product(*t, activation), lambda *t: exact(*t, activation), tensors, gy)


@pytest.mark.parametrize("shape", [WIDE, UNSERVED], ids=["cublas", "reference"])
def test_gradients_without_whole_kernels(device, shape, poisoned):
    *tensors, gy = operands(shape, 5, torch.float32, device, (2,), (2,))
    compare(lambda *t: product(*t, "silu"), lambda *t: exact(*t, "silu"), tensors, gy)
    tensors[0] = gy[..., :5, :].detach()
    cotangent = torch.ones(2, 5, shape[7], device=device)
    compare(transposed(shape[7]), lambda *t: reference.monarch_transposed(*t, shape[7]), tensors[:3], cotangent)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_in_half_precision(device, dtype):
    *tensors, gy = operands(RECTANGULAR, 5, dtype, device)
    # The activation's derivative sees the rounded product: twice the roundings of one product.
    compare(lambda *t: product(*t, "gelu"), lambda *t: exact(*t, "gelu"), tensors, gy, 2 * BOUND[dtype])


def test_gradients_of_batches(device, poisoned):
    for batch, factor_batch in (((2, 3), ()), ((), (2,)), ((2, 1), (2,)), ((0,), ()), ((1,), (0,))):
        *tensors, gy = operands(RECTANGULAR, 2, torch.float32, device, batch, factor_batch)
        compare(lambda *t: product(*t, "gelu"), lambda *t: exact(*t, "gelu"), tensors, gy)
    *tensors, y = operands(RECTANGULAR, 2, torch.float32, device, (2, 1), (2,))
    cotangent = torch.ones(2, 2, 2, 11, device=device)
    compare(transposed(11), lambda *t: reference.monarch_transposed(*t, 11), (y, *tensors[1:3]), cotangent)


def test_bias_may_have_strides(device):
    """On every path: kernels, cuBLAS."""
    for shape in (RECTANGULAR, WIDE):
        x, left, right, bias, _ = operands(shape, 5, torch.float32, device, (2,))
        for some in (bias.repeat_interleave(2)[::2], bias[:1].expand_as(bias)):
            got = product(x, left, right, some)
            close(got, exact(x.double(), left.double(), right.double(), some.double()))


def test_only_wanted_gradients(device):
    *tensors, gy = operands(RECTANGULAR, 2, torch.float32, device)
    right = leaves(tensors, torch.float64)
    expected = torch.autograd.grad(exact(*right, "silu"), right, gy.double())
    for i in range(4):
        mine = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(product(*mine, "silu"), mine[i], gy)
        close(got, expected[i], name=str(i))
    y, columns = gy, RECTANGULAR[7]
    right = leaves((y, *tensors[1:3]), torch.float64)
    expected = torch.autograd.grad(reference.monarch_transposed(*right, columns).sum(), right)
    for i in range(3):
        mine = [t.clone().requires_grad_(i == j) for j, t in enumerate((y, *tensors[1:3]))]
        (got,) = torch.autograd.grad(transposed(columns)(*mine).sum(), mine[i])
        close(got, expected[i], name=str(i))


def test_activations_where_the_gradient_is_not_finite(device):
    """As PyTorch's: a closed relu passes no infinite gradient on, and a product that is NaN stays NaN."""
    left, right = torch.ones(1, 1, 1, device=device), torch.ones(1, 1, 1, device=device)
    x = torch.tensor([[-1.0], [1.0]], device=device, requires_grad=True)
    infinite = torch.full_like(x, float("inf"))
    (got,) = torch.autograd.grad(monarch(x, left, right, 1, activation="relu", backend="triton"), x, infinite)
    assert got.flatten().tolist() == [0.0, float("inf")]
    nan = torch.full((1, 1), float("nan"), device=device)
    for activation in (None, "relu", "gelu", "silu"):
        assert monarch(nan, left, right, 1, activation=activation, backend="triton").isnan().all(), activation


FUNCTIONS = {
    "product": (lambda *t: product(*t, "silu"), lambda *t: exact(*t, "silu"), 4),
    "transposed": (transposed(11), lambda *t: reference.monarch_transposed(*t, 11), 3),
}


def function_operands(name, device, **how):
    x, left, right, bias, y = operands(RECTANGULAR, 3, torch.float32, device, **how)
    return (x, left, right, bias) if name == "product" else (y, left, right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_and_forward_mode(device, name):
    function, definition, count = FUNCTIONS[name]
    tensors = function_operands(name, device)

    def second(f, inputs):
        first = torch.autograd.grad(f(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    got, expected = second(function, leaves(tensors)), second(definition, leaves(tensors, torch.float64))
    for i in range(count):
        close(got[i], expected[i], 1e-5, f"second {i}")
    tangents = tuple(t.flip(-1) for t in tensors)
    doubles = tuple(t.double() for t in tensors), tuple(t.double() for t in tangents)
    for mine, right in zip(
        torch.func.jvp(function, tensors, tangents), torch.func.jvp(definition, *doubles), strict=True
    ):
        close(mine, right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(device, name):
    function, definition, count = FUNCTIONS[name]
    tensors = list(function_operands(name, device, batch=(3,)))
    if count == 4:
        tensors[3] = torch.stack([tensors[3], tensors[3].flip(0), -tensors[3]])
    one = [t[0] for t in tensors]
    # all mapped; only the input, along its tokens' place; only a factor; input and factor
    for mapped in (range(count), (0,), (1,), (0, 2)):
        dims = tuple((1 if i == 0 else 0) if i in mapped else None for i in range(count))
        args = [(t.movedim(0, d) if d is not None else u) for t, u, d in zip(tensors, one, dims, strict=True)]
        got = torch.func.vmap(function, dims)(*args)
        expected = torch.func.vmap(definition, dims)(*(t.double() for t in args))
        close(got, expected, name=str(mapped))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_per_sample_gradients(device, name):
    function, definition, count = FUNCTIONS[name]
    tensors = list(function_operands(name, device, batch=(3,), factor_batch=()))

    def per_sample(f, args):
        loss = lambda *t: f(*t).sin().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss, tuple(range(count))), (0, *[None] * (count - 1)))(*args)

    got, expected = per_sample(function, tensors), per_sample(definition, [t.double() for t in tensors])
    for i in range(count):
        assert got[i].shape[0] == 3
        close(got[i], expected[i], name=str(i))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(device, name):
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    tensors = function_operands(name, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def run(f):
        inputs = leaves(tensors)
        y = f(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for a, b in zip(run(function), run(compiled), strict=True):
        assert torch.equal(a, b)
    for off in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with off():
            assert torch.equal(compiled(*leaves(tensors)), function(*tensors))


def test_opcheck(device):
    x, left, right, bias, y = operands(RECTANGULAR, 3, torch.float32, device, (1,))
    bias = bias.expand(1, -1).contiguous()
    torch.library.opcheck(op._monarch, (x, left, right, bias, 13, "gelu"))
    torch.library.opcheck(op._monarch_backward, (y, x, left, right, bias, 13, "relu", [True, False, True, True]))
    torch.library.opcheck(op._transposed, (y, left, right, 11))
    torch.library.opcheck(op._transposed_backward, (x, y, left, right, 11, [False, True, True]))


def test_more_matrices_than_a_grid_has(device, monkeypatch):
    """Batches beyond the limit of a grid's axis are cut; with a small limit, an odd rest remains."""
    monkeypatch.setattr(op, "MOST_MATRICES", 2)
    *tensors, gy = operands(RECTANGULAR, 6, torch.float32, device, (5,))
    mine, right = leaves(tensors), leaves(tensors, torch.float64)
    y, expected = product(*mine, "gelu"), exact(*right, "gelu")
    close(y, expected)
    found = torch.autograd.grad(y, mine, gy)
    for name, g, e in zip(
        ("x", "left", "right", "bias"), found, torch.autograd.grad(expected, right, gy.double()), strict=True
    ):
        close(g, e, name=name)
    _, left, right, _ = tensors
    close(
        monarch_transposed(gy, left, right, RECTANGULAR[7], backend="triton"),
        reference.monarch_transposed(gy.double(), left.double(), right.double(), RECTANGULAR[7]),
    )
