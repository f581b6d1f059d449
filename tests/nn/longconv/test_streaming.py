"""Input that comes piece by piece: the same outputs, states that can be copied, reordered and slid."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv
from structmat.testing import assert_close

double = torch.float64
FILTERS = {
    "implicit": lambda n, d: ImplicitFilter(3, n, dtype=d),
    "explicit": lambda n, d: ExplicitFilter(3, n, dtype=d),
    "window": lambda n, d: ExplicitFilter(3, 5, extend="zero", dtype=d),
    "one tap": lambda n, d: ExplicitFilter(3, 1, extend="zero", dtype=d),
    "tile": lambda n, d: ImplicitFilter(3, 7, extend="tile", dtype=d),
}


class ComplexTaps(nn.Module):
    """Taps of a complex exponential, shared by all channels."""

    def forward(self, length):
        return torch.exp(torch.arange(length, dtype=double) * (0.5j - 0.1)).view(1, 1, -1)


def stream(layer, pieces, u, pre=None, post=None, **options):
    """Outputs and final state; pieces of length -1 are steps."""
    state, start, outputs = None, 0, []
    for piece in pieces:
        here = [None if v is None else v[..., start : start + abs(piece)] for v in (u, pre, post)]
        if piece < 0:
            columns = [None if v is None else v[..., 0] for v in here]
            y, state = layer.step(columns[0], state, *columns[1:])
            y = y.unsqueeze(-1)
        else:
            y, state = layer.prefill(here[0], state, *here[1:], **({} if state else options))
        outputs.append(y)
        start += abs(piece)
        assert state.position == start
    return torch.cat([u[..., :0], *outputs], -1), state


@pytest.mark.parametrize("make", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(double, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("algorithm", ["fft", "monarch"])
@given(pieces=st.lists(st.sampled_from([-1, -1, 0, 1, 2, 3, 11]), min_size=1, max_size=12), gates=st.booleans())
def test_any_pieces(make, dtype, tolerance, algorithm, pieces, gates):
    pieces = [0, *pieces]  # of which the first one says how many there will be
    length = max(sum(map(abs, pieces)), 1)
    layer = LongConv(3, length, filter=make(length, dtype), algorithm=algorithm, dtype=dtype)
    u, pre, post = torch.randn(3, 2, 3, sum(map(abs, pieces)), dtype=dtype).unbind(0)
    gated = (pre, post) if gates else ()
    with torch.no_grad():
        y, _ = stream(layer, pieces, u, *gated, max_length=length)
        assert_close(y, layer(u, *gated), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(dtype, autocast):
    layer = LongConv(3, 50)
    u, pre, post = torch.randn(3, 2, 3, 50).to(dtype).unbind(0)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        y, state = stream(layer, [20, -1, 7, *[-1] * 22], u, pre, post)
        whole = layer(u, pre, post)
    assert y.dtype == dtype and state.history.dtype == torch.float32
    # Rounded once each, from float32 numbers that agree.
    assert ((y - whole).abs() > 0).float().mean() < 0.01
    assert_close(y, whole, torch.finfo(dtype).eps / 2)


def test_long_generation_in_float32():
    layer = LongConv(4, 2000)
    u = torch.randn(1, 4, 2000)
    with torch.no_grad():
        y, _ = stream(layer, [1000, *[-1] * 1000], u)
        assert_close(y, layer(u), 1e-5)
        assert (y - layer(u)).abs().max() < 1e-5 * layer(u).abs().max()


def test_a_window_slides_in_a_bounded_buffer():
    layer = LongConv(2, 10, filter=ExplicitFilter(2, 10, extend="zero", dtype=double), dtype=double)
    u = torch.randn(3, 2, 500, dtype=double)
    with torch.no_grad():
        y, state = stream(layer, [30, *[-1] * 470], u)
        assert_close(y, layer(u), 1e-12)
    assert state.history.shape[-1] <= 64 and state.limit == -1


@pytest.mark.parametrize("length", [4, 300])
@pytest.mark.parametrize("most", [None, 3, 300])
def test_a_window_is_as_long_as_its_filter(length, most):
    layer = LongConv(2, length, filter=ExplicitFilter(2, 100, extend="zero", dtype=double), dtype=double)
    u = torch.randn(3, 2, 1200, dtype=double)
    with torch.no_grad():
        y, state = stream(layer, [150, 400, 30, -1, 99, 120, 100, *[-1] * 300], u[..., :1200], max_length=most)
        assert_close(y, layer(u), 1e-12)
        assert state.history.shape[-1] <= 200  # two windows
        place = state.history.data_ptr()
        for column in torch.randn(250, 3, 2, dtype=double):
            _, state = layer.step(column, state)
    assert state.history.data_ptr() == place  # inputs move to the front, nothing is allocated


def test_a_clone_goes_its_own_way():
    layer = LongConv(3, 20, dtype=double)
    u, other = torch.randn(2, 2, 3, 20, dtype=double)
    other[..., :8] = u[..., :8]
    with torch.no_grad():
        _, state = layer.prefill(u[..., :8])
        states = [state, state.clone()]
        for t in range(8, 20):
            for i, v in enumerate((u, other)):
                y, states[i] = layer.step(v[..., t], states[i])
                assert_close(y, layer(v)[..., t], 1e-12)


def test_mapped_pieces():
    layer, u = LongConv(3, 80, dtype=double), torch.randn(4, 2, 3, 80, dtype=double)

    def pieces(u):
        return stream(layer, [5, 3, -1, 71], u)[0]

    with torch.no_grad():
        assert_close(torch.func.vmap(pieces)(u), layer(u), 1e-12)


def test_the_buffer_is_seldom_made_anew():
    layer = LongConv(2, 1000)
    u = torch.randn(1, 2, 1000)
    places, state = set(), None
    with torch.no_grad():
        for column in u.unbind(-1):
            _, state = layer.step(column, state)
            places.add((state.history.data_ptr(), state.history.shape[-1]))
    assert len(places) == 5 and min(places, key=lambda p: p[1])[1] == 64 and state.history.shape[-1] == 1000


def test_the_filter_is_computed_once():
    calls = []
    layer = LongConv(2, 30)
    layer.filter.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        stream(layer, [10, *[-1] * 10, 10], torch.randn(1, 2, 30))
    assert len(calls) == 1


def test_a_beam_is_reordered():
    layer = LongConv(3, 20, dtype=double)
    u = torch.randn(4, 3, 20, dtype=double)
    index = torch.tensor([3, 0, 0, 2, 1])
    with torch.no_grad():
        _, state = layer.prefill(u[..., :12])
        beam, other = state.reorder(index), state.clone()
        y, beam = layer.prefill(u[index][..., 12:], beam)
        assert_close(y, layer(u[index])[..., 12:], 1e-12)
        # The others have not moved on.
        for s in (state, other):
            assert s.position == 12
            y, s = layer.step(u[..., 12], s)
            assert_close(y, layer(u)[..., 12], 1e-12)


def test_a_state_is_a_pytree_and_can_be_copied():
    layer = LongConv(3, 20)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn(2, 3, 5))
        leaves, spec = pytree.tree_flatten(state)
        assert [leaf.shape for leaf in leaves] == [(3, 20), (2, 3, 20)]
        again = pytree.tree_unflatten(leaves, spec)
        assert (again.position, again.end, again.limit) == (5, 5, 20)
        copied = copy.deepcopy(state)
        x = torch.randn(2, 3)
        assert_close(layer.step(x, copied)[0], layer.step(x, state)[0], 0)


def test_without_batch_and_with_two_batch_dimensions():
    layer = LongConv(3, 20, dtype=double)
    for batch in [(), (2, 4), (0,)]:
        u = torch.randn(*batch, 3, 20, dtype=double)
        with torch.no_grad():
            y, _ = stream(layer, [8, -1, -1, 10], u)
        assert y.shape == u.shape
        if u.numel():
            assert_close(y, layer(u), 1e-12)


def test_complex_taps_and_inputs():
    layer = LongConv(3, 20, filter=ComplexTaps(), dtype=double)
    for dtype in (double, torch.complex128):
        u = torch.randn(2, 3, 20, dtype=dtype)
        with torch.no_grad():
            y, _ = stream(layer, [0, 8, -1, -1, 10], u)
            assert_close(y, layer(u), 1e-12)
    layer, u = LongConv(3, 20, dtype=double), torch.randn(2, 3, 20, dtype=double)
    gate = torch.randn(2, 3, 20, dtype=torch.complex128)
    for gates in [(gate, None), (None, gate)]:
        with torch.no_grad():
            y, _ = stream(layer, [8, -1, 11], u, *gates)
            assert_close(y, layer(u, *gates), 1e-12)
    with torch.no_grad(), pytest.raises(ValueError, match=r"state must be of inputs .* of torch.complex128"):
        layer.prefill(u[..., 8:], layer.prefill(u[..., :8])[1], gate[..., 8:])


def test_the_first_piece_has_gradients_and_later_ones_refuse():
    layer = LongConv(3, 20, dtype=double)
    u = torch.randn(2, 3, 20, dtype=double, requires_grad=True)
    y, state = layer.prefill(u, None, u)
    whole = layer(u, u)
    inputs = [u, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs), strict=True
    ):
        assert_close(a, b, 1e-10)
    assert not state.history.requires_grad and not state.taps.requires_grad
    _, state = layer.prefill(u[..., :5])
    with pytest.raises(RuntimeError, match="u requires grad, but a state holds no graph"):
        layer.prefill(u[..., 5:], state)
    with pytest.raises(RuntimeError, match="post_gate requires grad"):
        layer.step(u[..., 5].detach(), state, None, u[..., 5])
    assert state.position == 5
    y, _ = layer.step(u[..., 5].detach(), state)  # parameters that require grad do not matter
    assert not y.requires_grad
    assert_close(y, layer(u)[..., 5], 1e-12)


def test_works_under_inference_mode():
    layer = LongConv(3, 20, dtype=double)
    u = torch.randn(2, 3, 20, dtype=double)
    with torch.inference_mode():
        y, _ = stream(layer, [8, *[-1] * 12], u)
    assert_close(y.clone(), layer(u), 1e-12)


def test_a_compiled_step():
    layer = LongConv(3, 40, dtype=double)
    u = torch.randn(2, 3, 40, dtype=double)
    step = torch.compile(layer.step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        _, state = layer.prefill(u[..., :30])
        for t in range(30, 34):
            y, state = step(u[..., t], state)
            assert_close(y, layer(u)[..., t], 1e-12)


def test_errors():
    layer, u = LongConv(3, 20), torch.randn(2, 3, 20)
    _, state = layer.prefill(u)
    _, early = layer.prefill(u[..., :0])
    cast = copy.deepcopy(layer).double()
    circular = LongConv(3, 20, mode="circular")
    resampled = LongConv(3, 20, filter=ImplicitFilter(3, 20, extend="resample"))
    for call, error, message in [
        (lambda: layer.step(u[..., 0], state), ValueError, "the state has room for 20 inputs, got 1 after 20"),
        (lambda: layer.prefill(u, None, max_length=10), ValueError, "the state has room for 10 inputs, got 20 after 0"),
        (lambda: layer.prefill(u, max_length=30), ValueError, "length must be at most 20, the length of the filter"),
        (lambda: layer.prefill(u, state, max_length=30), ValueError, "max_length is for the first piece"),
        (lambda: resampled.prefill(u, max_length=30), ValueError, "max_length must be at most 20, got 30"),
        (lambda: circular.prefill(u), ValueError, 'only mode="causal" streams'),
        (lambda: circular.step(u[..., 0]), ValueError, 'only mode="causal" streams'),
        (lambda: layer.step(u, state), ValueError, "u must have 3 channels in dimension -1"),
        (lambda: layer.step(u[:1, :, 0], state), ValueError, r"state must be of inputs \(1, 3\) of torch.float32"),
        (lambda: layer.prefill(u.double(), state), ValueError, "state must be of inputs"),
        (lambda: layer.prefill(u.double()), TypeError, "u has torch.float64"),
        (lambda: layer.step(u[..., 0].double()), TypeError, "k has dtype torch.float32 but u has torch.float64"),
        (lambda: layer.step(u[..., 0].to("meta"), state), ValueError, "on meta, got .* on cpu"),
        (lambda: cast.step(u[..., 0], early), TypeError, "skip has dtype torch.float64 but u has torch.float32"),
        (lambda: cast.prefill(u, early), TypeError, "skip has dtype torch.float64 but u has torch.float32"),
        (lambda: layer.step(u[..., 0], (state,)), TypeError, "state must be a LongConvState or None, got tuple"),
        (lambda: layer.prefill(u, state, [1.0]), TypeError, "pre_gate must be a torch.Tensor, got list"),
        (lambda: layer.step(u[..., 0], None, u), ValueError, "pre_gate must have shape"),
        (lambda: layer.step(u[..., 0], early, None, u), ValueError, "post_gate must have shape"),
        (lambda: layer.step(u[..., 0].int()), TypeError, "u must be floating point"),
        (lambda: layer.prefill(u[0])[1].reorder(torch.tensor([0])), ValueError, "reorder needs a batch"),
    ]:
        with pytest.raises(error, match=message):
            call()
