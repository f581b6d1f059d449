"""Filters: their formulas, initial values, extension and regularisation."""

import copy
import math

import pytest
import torch

import structmat as sm
from structmat import surgery
from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv, StructuredLinear
from structmat.testing import assert_close

double = torch.float64


def implicit_by_hand(f, direction, z, t):
    """One tap after another, as the paper writes it."""
    rows = []
    for i in range(len(z)):
        h = z[i]
        *hidden, last = f.mlps[direction]
        for layer in hidden:
            h = torch.sin(f.frequency[0] * (layer.weight @ h + layer.bias))
        rows.append((last.weight @ h) * (torch.exp(-t[i] * f.deltas[0, 0].abs()) + f.shift))
    return torch.stack(rows, -1)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1, "features": 3}, {"shift": 0.5, "width": 7, "features": 9}], ids=str
)
def test_implicit_taps(options):
    f = ImplicitFilter(6, 11, directions=2, dtype=double, **options)
    taps = f()
    assert taps.shape == (2, 6, 11)
    for direction in range(2):
        assert_close(taps[direction], implicit_by_hand(f, direction, f.z[0], f.t[0, :, 0]), 1e-12)
    assert_close(f(4), taps[..., :4], 1e-12)
    assert f(0).shape == (2, 6, 0)


def test_implicit_state():
    f = ImplicitFilter(6, 11, features=7, width=8, dtype=double)
    assert {name: tuple(p.shape) for name, p in f.state_dict().items()} == {
        "z": (1, 11, 7),
        "frequency": (1, 8),
        "t": (1, 11, 1),
        "deltas": (1, 1, 6),
        "mlps.0.0.weight": (8, 7),
        "mlps.0.0.bias": (8,),
        "mlps.0.1.weight": (8, 8),
        "mlps.0.1.bias": (8,),
        "mlps.0.2.weight": (8, 8),
        "mlps.0.2.bias": (8,),
        "mlps.0.3.weight": (6, 8),
    }
    assert {name for name, _ in f.named_buffers()} == {"t", "deltas"}
    t = torch.arange(11, dtype=double) / 10
    bands = [band * 2 * math.pi * torch.arange(11, dtype=double) / 11 for band in (1e-4, 1 + 0.5e-4, 2.0)]
    want = torch.stack([t, *(b.cos() for b in bands), *(-b.sin() for b in bands)], -1)
    assert_close(f.z[0], want, 1e-12)
    assert_close(f.deltas[0, 0, [0, -1]], torch.tensor([math.log(1e-2) / 1.5, math.log(1e-2) / 0.3]).double(), 1e-6)
    assert (f.frequency == 10).all() and (ImplicitFilter(6, 11, frequency=3.0).frequency == 3).all()


def test_implicit_beyond_its_length():
    make = lambda extend: ImplicitFilter(6, 11, extend=extend, dtype=double)  # noqa: E731
    with pytest.raises(ValueError, match="length must be at most 11, the length of the filter, got 12"):
        make("error")(12)
    f = make("zero")
    assert_close(f(30)[..., :11], f(), 1e-12)
    assert f(30).shape == (1, 6, 30) and not f(30)[..., 11:].any()
    f = make("tile")
    t = torch.arange(30, dtype=double) / 10
    assert_close(f(30)[0], implicit_by_hand(f, 0, f.z[0].repeat(3, 1)[:30], t), 1e-12)
    assert_close(f(30)[..., :11], f(), 1e-12)
    f = make("resample")
    assert_close(f(21)[..., ::2], f(), 1e-12)
    assert f(12).shape == (1, 6, 12)


def test_implicit_in_low_precision_and_autocast():
    f = ImplicitFilter(6, 11)
    plain = f()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(), plain)
    taps = f.bfloat16()()
    assert taps.dtype == torch.float32 and torch.isfinite(taps).all()


def test_gradients_reach_every_parameter():
    for f in (ImplicitFilter(3, 7, directions=2), ExplicitFilter(3, 7, directions=2, smooth=3)):
        f().square().sum().backward()
        for name, p in f.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_layers_of_its_network_can_be_structured():
    f = ImplicitFilter(8, 7, width=16, dtype=double)
    plain = f()
    surgery.compress_(f, {"mlps.0.1": sm.MonarchConfig(nblocks=1)})
    assert isinstance(f.mlps[0][1], StructuredLinear)
    assert_close(f(), plain, 1e-10)


def test_length_one():
    for make in (ImplicitFilter, ExplicitFilter):
        assert torch.isfinite(make(1, 1)()).all()


