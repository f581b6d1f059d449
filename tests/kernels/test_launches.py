"""Kept launches: the same kernel, sizes and constants as Triton's own call, and never what was compiled for others."""

import pytest
import torch

from structmat_kernels import launches
from structmat_kernels.launches import Launch, launch
from structmat_kernels.monarch import monarch, reference


class Recorder:
    """A Triton kernel and its compiled form, which note how they are called."""

    arg_names = ("a", "b", "n", "scale", "TILE", "WIDE")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def first(*args, **constants):
            self.calls.append(("kernel", grid, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]))
            assert constants == {"WIDE": True, "TILE": 16, "num_warps": 2}
            return Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.calls.append(("compiled", grid, list(args)))


CONSTANTS = {"WIDE": True, "TILE": 16, "num_warps": 2}


def aligned(count=8, dtype=torch.float32, offset=0):
    """A tensor whose address is ``offset`` bytes past a multiple of 16."""
    whole = torch.zeros(count + 32, dtype=dtype)
    start = (-whole.data_ptr() % 16 + offset) // dtype.itemsize
    return whole[start : start + count]


def test_the_compiled_kernel_has_the_same_arguments():
    kernel, (a, b, c) = Recorder(), (aligned() for _ in range(3))
    run = Launch(kernel, (3, 2), (8, 0.5), **CONSTANTS)
    run(a, b)
    run(c, a)
    assert kernel.calls == [
        ("kernel", (3, 2, 1), [a.data_ptr(), b.data_ptr(), 8, 0.5]),
        ("compiled", (3, 2, 1), [c.data_ptr(), a.data_ptr(), 8, 0.5, 16, True]),
    ]


def test_odd_addresses_are_triton_s_business():
    """What was compiled for addresses that are multiples of 16 does not run on others, nor the other way round."""
    kernel, a, odd = Recorder(), aligned(), aligned(offset=4)
    run = Launch(kernel, (1,), (8, 0.5), **CONSTANTS)
    for pair in ((a, odd), (a, a), (a, odd), (a, a)):
        run(*pair)
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel", "kernel", "compiled"]


def test_everything_that_a_kernel_is_compiled_for_tells_launches_apart():
    kernel, a, half = Recorder(), aligned(), aligned(dtype=torch.float16)
    variants = [
        ((a, a), (8, 0.5), (1,)),
        ((a, half), (8, 0.5), (1,)),
        ((a, a), (9, 0.5), (1,)),
        ((a, a), (8, 0.5), (2,)),
    ]
    for _ in range(2):
        for tensors, scalars, grid in variants:
            launch(kernel, grid, tensors, scalars, **CONSTANTS)
    assert [name for name, *_ in kernel.calls] == ["kernel"] * 4 + ["compiled"] * 4
    for usual, kept in zip(kernel.calls[:4], kernel.calls[4:], strict=True):
        assert usual[1:] == (kept[1], kept[2][:-2])


class OutOfResources(Exception):
    pass


def test_what_does_not_fit_gives_way_to_what_does():
    built = []

    def build(config):
        built.append(config["size"])

        def plan(x):
            if config["size"] > 2:
                raise OutOfResources(f"{config['size']} is more than 2")
            if config["size"] == 0:
                raise ValueError("nothing left")
            return config["size"] * x

        return plan

    run = launches.Preferences([{"size": size} for size in (4, 3, 2, 1)], build)
    assert [run(10), run(5)] == [20, 10] and built == [4, 3, 2]
    with pytest.raises(OutOfResources, match="3 is more"):
        launches.Preferences([{"size": 4}, {"size": 3}], build)(1)
    with pytest.raises(ValueError, match="nothing left"):  # other errors are no reason to go on
        launches.Preferences([{"size": 0}, {"size": 1}], build)(1)


def test_sizes_without_a_device():
    cpu = torch.device("cpu")
    assert launches.processors(cpu) == 2 and launches.shared_memory(cpu) == 232_448
    assert launches.arithmetic(torch.float32)["PREC"] in ("ieee", "tf32")


@pytest.fixture
def layer(device):
    """Factors of a Monarch matrix of 12 x 12 and a maker of inputs."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return draw(3, 4, 4).requires_grad_(), draw(3, 4, 4).requires_grad_(), draw


def test_inputs_at_any_address(layer):
    """The same sizes, once at addresses that suit the compiled kernel and once at others."""
    left, right, draw = layer
    for offset in (0, 0, 1, 0, 3, 1):
        flat = draw(5 * 12 + 8)
        x = flat[offset : offset + 60].view(5, 12).requires_grad_()
        y = monarch(x, left, right, 12, backend="triton")
        grads = torch.autograd.grad(y.square().sum(), (x, left, right))
        exact = [t.detach().double().requires_grad_() for t in (x, left, right)]
        expected = reference.monarch(*exact, 12)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
        for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
            assert (got.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("view", ["contiguous", "transposed", "sliced", "expanded"])
def test_leading_dimensions_of_inputs(layer, view):
    left, right, draw = layer
    x = {
        "contiguous": lambda: draw(2, 3, 5, 12),
        "transposed": lambda: draw(3, 2, 5, 12).transpose(0, 1),
        "sliced": lambda: draw(2, 3, 5, 30)[..., 1:25:2],
        "expanded": lambda: draw(3, 1, 12).expand(2, 3, 5, 12),
    }[view]()
    x.requires_grad_()
    bias = draw(11)
    y = monarch(x, left, right, 11, bias, "gelu", backend="triton")
    assert y.shape == (2, 3, 5, 11)
    gy = draw(2, 3, 5, 11)
    exact = [t.detach().double().requires_grad_() for t in (x, left, right)]
    expected = reference.monarch(*exact, 11, bias.double(), "gelu")
    assert (y.double() - expected).norm() <= 5e-6 * expected.norm()
    for direction in (gy, gy[:1, :1, :1].expand_as(gy), gy.transpose(0, 1).contiguous().transpose(0, 1)):
        got = torch.autograd.grad(y, (x, left, right), direction, retain_graph=True)
        want = torch.autograd.grad(expected, exact, direction.double(), retain_graph=True)
        for g, e in zip(got, want, strict=True):
            assert g.shape == e.shape and (g.double() - e).norm() <= 1e-5 * e.norm()


def test_second_derivatives_of_one_tensor_in_two_places(layer):
    """Each place has a gradient of its own, of whatever order."""
    factor, _, draw = layer
    x = draw(5, 12).requires_grad_()

    def second(run, *tensors):
        grads = torch.autograd.grad(run(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    got = second(lambda x, f: monarch(x, f, f, 12, backend="triton"), x, factor)
    exact = [t.detach().double().requires_grad_() for t in (x, factor)]
    want = second(lambda x, f: reference.monarch(x, f, f, 12), *exact)
    for g, e in zip(got, want, strict=True):
        assert (g.double() - e).norm() <= 1e-5 * e.norm()
