"""Steps by relaxed multiplication: the outputs of the whole convolution, at a lower cost."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv
from structmat.nn.longconv import RelaxedState, relaxed
from structmat.testing import assert_close

double = torch.float64
FILTERS = {
    "implicit": lambda n, d: ImplicitFilter(3, n, dtype=d),
    "shared": lambda n, d: ExplicitFilter(1, n, dtype=d),
    "short": lambda n, d: Short(d),
    "window": lambda n, d: ExplicitFilter(3, 5, extend="zero", dtype=d),
    "wide window": lambda n, d: ExplicitFilter(3, 37, extend="zero", dtype=d),
    "one tap": lambda n, d: ExplicitFilter(3, 1, extend="zero", dtype=d),
    "tile": lambda n, d: ImplicitFilter(3, 7, extend="tile", dtype=d),
}


class Short(nn.Module):
    """Nine taps, for any length."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3, 9, dtype=dtype))

    def forward(self, length):
        return self.weight


class ComplexTaps(nn.Module):
    def forward(self, length):
        return torch.exp(torch.arange(length, dtype=double) * (0.5j - 0.1)).view(1, 1, -1)


def stream(layer, pieces, u, *gates, **options):
    """Outputs and final state; pieces of length -1 are steps."""
    y, state = layer.prefill(u[..., :0], None, *(g[..., :0] for g in gates), relaxed=True, **options)
    start, outputs = 0, [y]
    for piece in pieces:
        if piece < 0:
            y, state = layer.step(u[..., start], state, *(g[..., start] for g in gates))
            y = y.unsqueeze(-1)
        else:
            here = slice(start, start + piece)
            y, state = layer.prefill(u[..., here], state, *(g[..., here] for g in gates))
        start += abs(piece)
        assert isinstance(state, RelaxedState) and state.position == start
        outputs.append(y)
    return torch.cat(outputs, -1), state


