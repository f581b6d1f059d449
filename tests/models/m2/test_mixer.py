"""M2's sequence mixer: outputs and gradients of its formula, by plain PyTorch and by kernels, and what surrounds it."""

import pytest
import torch
import torch.nn.functional as F

import structmat as sm
from structmat.models.m2 import M2SequenceMixer
from structmat.models.m2 import mixer as mixer_module
from structmat.nn.longconv import long_convolution
from structmat.testing import assert_close, relative_error
from structmat_kernels import backend

double = torch.float64
KINDS = [
    {"mode": "causal", "residual": False},
    {"mode": "causal", "norm": True},
    {"mode": "bidirectional"},
    {"mode": "bidirectional", "residual": False, "norm": True},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def formula(mixer, x, mask=None):
    """out(x2 * long(x1 * v) + long'(x)) by other means than the module: nothing is fused, copied or left out."""
    dim, length = x.shape[-1], x.shape[1]
    keep = torch.ones(x.shape[:2]).to(x) if mask is None else mask.to(x)
    if mixer.norm is not None:
        x = F.layer_norm(x, (dim,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps)
    x = x * keep[..., None]
    columns = F.linear(x, mixer.project.weight, mixer.project.bias).mT * keep[:, None]
    short = F.conv1d(columns, mixer.short.weight, mixer.short.bias, padding=2, groups=3 * dim)[..., :length]
    x1, x2, v = short.chunk(3, 1)

    def convolution(layer, u):
        taps = layer.filter(length)
        return long_convolution(u, taps[0], taps[1] if len(taps) > 1 else None, layer.skip)

    y = x2 * convolution(mixer.long, v * x1 * keep[:, None])
    if mixer.residual is not None:
        y = y + convolution(mixer.residual, x.mT)
    return F.linear(y.mT, mixer.out.weight, mixer.out.bias)


def made(kind, stir, dtype=double, batch=3, length=17, dim=6, seed=0):
    torch.manual_seed(seed)
    mixer = stir(M2SequenceMixer(dim, length + 3, width=8, frequency=1.0, **kind).to(dtype))
    x = torch.randn(batch, length, dim, dtype=double)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 11:], mask[-1, :2], mask[-1, 7:8] = False, False, False
    return mixer, x, mask


def results(function, mixer, x, *args):
    x = x.clone().requires_grad_()
    y = function(x, *args)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=double)
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], direction.to(y.dtype))
    return [y.detach(), *grads]


@kinds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients(kind, masked, batch, stir):
    mixer, x, mask = made(kind, stir, batch=batch)
    args = (mask,) if masked else ()
    found = results(mixer, mixer, x, *args)
    wanted = results(lambda *a: formula(mixer, *a), mixer, x, *args)
    for f, w in zip(found, wanted, strict=True):
        assert w.norm() > 0 and relative_error(f, w) <= 1e-11


@kinds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 17), (3, 17), (2, 1)])
def test_by_kernels(kind, masked, batch, length, stir, monkeypatch):
    """With transposing copies where they are of use, in float32."""
    pytest.importorskip("triton")
    mixer, x, mask = made(kind, stir, batch=batch, length=length)
    args = (mask,) if masked and length > 2 else ()
    wanted = results(lambda *a: formula(mixer, *a), mixer, x, *args)
    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    copies, copy = [], mixer_module.transpose

    def counted(a, b=None, **options):
        copies.append((tuple(a.shape), b is not None))
        return copy(a, b, **options)

    monkeypatch.setattr(mixer_module, "transpose", counted)
    found = results(mixer.float(), mixer, x.float(), *args)
    for f, w in zip(found, wanted, strict=True):
        assert w.norm() == 0 or relative_error(f, w) <= 2e-5
    if length == 1:
        assert not copies
    elif mixer.residual is not None:
        assert copies == [((batch, 17, 6), False), ((batch, 6, 17), True)]
    else:
        assert copies == ([] if batch == 1 else [((batch, 6, 17), False)])


