"""ShortConv against nn.Conv1d, and piece by piece."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from structmat.nn import ShortConv
from structmat.testing import assert_close


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_conv1d(size, bias):
    layer = ShortConv(4, size, bias, dtype=torch.float64)
    conv = nn.Conv1d(4, 4, size, padding=size - 1, groups=4, bias=bias, dtype=torch.float64)
    conv.load_state_dict(layer.state_dict())
    for length in (1, 2, 9):
        x = torch.randn(2, 4, length, dtype=torch.float64)
        assert_close(layer(x), conv(x)[..., :length], 1e-12)
    assert_close(layer(x[0]), layer(x)[0], 1e-12)
    assert_close(layer(x.expand(3, 2, 4, 9))[1], layer(x), 1e-12)
    assert layer(x[:0]).shape == (0, 4, 9) and layer(x[..., :0]).shape == (2, 4, 0)


def test_initial_values_are_those_of_conv1d():
    torch.manual_seed(1)
    layer = ShortConv(4000, 3)
    conv = nn.Conv1d(4000, 4000, 3, groups=4000)
    for a, b in ((layer.weight, conv.weight), (layer.bias, conv.bias)):
        assert abs(a.std() / b.std() - 1) < 0.03 and abs(a.abs().max() / b.abs().max() - 1) < 0.01


@given(pieces=st.lists(st.integers(0, 5), min_size=1, max_size=6), size=st.integers(1, 4))
def test_pieces_and_steps(pieces, size):
    layer = ShortConv(3, size, dtype=torch.float64)
    x = torch.randn(2, 3, sum(pieces), dtype=torch.float64)
    for steps in (False, True):
        state, outputs = None, [x[..., :0]]
        for piece in x.split(pieces, -1):
            if steps:
                for column in piece.unbind(-1):
                    y, state = layer.step(column, state)
                    outputs.append(y.unsqueeze(-1))
            else:
                y, state = layer.prefill(piece, state)
                outputs.append(y)
        assert_close(torch.cat(outputs, -1), layer(x), 1e-12)
        assert (0 if state is None else state.position) == x.shape[-1]


def test_gradients_flow_through_the_state():
    layer = ShortConv(3, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    y, state = layer.prefill(x[..., :5])
    z, _ = layer.prefill(x[..., 5:], state)
    pieces = torch.autograd.grad(torch.cat([y, z], -1).square().sum(), x)[0]
    assert_close(pieces, torch.autograd.grad(layer(x).square().sum(), x)[0], 1e-12)


def test_state_can_be_reordered_and_is_a_pytree():
    layer = ShortConv(3, 3)
    x = torch.randn(4, 3, 8)
    _, state = layer.prefill(x[..., :5])
    index = torch.tensor([2, 2, 0, 1])
    y, _ = layer.prefill(x[index][..., 5:], state.reorder(index))
    assert_close(y, layer(x)[index][..., 5:], 1e-6)
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 1 and pytree.tree_unflatten(leaves, spec) == state


def test_a_state_keeps_no_more_than_it_needs():
    for size in (1, 2, 3):
        _, state = ShortConv(3, size).prefill(torch.randn(4, 3, 1000))
        assert state.history.shape == (4, 3, size - 1)
        assert state.history.untyped_storage().nbytes() == 4 * state.history.numel()


def test_autocast_and_copies():
    layer = ShortConv(3, 3)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert_close(copy.deepcopy(layer)(x), layer(x), 0)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_compiled():
    layer = ShortConv(3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(torch.ones(2, 3, 8)), layer(torch.ones(2, 3, 8)), 1e-6)


def test_errors():
    layer = ShortConv(3, 3)
    _, state = layer.prefill(torch.randn(2, 3, 8))
    for call, error, message in [
        (lambda: ShortConv(3, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: layer(torch.randn(2, 4, 8)), ValueError, "x must have 3 channels in dimension -2"),
        (lambda: layer([1.0]), TypeError, "x must be a torch.Tensor"),
        (lambda: layer.step(torch.randn(2, 3, 1)), ValueError, "x must have 3 channels in dimension -1"),
        (lambda: layer.step(torch.randn(5, 3), state), ValueError, r"state must have a history of shape \(5, 3, 2\)"),
        (lambda: layer.step(torch.randn(2, 3).double(), state), ValueError, "dtype torch.float64 for this x"),
        (lambda: layer.step(torch.randn(2, 3), (state,)), TypeError, "state must be a ShortConvState or None"),
        (lambda: layer.prefill(torch.randn(3, 8))[1].reorder(torch.tensor([2, 1, 0])), ValueError, "needs a batch"),
    ]:
        with pytest.raises(error, match=message):
            call()