@pytest.mark.parametrize("make", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(double, 1e-12), (torch.float32, 2e-6)], ids=str)
@given(
    runs=st.lists(st.tuples(st.sampled_from([0, 1, 2, 11, 30]), st.integers(0, 45)), min_size=1, max_size=4),
    base=st.sampled_from([1, 2, 4, 64]),
    gates=st.booleans(),
)
def test_any_pieces(make, dtype, tolerance, runs, base, gates):
    pieces = [piece for prompt, steps in runs for piece in [prompt, *[-1] * steps]]
    length = sum(map(abs, pieces))
    layer = LongConv(3, max(length, 1), filter=make(max(length, 1), dtype), dtype=dtype)
    u, pre, post = torch.randn(3, 2, 3, length, dtype=dtype).unbind(0)
    gated = (pre, post) if gates else ()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(relaxed, "BASE", base)
        y, _ = stream(layer, pieces, u, *gated, max_length=max(length, 1))
        assert y.shape == u.shape and y.dtype == dtype
        if length:
            assert_close(y, layer(u, *gated), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(double, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("prompt", [0, 1, 777])
def test_long_generation(dtype, tolerance, prompt):
    layer = LongConv(2, 2001, dtype=dtype)
    u = torch.randn(1, 2, 2001, dtype=dtype)
    with torch.no_grad():
        y, _ = stream(layer, [prompt, *[-1] * (2001 - prompt)], u)
        assert_close(y, layer(u), tolerance)


def test_far_fewer_products_than_direct_sums(monkeypatch):
    """Of 4096 steps: what is read directly, and the sizes of all transforms."""
    read, transformed = [], []
    last, share = RelaxedState._last, RelaxedState._share

    def counting_last(self, count):
        read.append(min(count, self.end))
        return last(self, count)

    def counting_share(self, count, size):
        transformed.append(min(count, self.end) + size)
        return share(self, count, size)

    monkeypatch.setattr(RelaxedState, "_last", counting_last)
    monkeypatch.setattr(RelaxedState, "_share", counting_share)
    layer = LongConv(1, 4096, filter=ExplicitFilter(1, 4096))
    u = torch.randn(1, 4096)
    with torch.no_grad():
        y, _ = stream(layer, [-1] * 4096, u)
        assert_close(y, layer(u), 1e-6)
    # On average 32.5 inputs a step. Blocks of 64 2^j, each 2048 / (64 2^j) times: 4096 numbers a level, of six levels.
    assert sum(read) == 4096 * 65 // 2 and sum(transformed) == 4096 + 6 * 4096


def test_a_window_slides_in_bounded_memory():
    layer = LongConv(2, 100, filter=ExplicitFilter(2, 100, extend="zero", dtype=double), dtype=double)
    u = torch.randn(3, 2, 1000, dtype=double)
    with torch.no_grad():
        y, state = stream(layer, [130, *[-1] * 870], u)
        assert_close(y, layer(u), 1e-12)
    assert state.history.shape[-1] <= 200 and state.pending.shape[-1] == 128


def test_what_is_left_decides_how_much_is_prepared():
    layer, u = LongConv(2, 5000), torch.randn(2, 5000)
    with torch.no_grad():
        _, state = layer.prefill(u[..., :4800], relaxed=True)
        assert state.pending.shape == (2, 0)  # of several pieces the last one counts
        _, state = layer.step(u[..., 4800], state)
    assert state.pending.shape == (2, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(dtype, autocast):
    layer = LongConv(3, 200)
    u = torch.randn(2, 3, 200).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        y, state = stream(layer, [20, *[-1] * 180], u)
        whole = layer(u)
    assert y.dtype == dtype and state.pending.dtype == torch.float32
    assert ((y - whole).abs() > 0).float().mean() < 0.01
    assert_close(y, whole, torch.finfo(dtype).eps / 2)


def test_complex_taps_inputs_and_gates():
    layer, u = LongConv(3, 150, filter=ComplexTaps(), dtype=double), torch.randn(2, 3, 150, dtype=double)
    plain = LongConv(3, 150, dtype=double)
    gate = torch.randn(2, 3, 150, dtype=torch.complex128)
    with torch.no_grad():
        for conv, *given in [(layer, u), (layer, gate), (plain, u, gate), (plain, gate)]:
            y, _ = stream(conv, [8, *[-1] * 142], *given)
            assert_close(y, conv(*given), 1e-12)


def test_other_batches_copies_and_beams(monkeypatch):
    monkeypatch.setattr(relaxed, "BASE", 4)
    layer = LongConv(3, 60, dtype=double)
    for batch in [(), (2, 4), (0,)]:
        u = torch.randn(*batch, 3, 60, dtype=double)
        with torch.no_grad():
            y, _ = stream(layer, [8, *[-1] * 52], u)
        assert y.shape == u.shape and (u.numel() == 0 or torch.allclose(y, layer(u)))
    u = torch.randn(4, 3, 60, dtype=double)
    index = torch.tensor([3, 0, 0, 2, 1])
    with torch.no_grad():
        _, state = stream(layer, [10, *[-1] * 23], u)
        beam, clone, copied = state.reorder(index), state.clone(), copy.deepcopy(state)
        again = pytree.tree_unflatten(*pytree.tree_flatten(copied.clone()))
        for s, inputs in [(beam, u[index]), (state, u), (clone, u), (copied, u), (again, u)]:
            assert type(s) is RelaxedState and s.position == 33 and s.steps == 23
            for t in range(33, 60):
                y, s = layer.step(inputs[..., t], s)
                assert_close(y, layer(inputs)[..., t], 1e-12)


def test_mapped_and_under_inference_mode(monkeypatch):
    monkeypatch.setattr(relaxed, "BASE", 4)
    layer, u = LongConv(3, 40, dtype=double), torch.randn(4, 2, 3, 40, dtype=double)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda u: stream(layer, [5, *[-1] * 20, 3, *[-1] * 12], u)[0])(u)
        assert_close(mapped, layer(u), 1e-12)
    with torch.inference_mode():
        y, _ = stream(layer, [8, *[-1] * 32], u)
    assert_close(y.clone(), layer(u), 1e-12)


def test_a_compiled_step(monkeypatch):
    """A first step, one that prepares nothing, and one that prepares two outputs: three programs."""
    monkeypatch.setattr(relaxed, "BASE", 2)
    layer, u = LongConv(3, 40, dtype=double), torch.randn(2, 3, 40, dtype=double)
    step = torch.compile(layer.step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        _, state = layer.prefill(u[..., :30], relaxed=True)
        for t in range(30, 33):
            y, state = step(u[..., t], state)
            assert_close(y, layer(u)[..., t], 1e-12)


def test_gradients_and_errors():
    layer, u = LongConv(3, 20, dtype=double), torch.randn(2, 3, 20, dtype=double, requires_grad=True)
    y, state = layer.prefill(u[..., :12], relaxed=True)
    wanted = torch.autograd.grad(layer(u[..., :12]).square().sum(), u)[0]
    assert_close(torch.autograd.grad(y.square().sum(), u)[0], wanted, 1e-12)
    with pytest.raises(RuntimeError, match="u requires grad, but a state holds no graph"):
        layer.step(u[..., 12], state)
    assert state.steps == 0 and state.position == 12
    with pytest.raises(ValueError, match="relaxed is for the first piece, where there is no state yet"):
        layer.prefill(u.detach()[..., 12:], state, relaxed=True)
    with torch.no_grad():
        for t in range(12, 20):
            _, state = layer.step(u[..., t], state)
        with pytest.raises(ValueError, match="the state has room for 20 inputs, got 1 after 20"):
            layer.step(u[..., 0], state)