@kinds
def test_an_autocast_region(kind, stir):
    mixer, x, mask = made(kind, stir, torch.float32)
    exact, _, _ = made(kind, stir)
    wanted = results(lambda *a: formula(exact, *a), exact, x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(mixer, mixer, x.float(), mask)
    assert found[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found[1:])
    for f, w in zip(found, wanted, strict=True):
        assert relative_error(f, w) <= 3e-2


@pytest.mark.parametrize("kind", KINDS[1:3], ids=str)
def test_an_autocast_region_by_kernels(kind, stir, monkeypatch):
    """Of float16, which the interpreter rounds as a GPU does; the residual operand is cast as it is copied."""
    pytest.importorskip("triton")
    mixer, x, mask = made(kind, stir, torch.float32)
    exact, _, _ = made(kind, stir)
    wanted = results(lambda *a: formula(exact, *a), exact, x, mask)
    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    with torch.autocast("cpu", torch.float16):
        found = results(mixer, mixer, x.float(), mask)
    assert found[0].dtype == torch.float16 and all(g.dtype == torch.float32 for g in found[1:])
    for f, w in zip(found, wanted, strict=True):
        assert relative_error(f, w) <= 1e-2


@pytest.mark.parametrize("kernels", [False, True])
def test_second_derivatives(kernels, stir, monkeypatch):
    if kernels:
        pytest.importorskip("triton")
    mixer, x, _ = made({"mode": "bidirectional"}, stir, length=5, dim=2)
    x = x[:2]

    def second(function, x):
        x = x.clone().requires_grad_()
        inputs = [x, mixer.out.weight, mixer.long.skip]
        first = torch.autograd.grad(function(x).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    wanted = second(lambda x: formula(mixer, x), x)
    if kernels:
        monkeypatch.setattr(backend, "_DEFAULT", "triton")
        mixer.float()
    for f, w in zip(second(mixer, x.float() if kernels else x), wanted, strict=True):
        assert_close(f, w, 1e-4 if kernels else 1e-11)


@kinds
def test_compiled(kind, stir):
    torch._dynamo.reset()
    mixer, x, mask = made(kind, stir)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for f, w in zip(results(compiled, mixer, x, mask), results(mixer, mixer, x, mask), strict=True):
        assert_close(f, w, 1e-11)


@pytest.mark.parametrize("kernels", [False, True])
def test_pieces(kernels, stir, monkeypatch):
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, "_DEFAULT", "triton")
    mixer, x, mask = made({"mode": "causal"}, stir, torch.float32)
    x = x.float()
    with torch.no_grad():
        wanted = mixer(x, mask)
        state, found = None, []
        for start, stop in ((0, 9), (9, 10), (10, 17)):
            y, state = mixer.extend(x[:, start:stop], mask[:, start:stop], state)
            found.append(y)
    assert_close(torch.cat(found, 1), wanted, 1e-5)


@pytest.mark.parametrize("kernels", [False, True])
def test_hooks_see_both_projections(kernels, stir, monkeypatch):
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, "_DEFAULT", "triton")
    mixer, x, _ = made({"mode": "bidirectional"}, stir, torch.float32)
    seen = {}
    for name in ("project", "out"):
        module = getattr(mixer, name)
        module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
    y = mixer(x.float())
    assert set(seen) == {"project", "out"} and seen["out"][1] is y
    for name, (inputs, output) in seen.items():
        module = getattr(mixer, name)
        assert torch.equal(F.linear(inputs, module.weight, module.bias), output)


def test_structured_projections(stir, monkeypatch):
    pytest.importorskip("triton")
    kind = {"mode": "bidirectional", "structure": sm.MonarchConfig(nblocks=2)}
    mixer, x, _ = made(kind, stir, torch.float32)
    wanted = results(mixer, mixer, x.float())
    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    for f, w in zip(results(mixer, mixer, x.float()), wanted, strict=True):
        assert_close(f, w, 2e-5)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(4, 512), (3, 999), (1, 1024)])
def test_on_a_gpu(kind, dtype, batch, length, stir):
    """Outputs and gradients of the formula on the CPU, in an autocast region too."""
    mixer, x, _ = made(kind, stir, torch.float32, batch=batch, length=length, dim=192)
    exact, _, _ = made(kind, stir, batch=batch, length=length, dim=192)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    wanted = results(lambda *a: formula(exact, *a), exact, x.float().double(), mask)
    mixer, given = mixer.cuda(), x.float().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = mixer(given.requires_grad_(), mask.cuda())
    assert y.dtype == dtype
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=double).cuda().to(dtype)
    grads = torch.autograd.grad(y, [given, *mixer.parameters()], direction)
    for f, w in zip([y.detach(), *grads], wanted, strict=True):
        assert relative_error(f.cpu(), w) <= (1e-4 if dtype == torch.float32 else 4e-2)
