"""Taps that are kept for a while: how often filters run, and that nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv, cache_taps


class Counter:
    """How often the filters of a model's layers have run."""

    def __init__(self, model):
        self.calls = 0
        self.made = []
        for module in model.modules():
            if isinstance(module, LongConv):
                module.filter.register_forward_hook(self._count)

    def _count(self, module, args, taps):
        self.calls += 1
        self.made.append(weakref.ref(taps))


@pytest.fixture
def model():
    """Three layers, of which two share a filter."""
    layers = [LongConv(3, 12, mode="bidirectional"), LongConv(3, 12), LongConv(3, 12, filter="explicit")]
    layers[2].filter = layers[1].filter
    return nn.Sequential(*layers).eval()


def test_a_filter_runs_once_for_each_length(model):
    counter, inputs = Counter(model[:2]), [torch.randn(2, 3, n) for n in (12, 7, 12, 7, 12)]
    with torch.no_grad():
        wanted = [model(u) for u in inputs]
        plain, counter.calls = counter.calls, 0
        with cache_taps(model):
            found = [model(u) for u in inputs]
            assert counter.calls == 3 * 2
        assert plain == 3 * 5 and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
        model(inputs[0])
    assert counter.calls == 3 * 3


def test_taps_go_on_leaving(model):
    counter = Counter(model[:1])
    with torch.no_grad(), cache_taps(model):
        model(torch.randn(2, 3, 12))
        gc.collect()
        assert counter.made[0]() is not None
    gc.collect()
    assert counter.made[0]() is None


def test_parameters_may_change_outside(model):
    u = torch.randn(2, 3, 12)
    with torch.no_grad():
        with cache_taps(model):
            before = model(u)
        for parameter in model.parameters():
            parameter.mul_(2)
        wanted = copy.deepcopy(model)(u)
        with cache_taps(model):
            found = model(u)
    assert torch.equal(found, wanted) and not torch.equal(found, before)


def test_nested_contexts(model):
    counter, u = Counter(model), torch.randn(2, 3, 12)
    counter.calls = 0
    with torch.no_grad(), cache_taps(model[0]):
        with cache_taps(model):
            for _ in range(3):
                model[:2](u)
            first = counter.calls
        model[0](u)  # which the outer one still has
        assert counter.calls == first
        model[1](u)
        assert counter.calls > first
    before = counter.calls
    with torch.no_grad():
        model[0](u)
    assert counter.calls == before + 1


def test_contexts_that_end_in_another_order(model):
    counter, u = Counter(model[:1]), torch.randn(2, 3, 12)
    first, second = cache_taps(model), cache_taps(model[0])
    with torch.no_grad():
        first.__enter__()
        model[0](u)
        second.__enter__()
        first.__exit__(None, None, None)
        model[0](u)
        assert counter.calls == 1
        second.__exit__(None, None, None)
        model[0](u)
        assert counter.calls == 2


def test_an_exception_ends_it(model):
    counter, u = Counter(model[:1]), torch.randn(2, 3, 12)
    with torch.no_grad():
        with pytest.raises(ValueError, match="channels"), cache_taps(model):
            model(u)
            model(u[:, :2])
        model[0](u)
    assert counter.calls == 2


def test_training_is_left_alone(model):
    """Gradients that reach a filter, and training mode, in which a filter may drop taps."""
    counter, u = Counter(model[:1]), torch.randn(2, 3, 12)
    with cache_taps(model):
        with torch.no_grad():
            model[0](u)
        for _ in range(2):
            model.zero_grad()
            model[0](u).square().sum().backward()
            assert all(p.grad.norm() > 0 for p in model[0].parameters())
        assert counter.calls == 3
        model[0].filter.requires_grad_(False)
        v = u.clone().requires_grad_()
        model[0](v).square().sum().backward()
        assert counter.calls == 3 and v.grad.norm() > 0
    conv = LongConv(3, 12, filter=ExplicitFilter(3, 12, dropout=0.5))
    with torch.no_grad(), cache_taps(conv):
        assert not torch.equal(conv(u), conv(u))
        plain = conv.eval()(u)
        assert torch.equal(conv(u), plain)
        assert not torch.equal(conv.train()(u), plain)
        assert torch.equal(conv.eval()(u), plain)


def test_inference_mode_and_gradients_of_inputs(model):
    """Taps of inference mode cannot be saved for a backward pass."""
    u = torch.randn(2, 3, 12)
    model.requires_grad_(False)
    with cache_taps(model):
        with torch.inference_mode():
            wanted = model(u)
        v = u.clone().requires_grad_()
        y = model(v)
        y.square().sum().backward()
    assert torch.equal(y, wanted) and v.grad.norm() > 0


def test_an_autocast_region_has_taps_of_its_own():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, length):
            return (self.weight @ torch.ones(4, length)).unsqueeze(0)

    conv, u = LongConv(3, 12, filter=Rounded()).eval(), torch.randn(2, 3, 12)
    with torch.no_grad():
        plain = conv(u)
        with cache_taps(conv):
            with torch.autocast("cpu", torch.bfloat16):
                assert conv.taps().dtype == torch.bfloat16
            assert torch.equal(conv(u), plain)


def test_transforms_and_compilation(model):
    model = model[:2]  # functional_call does not restore modules that are there twice
    u = torch.randn(4, 2, 3, 12)
    params = {name: p.detach() for name, p in model.named_parameters()}
    scaled = {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}

    def call(params, u):
        return torch.func.functional_call(model, params, (u,))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = torch.stack([call({k: p[i] for k, p in scaled.items()}, u[0]) for i in range(2)])
        with cache_taps(model):
            model(u[0])
            torch.testing.assert_close(torch.func.vmap(call, (0, None))(scaled, u[0]), wanted)
            torch.testing.assert_close(torch.func.vmap(model)(u), model(u))
            torch.testing.assert_close(compiled(u[0]), model(u[0]))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(compiled(u[0]), model(u[0]))


def test_copies_take_no_taps_along(model):
    u = torch.randn(2, 3, 12)
    with torch.no_grad(), cache_taps(model):
        model(u)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(2)
        assert not torch.equal(other(u), model(u))


def test_streaming_uses_them():
    conv, u = LongConv(3, 12, filter=ImplicitFilter(3, 12)).eval(), torch.randn(2, 3, 12)
    counter = Counter(conv)
    with torch.no_grad():
        wanted = conv(u)
        with cache_taps(conv):
            for _ in range(2):
                first, state = conv.prefill(u[..., :8])
                last, state = conv.prefill(u[..., 8:], state)
                torch.testing.assert_close(torch.cat([first, last], -1), wanted)
    assert counter.calls == 2


def test_errors():
    with (
        pytest.raises(ValueError, match="model must have a LongConv whose taps can be kept, Linear has none"),
        cache_taps(nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(TypeError, match="model must be a module, got list"), cache_taps([]):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_captured_in_a_graph(model, warm):
    """With a call before, whose taps the graph reads; and without one, when nothing is kept of the capture."""
    model, u = model.cuda(), torch.randn(2, 3, 12, device="cuda")
    with torch.no_grad():
        for _ in range(2):
            wanted = model(u)
        counter = Counter(model[:1])
        with cache_taps(model):
            if warm:
                model(u)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(u)
            if not warm:
                torch.testing.assert_close(model(u), wanted)
            for _ in range(2):
                y.fill_(float("nan"))
                graph.replay()
                torch.cuda.synchronize()
                torch.testing.assert_close(y, wanted)
            assert counter.calls == (1 if warm else 2)
