"""LongConv: modes, algorithms, options, matrices, storage."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import structmat as sm
from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv
from structmat.testing import assert_close

double = torch.float64
WAYS = [
    ("causal", "fft", 2),
    ("causal", "monarch", 2),
    ("causal", "monarch", 3),
    ("bidirectional", "fft", 2),
    ("bidirectional", "monarch", 2),
    ("bidirectional", "butterfly", 2),
    ("bidirectional", "butterfly", 4),
    ("circular", "fft", 2),
    ("circular", "monarch", 3),
    ("circular", "butterfly", 3),
]
ways = pytest.mark.parametrize(("mode", "algorithm", "order"), WAYS, ids=str)


class FewTaps(nn.Module):
    """Ten taps whatever the length, one filter for all channels."""

    def __init__(self, directions, dtype=double):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(directions, 1, 10, dtype=dtype))

    def forward(self, length):
        return self.weight


def by_hand(dense, layer, u, pre=None, post=None):
    taps = layer.taps(u.shape[-1])
    taps = taps.expand(-1, layer.channels, -1)
    later = taps[1] if layer.mode == "bidirectional" else None
    return dense(u, taps[0], later, layer.skip, pre, post, circular=layer.mode == "circular")


@ways
@pytest.mark.parametrize("filter", ["implicit", "explicit", FewTaps], ids=str)
def test_every_way(dense, mode, algorithm, order, filter):
    filter = filter if isinstance(filter, str) else filter(2 if mode == "bidirectional" else 1)
    layer = LongConv(3, 17, filter=filter, mode=mode, algorithm=algorithm, order=order, dtype=double)
    for length in (1, 2, 13, 17):
        u, pre, post = torch.randn(3, 2, 3, length, dtype=double).unbind(0)
        assert_close(layer(u), by_hand(dense, layer, u), 1e-12)
        assert_close(layer(u, pre, post), by_hand(dense, layer, u, pre, post), 1e-12)
    for shape in [(3, 17), (0, 3, 17), (2, 2, 3, 17), (2, 3, 0)]:
        assert layer(torch.randn(shape, dtype=double)).shape == shape


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(mode, algorithm, order, dtype, autocast):
    layer = LongConv(3, 301, filter="explicit", mode=mode, algorithm=algorithm, order=order)
    u = torch.randn(2, 3, 301).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(u, u)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).double()(u.double(), u.double())
    assert_close(y, exact, 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@ways
def test_gradients_reach_everything(mode, algorithm, order):
    layer = LongConv(2, 4, mode=mode, algorithm=algorithm, order=order, dtype=double)
    u, gate = (torch.randn(2, 4, dtype=double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer, (u, gate, gate))
    assert torch.autograd.gradgradcheck(layer, (u, gate, gate))
    layer(u).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@ways
def test_copies_and_files(mode, algorithm, order, tmp_path):
    layer = LongConv(3, 9, mode=mode, algorithm=algorithm, order=order)
    u = torch.randn(2, 3, 9)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(u), layer(u))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for state in (torch.load(stream), load_file(tmp_path / "layer.safetensors")):
        other = LongConv(3, 9, mode=mode, algorithm=algorithm, order=order)
        assert not torch.equal(other(u), layer(u))
        other.load_state_dict(state)
        assert torch.equal(other(u), layer(u))


@ways
def test_casts_and_meta_device(mode, algorithm, order):
    layer = LongConv(3, 9, filter="explicit", mode=mode, algorithm=algorithm, order=order)
    u = torch.randn(2, 3, 9)
    low = copy.deepcopy(layer).bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in low.parameters())
    assert_close(low(u), layer(u), 2e-2)
    empty = LongConv(3, 9, filter="explicit", mode=mode, algorithm=algorithm, order=order, device="meta")
    assert empty(u.to("meta")).shape == u.shape
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict({k: v for k, v in layer.state_dict().items() if "transforms" not in k}, strict=False)
    assert_close(empty(u), layer(u), 1e-6)


@ways
def test_reset_draws_everything_anew(mode, algorithm, order):
    layer = LongConv(3, 9, mode=mode, algorithm=algorithm, order=order)
    before = copy.deepcopy(layer)
    layer.reset_parameters()
    assert not torch.equal(layer.skip, before.skip) and not torch.equal(before.skip, torch.ones(3))
    assert (layer.taps() - before.taps()).norm() > 0.1 * before.taps().norm()


def test_default_filter_on_the_meta_device():
    assert LongConv(3, 9, device="meta")(torch.randn(2, 3, 9, device="meta")).shape == (2, 3, 9)


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "circular"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("filter", ["implicit", FewTaps], ids=str)
def test_matrix(mode, skip, filter):
    filter = filter if isinstance(filter, str) else filter(2 if mode == "bidirectional" else 1)
    layer = LongConv(3, 17, filter=filter, mode=mode, skip=skip, dtype=double)
    kind = {"causal": sm.CausalToeplitz, "bidirectional": sm.Toeplitz, "circular": sm.Circulant}[mode]
    for length in (1, 2, 6, 17):
        u = torch.randn(4, 3, length, dtype=double)
        T = layer.matrix(length=length)
        assert isinstance(T, kind) and T.shape == (3, length, length)
        assert_close(T.matvec(u), layer(u), 1e-12)
        assert_close(layer.matrix(1, length).matvec(u[:, 1]), layer(u)[:, 1], 1e-12)
    assert layer.matrix().shape == (3, 17, 17) and layer.matrix(2).shape == (17, 17)
    layer.matrix().to_dense().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_inputs_longer_than_the_filter(dense):
    u = torch.randn(2, 3, 40, dtype=double)
    for extend in ("zero", "tile", "resample"):
        filter = ImplicitFilter(3, 17, extend=extend, dtype=double)
        for algorithm in ("fft", "monarch"):
            layer = LongConv(3, 17, filter=filter, algorithm=algorithm, dtype=double)
            assert_close(layer(u), dense(u, filter(40)[0], None, layer.skip), 1e-12)
        assert_close(layer.matrix(length=40).matvec(u), layer(u), 1e-12)
    assert LongConv(3, 17, filter=ImplicitFilter(3, 17, extend="zero", dtype=double)).taps(40).shape == (1, 3, 17)
    with pytest.raises(ValueError, match="length must be at most 17"):
        LongConv(3, 17, dtype=double)(u)


def test_learned_transforms_learn():
    layer = LongConv(2, 16, mode="bidirectional", filter="explicit", algorithm="butterfly", dtype=double)
    u = torch.randn(64, 2, 16, dtype=double)
    target = u.flip(-1)  # which no convolution does
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (layer(u) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * min(losses[0], 1.0)
    before = layer(u)
    layer.reset_parameters()
    assert not torch.allclose(layer(u), before)
    assert [tuple(p.shape) for p in layer.transforms.forward_factors] == [(1, 6, 6, 6, 2), (6, 6, 6, 1, 2)]


layer = LongConv(3, 8)
both = LongConv(3, 8, mode="bidirectional", algorithm="butterfly")
u = torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LongConv(3, 8, mode="same"), ValueError, "mode must be one of causal, bidirectional, circular"),
        (lambda: LongConv(3, 8, algorithm="dft"), ValueError, "algorithm must be one of fft, monarch, butterfly"),
        (lambda: LongConv(3, 8, order=5), ValueError, "order must be at most 4, got 5"),
        (lambda: LongConv(3, 8, algorithm="butterfly"), ValueError, 'needs mode="bidirectional" or "circular"'),
        (lambda: LongConv(3, 8, filter="hyena"), ValueError, "filter must be one of implicit, explicit or a module"),
        (lambda: LongConv(3, 8, filter=3), TypeError, "filter must be a string, a module or None, got int"),
        (lambda: LongConv(3, 8, filter=ImplicitFilter(4, 8)), ValueError, "filter must have 3 channels"),
        (lambda: LongConv(3, 8, filter=ExplicitFilter(3, 8, directions=2)), ValueError, "filter must have 1 direction"),
        (lambda: LongConv(0, 8), ValueError, "channels must be at least 1"),
        (lambda: LongConv(3, 8.0), TypeError, "length must be an integer"),
        (lambda: LongConv(3, 8, filter=nn.Identity())(u), TypeError, "the filter's output must be a torch.Tensor"),
        (lambda: LongConv(3, 8, filter=FewTaps(2))(u), ValueError, r"the filter must return shape \(1, 3, taps\)"),
        (lambda: layer(u[:, :2]), ValueError, "u must have 3 channels in dimension -2"),
        (lambda: layer(u.double()), TypeError, "k has dtype torch.float32 but u has torch.float64"),
        (lambda: layer(u, u[..., :3]), ValueError, "pre_gate must have shape"),
        (lambda: both(torch.randn(2, 3, 9)), ValueError, "length must be at most 8"),
        (lambda: both.matrix(), TypeError, "learned transforms"),
        (lambda: layer.matrix(3), ValueError, "channel must be less than 3, got 3"),
        (lambda: layer.matrix(-1), ValueError, "channel must be at least 0"),
        (lambda: layer.matrix(length=9), ValueError, "length must be at most 8"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_learned_transforms_have_a_length():
    filter = ImplicitFilter(3, 8, directions=2, extend="tile")
    with pytest.raises(ValueError, match="u must be at most 8 long for the learned transforms, got 9"):
        LongConv(3, 8, filter=filter, mode="bidirectional", algorithm="butterfly")(torch.randn(2, 3, 9))
