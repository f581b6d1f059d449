"""Layers whose convolutions are computed by the kernels, in Triton's interpreter on a CPU."""

import pytest
import torch

from structmat.models.m2 import M2SequenceMixer
from structmat.nn import ExplicitFilter, LongConv
from structmat.nn.longconv import circular_convolution, functional
from structmat.testing import assert_close
from structmat_kernels import backend

pytest.importorskip("triton")


@pytest.fixture
def calls(monkeypatch):
    """The kernels are asked for; the shapes that come to them."""
    shapes, conv = [], functional.fft_conv

    def counted(u, *others, **options):
        shapes.append(tuple(u.shape))
        return conv(u, *others, **options)

    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    monkeypatch.setattr(functional, "fft_conv", counted)
    return shapes


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "circular"])
@pytest.mark.parametrize("taps", [5, 33, 100])
def test_layers_of_every_mode(mode, taps, calls, monkeypatch):
    directions = 2 if mode == "bidirectional" else 1
    layer = LongConv(3, 33, mode=mode, filter=ExplicitFilter(3, taps, directions=directions, extend="zero"))
    u, pre, post = torch.randn(3, 2, 3, 33).requires_grad_().unbind(0)
    y = layer(u, pre, post)
    found = torch.autograd.grad(y.square().sum(), [u, pre, post, *layer.parameters()])
    assert calls == [(2, 3, 33)]
    monkeypatch.setattr(backend, "_DEFAULT", "torch")
    wanted = layer(u, pre, post)
    assert_close(y, wanted, 2e-6)
    gradients = torch.autograd.grad(wanted.square().sum(), [u, pre, post, *layer.parameters()])
    for g, w in zip(found, gradients, strict=True):
        assert_close(g, w, 5e-6)
    assert calls == [(2, 3, 33)]


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 7), (2, 1), (9, 4), (9, 9), (9, 30)])
def test_circular_convolution(length, taps, calls, monkeypatch):
    u, k = torch.randn(2, 3, length), torch.randn(3, taps)
    y = circular_convolution(u, k)
    assert calls == [(2, 3, length)]
    monkeypatch.setattr(backend, "_DEFAULT", "torch")
    assert_close(y, circular_convolution(u.double(), k.double()), 2e-6)


def test_empty_pieces(calls):
    layer = LongConv(3, 20)
    u = torch.randn(2, 3, 20)
    with torch.no_grad():
        y, state = layer.prefill(u[..., :0])
        assert y.shape == (2, 3, 0) and layer(u[:0]).shape == (0, 3, 20)
        y, state = layer.prefill(u[..., :19], state)
        last, state = layer.step(u[..., 19], state)
    assert len(calls) == 1  # the piece with its past
    assert_close(torch.cat([y, last.unsqueeze(-1)], -1), layer(u), 2e-6)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_mixers_of_m2(mode, calls, monkeypatch):
    mixer, x = M2SequenceMixer(4, length=30, mode=mode), torch.randn(3, 29, 4)
    y = mixer(x)
    assert calls == [(3, 4, 29)] * 2  # with both gates where there are some, and the residual one
    monkeypatch.setattr(backend, "_DEFAULT", "torch")
    assert_close(y, mixer(x), 1e-5)