def test_meta_device_then_real():
    for f in (ImplicitFilter(3, 7, device="meta"), ExplicitFilter(3, 7, device="meta")):
        f = f.to_empty(device="cpu")
        f.reset_parameters()
        assert torch.isfinite(f()).all()


def test_explicit_initial_scale():
    f = ExplicitFilter(512, 64)
    std = f.weight[0, :, 0].std()
    assert 0.018 < std < 0.022
    rate = 256 ** (torch.arange(256)[:, None] / 512)
    normal = f.weight[0, :256] / (0.02 * torch.exp(-rate * torch.arange(64) / 64))
    assert 0.95 < normal.square().mean() < 1.05
    # The last channel decays by (256)^(511/512) over the length, the first one by 1.
    assert f.weight[0, -64:, 32:].abs().max() < 1e-6 and f.weight[0, :64, 48:].std() > 1e-3


def test_explicit_smoothing_and_threshold():
    f = ExplicitFilter(3, 9, smooth=3, squash=0.004, dtype=double)
    w = f.weight.detach()
    smooth = torch.stack([w[..., max(i - 1, 0) : i + 2].mean(-1) for i in range(9)], -1)
    want = smooth.sign() * (smooth.abs() - 0.004).clamp(min=0)
    assert_close(f(), want, 1e-12)
    assert_close(f(4), want[..., :4], 1e-12)
    g = ExplicitFilter(3, 9, smooth=3, smooth_domain="frequency", dtype=double)
    spectrum = torch.fft.rfft(g.weight.detach())
    means = torch.stack([spectrum[..., max(i - 1, 0) : i + 2].mean(-1) for i in range(5)], -1)
    assert_close(g(), torch.fft.irfft(means, 9), 1e-12)


def test_explicit_dropout_in_training_only():
    f = ExplicitFilter(20, 50, dropout=0.3)
    dropped = (f() == 0).float().mean()
    assert 0.2 < dropped < 0.4
    assert_close(f.eval()(), f.weight, 0)
    f = ExplicitFilter(3, 5, extend="zero").eval()
    assert f(8).shape == (1, 3, 8) and not f(8)[..., 5:].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImplicitFilter(3, 7, features=4), ValueError, "features must be odd"),
        (lambda: ImplicitFilter(3, 7, features=1), ValueError, "features must be at least 3"),
        (lambda: ImplicitFilter(3, 7, directions=3), ValueError, "directions must be 1 or 2, got 3"),
        (lambda: ImplicitFilter(3, 7, extend="wrap"), ValueError, "extend must be one of error, zero, tile, resample"),
        (lambda: ImplicitFilter(3, 7, target=1.0), ValueError, "target must be between 0 and 1, got 1.0"),
        (lambda: ImplicitFilter(3, 7, fast_decay=0.0), ValueError, "fast_decay must be positive, got 0.0"),
        (lambda: ImplicitFilter(3, 0), ValueError, "length must be at least 1"),
        (lambda: ImplicitFilter(3.0, 7), TypeError, "channels must be an integer"),
        (lambda: ExplicitFilter(3, 7, smooth=4), ValueError, "smooth must be odd"),
        (lambda: ExplicitFilter(3, 7, squash=-1.0), ValueError, "squash must be at least 0"),
        (lambda: ExplicitFilter(3, 7, dropout=1.0), ValueError, "dropout must be at least 0 and below 1"),
        (lambda: ExplicitFilter(3, 7, extend="tile"), ValueError, "extend must be one of error, zero, got 'tile'"),
        (lambda: ExplicitFilter(3, 7, smooth=3, smooth_domain="space"), ValueError, "smooth_domain must be"),
        (lambda: ExplicitFilter(3, 7)(-1), ValueError, "length must be at least 0"),
        (lambda: ExplicitFilter(3, 7)(8), ValueError, "length must be at most 7"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_casts_to_half_precision_leave_an_implicit_filter_alone():
    conv = LongConv(5, 40)
    wanted, u = conv.taps(), torch.randn(2, 5, 40)
    exact = conv(u)
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)):
        half = cast(copy.deepcopy(conv))
        assert half.skip.dtype in (torch.bfloat16, torch.float16)
        assert {t.dtype for t in half.filter.state_dict().values()} == {torch.float32}
        assert torch.equal(half.taps(), wanted)
        assert half(u.to(half.skip.dtype)).dtype == half.skip.dtype
        assert_close(half(u.bfloat16()).float(), exact, 2e-2)
    assert conv.double().filter.z.dtype == torch.float64
    assert conv.to("meta").filter.z.is_meta
