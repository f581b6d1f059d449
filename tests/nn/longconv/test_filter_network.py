"""Implicit filters whose directions are computed together: values and gradients of the networks one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structmat.nn import ImplicitFilter, MonarchLinear
from structmat.testing import assert_close, relative_error

double = torch.float64
SIZES = [
    {"directions": 1},
    {"directions": 2},
    {"directions": 2, "depth": 1, "features": 3, "shift": 0.25},
    {"directions": 1, "depth": 2, "features": 9},
    {"directions": 2, "depth": 4, "width": 1},
]


def one_by_one(f, length):
    """The definition, layer by layer and direction by direction; positions as the filter extends them."""
    z, t = f.z[0], f.t[0]
    if length > f.length and f.extend == "tile":
        z = z.repeat(-(-length // f.length), 1)
        t = torch.arange(length, dtype=t.dtype)[:, None] / (f.length - 1)
    elif length > f.length and f.extend == "resample":
        z, t = (F.interpolate(x.mT[None], size=length, mode="linear", align_corners=True)[0].mT for x in (z, t))
    z, t = z[:length], t[:length]
    taps = []
    for mlp in f.mlps:
        *hidden, last = mlp
        h = z
        for layer in hidden:
            h = torch.sin(f.frequency * layer(h))
        taps.append((last(h) * (torch.exp(-t * f.deltas[0].abs()) + f.shift)).mT)
    return F.pad(torch.stack(taps), (0, length - len(z)))


def stirred(f):
    """With biases, positions and frequencies that all matter."""
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return f


@pytest.mark.parametrize("options", SIZES, ids=str)
@pytest.mark.parametrize(
    ("extend", "length"), [("error", 11), ("error", 4), ("zero", 30), ("tile", 30), ("resample", 17)]
)
def test_values_and_gradients(options, extend, length):
    f = stirred(ImplicitFilter(5, 11, extend=extend, dtype=double, **{"width": 6, **options}))
    found, wanted = f(length), one_by_one(f, length)
    assert found.shape == (f.directions, 5, length) and found.is_contiguous()
    assert_close(found, wanted, 1e-12)
    direction = torch.randn_like(wanted)
    inputs = list(f.parameters())
    names = [name for name, _ in f.named_parameters()]
    grads = (torch.autograd.grad(y, inputs, direction) for y in (found, wanted))
    for name, g, w in zip(names, *grads, strict=True):
        assert w.norm() > 0 and relative_error(g, w) <= 1e-11, name


@pytest.mark.parametrize("directions", [1, 2])
def test_single_precision_is_as_good_as_one_by_one(directions):
    f = stirred(ImplicitFilter(48, 300, directions=directions))
    exact = ImplicitFilter(48, 300, directions=directions, dtype=double)
    exact.load_state_dict(f.state_dict())
    wanted = one_by_one(exact, 300)
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, list(exact.parameters()), direction)
    results = []
    for y in (f(), one_by_one(f, 300)):
        grads = torch.autograd.grad(y, list(f.parameters()), direction.float())
        results.append([relative_error(a, b) for a, b in zip([y, *grads], [wanted, *gradients], strict=True)])
    for together, apart in zip(*results, strict=True):
        assert together <= 2 * apart + 1e-6


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_of_another_kind(which):
    """In one direction only, with and without other sizes of parameters: it is called."""
    for replace in (MonarchLinear(6, 6, nblocks=2), nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))):
        f = stirred(ImplicitFilter(5, 11, directions=2, width=6, dtype=double))
        f.mlps[which][1] = replace.double()
        assert_close(f(), one_by_one(f, 11), 1e-12)
        f().square().sum().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in f.parameters())


def test_a_dense_layer_without_a_bias():
    f = stirred(ImplicitFilter(5, 11, directions=2, width=6, dtype=double))
    f.mlps[1][0] = nn.Linear(5, 6, bias=False, dtype=double)
    assert_close(f(), one_by_one(f, 11), 1e-12)
    f.mlps[0][-1] = nn.Linear(6, 5, dtype=double)
    assert_close(f(), one_by_one(f, 11), 1e-12)


def test_parameters_of_many_filters():
    """vmap over parameters, per-sample gradients, and second derivatives."""
    f = stirred(ImplicitFilter(2, 4, directions=2, width=3, depth=2, features=3, frequency=1.0, dtype=double))
    many = {name: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=double) for name, p in f.named_parameters()}

    def taps(params):
        return torch.func.functional_call(f, params, ())

    mapped = torch.func.vmap(taps)(many)
    grads = torch.func.vmap(torch.func.grad(lambda params: taps(params).square().sum()))(many)
    for i in range(3):
        single = {name: p[i].clone().requires_grad_() for name, p in many.items()}
        assert_close(mapped[i], taps(single), 1e-12)
        wanted = torch.autograd.grad(taps(single).square().sum(), list(single.values()))
        for name, w in zip(single, wanted, strict=True):
            assert_close(grads[name][i], w, 1e-10)
    names = list(many)
    leaves = [many[name][0].clone().requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(lambda *ps: taps(dict(zip(names, ps, strict=True))), leaves)


def test_autocast_and_half_precision_round_nothing():
    f = stirred(ImplicitFilter(5, 11, directions=2))
    plain = f()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(), plain)
    assert torch.equal(f.bfloat16()(), plain)


def test_buffers_left_in_single_precision():
    """As where parameters alone are cast."""
    f = stirred(ImplicitFilter(5, 11, directions=2, dtype=double))
    wanted = f()
    f.t, f.deltas = f.t.float(), f.deltas.float()
    assert f().dtype == double
    assert_close(f(), wanted, 1e-6)
