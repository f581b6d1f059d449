"""The moments of calibrate against dense float64 sums over what the layers were given."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structmat
from structmat import Moments, surgery
from structmat.surgery import gram
from structmat.surgery.gram import Gram, Sums


def close(actual, expected, tol=1e-13):
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)
    assert actual.shape == expected.shape and error <= tol, error


def same(actual: Moments, expected: Moments, tol=1e-13):
    assert actual.count == expected.count
    close(actual.inputs, expected.inputs, tol)
    close(actual.mean, expected.mean, tol)
    assert (actual.outputs is None) == (expected.outputs is None)
    if expected.outputs is not None:
        close(actual.outputs, expected.outputs, tol)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(model):
    """All that a pass could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return hooks, [m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()]


class Attention(nn.Module):
    """Query and key projections of one input, and a value projection of another where ``cross`` is given."""

    def __init__(self, n=6):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(n, 4), nn.Linear(n, 4, bias=False), nn.Linear(n, 5)

    def forward(self, x, cross=None, twice=False):
        y = self.q(x), self.k(x), self.v(x if cross is None else cross)
        return (*y, self.k(x)) if twice else y


# ---------------------------------------------------------------- moments
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_linear(n, dtype):
    model = nn.Sequential(nn.Linear(n, 5), nn.Flatten(0, -2), nn.Linear(5, n)).to(dtype)
    x = [rand(2, 3, n, seed=i, dtype=dtype) for i in range(3)]
    calibration = surgery.calibrate(model, x)
    double = torch.complex128 if dtype.is_complex else torch.float64
    assert calibration["0"].inputs.dtype == calibration["0"].mean.dtype == double
    same(calibration["0"], Moments.of(torch.cat(x)))
    with torch.no_grad():
        same(calibration["2"], Moments.of(torch.cat([model[0](t) for t in x])))
    assert torch.equal(calibration["0"].inputs, calibration["0"].inputs.mH)


def test_conv1d_of_transformers_and_structured_layers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 6)
    model = nn.Sequential(conv1d, structmat.nn.MonarchLinear(8, 10, nblocks=2))
    x = rand(5, 6)
    calibration = surgery.calibrate(model, [x])
    assert calibration.shapes == {"0": (8, 6), "1": (10, 8)}
    same(calibration["0"], Moments.of(x))
    same(calibration["1"], Moments.of(conv1d(x).detach()))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolutions_of_one_position(stride):
    conv = nn.Conv2d(3, 4, 1, stride=stride)
    x = rand(2, 3, 5, 7)
    got = surgery.calibrate(nn.Sequential(conv), [x])["0"]
    same(got, Moments.of(F.unfold(x, 1, stride=stride).mT))
    y = rand(2, 3, 7)
    got = surgery.calibrate(nn.Sequential(nn.Conv1d(3, 4, 1, stride=stride)), [y, y[0]])["0"]
    sampled = y[..., ::stride].mT
    same(got, Moments.of(torch.cat([sampled, sampled[:1]])))


def test_other_convolutions_are_left_out():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, padding="same"),
    )
    assert list(surgery.calibrate(model, [rand(1, 4, 5, 5)])) == ["3"]


def test_what_compress_leaves_alone_is_left_out():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    model.append(nn.Linear(4, 9, bias=False))
    model[3].weight = model[0].weight
    assert list(surgery.calibrate(model, [torch.arange(9)])) == ["1"]
    named = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    got = surgery.calibrate(named, [rand(2, 3)], lambda name, _: name == "b", forward=lambda m, x: m["b"](m["a"](x)))
    assert list(got.shapes) == ["b"]


def test_repeated_module_gathers_all_its_inputs_under_all_its_names():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), layer)
    x = rand(6, 4)
    calibration = surgery.calibrate(model, [x[:2], x[2:]])
    hidden = layer(x).relu().detach()
    same(calibration["0"], Moments.of(torch.cat([x, hidden])))
    assert list(calibration) == ["0"] and calibration["2"] is calibration["0"] and "2" in calibration
    # The same tensor twice counts twice.
    model = Attention()
    got = surgery.calibrate(model, [{"x": rand(3, 6), "twice": True}])
    assert (got["k"].count, got["q"].count) == (6, 3)
    close(got["k"].inputs, got["q"].inputs)


# ---------------------------------------------------------------- sharing
def test_layers_of_one_input_share_work_and_memory(monkeypatch, tmp_path):
    calls = []
    of = Gram.of
    monkeypatch.setattr(Gram, "of", lambda rows, dtype: (calls.append(rows.shape), of(rows, dtype))[1])
    calibration = surgery.calibrate(Attention(), [(rand(5, 6),), (rand(4, 6, seed=1),)])
    assert calls == [(5, 6), (4, 6)]
    assert calibration["q"].inputs is calibration["k"].inputs is calibration["v"].inputs
    assert calibration["q"].mean is calibration["v"].mean
    calibration.save(tmp_path / "c.safetensors")
    for other in (
        surgery.Calibration.load(tmp_path / "c.safetensors"),
        calibration.to("cpu"),
        calibration + calibration,
    ):
        assert other["q"].inputs is other["k"].inputs is other["v"].inputs


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_inputs_that_are_shared_in_some_batches_only(order):
    x, y, z = (rand(k, 6, seed=k) for k in (3, 4, 5))
    kinds = [((x,), [x], [x], [x]), ((y, z), [y], [y], [z]), ((z, None, True), [z], [z, z], [z])]
    calibration = surgery.calibrate(Attention(), [kinds[i][0] for i in order])
    for j, name in enumerate("qkv"):
        same(calibration[name], Moments.of(torch.cat([t for kind in kinds for t in kind[1 + j]])))


def test_an_input_changed_in_place_is_not_shared():
    class Model(Attention):
        def forward(self, x):
            x = x.clone()
            q = self.q(x)
            x += 1
            return q, self.k(x), self.v(x)

    x = rand(5, 6)
    calibration = surgery.calibrate(Model(), [x])
    same(calibration["q"], Moments.of(x))
    same(calibration["k"], Moments.of(x + 1))
    assert calibration["k"].inputs is calibration["v"].inputs


def test_the_same_tensor_to_a_convolution_and_a_linear_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.conv = nn.Linear(5, 2), nn.Conv1d(4, 2, 1)

        def forward(self, x):
            return self.fc(x), self.conv(x)

    x = rand(3, 4, 5)
    calibration = surgery.calibrate(Model(), [x])
    same(calibration["fc"], Moments.of(x))
    same(calibration["conv"], Moments.of(x.mT))


# ---------------------------------------------------------------- sums
def test_independent_of_the_split_into_batches():
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double(), rand(24, 5, dtype=torch.float64)
    whole = surgery.calibrate(model, [x])
    for sizes in ([12, 12], [1, 23], [5] * 4 + [4]):
        for name, moments in surgery.calibrate(model, iter(x.split(sizes))).items():
            same(moments, whole[name])
    summed = surgery.calibrate(model, [x[:7]]) + surgery.calibrate(model, [x[7:]])
    for name in whole:
        same(summed[name], whole[name])


def test_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(gram, "_BLOCK", 3)
    monkeypatch.setattr(gram, "_CHUNK", 40)
    x = rand(23, 8, dtype=torch.complex128)
    same(surgery.calibrate(nn.Sequential(nn.Linear(8, 2).to(x.dtype)), [x])["0"], Moments.of(x))


def test_float32_products():
    x = [rand(50, 9, seed=i) for i in range(3)]
    got = surgery.calibrate(nn.Sequential(nn.Linear(9, 2)), x, dtype=torch.float32)["0"]
    assert got.inputs.dtype == torch.float64
    same(got, Moments.of(torch.cat(x)), 1e-6)


def test_single_precision_sums_keep_their_rounding_errors():
    """As on devices without float64: 20000 terms of which the plain float32 sum loses four digits."""
    sums, plain, exact = Sums(), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    for i in range(20000):
        x = 1 + 0.1 * rand(1, 2, seed=i)
        term = Gram((x.mT @ x), x[0], 1)
        sums.add(term)
        plain += term.outer
        exact += term.outer.double()
    outer, first = sums.totals()
    assert outer.dtype == first.dtype == torch.float64 and sums.count == 20000
    close(outer, exact, 1e-12)
    assert (plain - exact).norm() / exact.norm() > 1e-6


# ---------------------------------------------------------------- batches
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_padded_positions_are_left_out(mask_dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.pool, self.conv = nn.Linear(5, 3), nn.Linear(5, 3), nn.Conv1d(5, 2, 1)

        def forward(self, x, attention_mask):
            return self.fc(x), self.pool(x[:, 0]), self.conv(x.mT)

    x = [rand(3, 4, 5), rand(2, 6, 5, seed=1)]
    masks = [torch.arange(4) < torch.tensor([[4], [1], [2]]), torch.ones(2, 6, dtype=torch.bool)]
    batches = [{"x": t, "attention_mask": m.to(mask_dtype)} for t, m in zip(x, masks, strict=True)]
    calibration = surgery.calibrate(Model(), batches)
    kept = torch.cat([t[m] for t, m in zip(x, masks, strict=True)])
    same(calibration["fc"], Moments.of(kept))
    same(calibration["conv"], Moments.of(kept))
    same(calibration["pool"], Moments.of(torch.cat([t[:, 0] for t in x])))


def test_kinds_of_batches():
    model, x = Attention(), rand(5, 6)
    expected = surgery.calibrate(model, [x])
    batches = [(x,), [x], {"x": x}]
    for got in [surgery.calibrate(model, [batch]) for batch in batches]:
        same(got["q"], expected["q"])
    got = surgery.calibrate(model, ["5"], forward=lambda m, b: m(rand(int(b), 6)))
    same(got["q"], expected["q"])
    with pytest.raises(TypeError, match=r"a batch must be .* got a str; for others, give forward"):
        surgery.calibrate(model, ["5"])


def test_keyword_inputs_and_inference_mode():
    class Model(Attention):
        def forward(self, x):
            return self.q(input=x), self.k(x)

    with torch.inference_mode():
        x = rand(5, 6)
        calibration = surgery.calibrate(Model(), [x], lambda name, _: name != "v")
    assert not calibration["q"].inputs.is_inference()
    same(calibration["q"], Moments.of(x))
    same(calibration["k"], Moments.of(x))


def test_layers_that_saw_nothing():
    calibration = surgery.calibrate(
        nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 5)]), [rand(2, 3)], forward=lambda m, x: m[1](x[:0])
    )
    assert calibration.unseen == ("0", "1") and len(calibration) == 0
    for name in "01":
        with pytest.raises(KeyError, match=f"{name} saw no input"):
            calibration[name]
    assert "0" not in calibration
    with pytest.raises(KeyError, match="the calibration has no layer 'x'"):
        calibration["x"]
    assert repr(calibration) == "Calibration(0 layers, 0 inputs each, 2 without input)"
    summed = calibration + surgery.calibrate(
        nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 5)]), [rand(2, 3)], forward=lambda m, x: m[1](x)
    )
    assert list(summed) == ["1"] and summed["1"].count == 2


def test_compiled_and_fused_models_are_seen():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, padding = rand(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    before = torch.backends.mha.get_fastpath_enabled()
    calibration = surgery.calibrate(encoder, [{"src": x, "src_key_padding_mask": padding}])
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert {name: m.count for name, m in calibration.items()} == {"layers.0.linear1": 10, "layers.0.linear2": 10}
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 3)).eval(), backend="eager")
    with torch.no_grad():
        compiled(rand(3, 4))  # what is compiled now knows of no hooks
    assert surgery.calibrate(compiled, [rand(3, 4)])["_orig_mod.0"].count == 3


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(gradients, value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).train()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(4)
    with torch.no_grad():
        model[0].bias[1] = value
    before = state(model)
    with pytest.raises(ValueError, match="the inputs of 2 have NaN or infinite entries in batch 0"):
        surgery.calibrate(model, [rand(2, 4)], gradients=gradients, loss_fn=(lambda y, _: y) if gradients else None)
    x = rand(2, 4)
    x[1, 2] = -value
    with pytest.raises(ValueError, match="the inputs of 0 have NaN or infinite entries in batch 1"):
        surgery.calibrate(nn.Sequential(nn.Linear(4, 4)), [rand(2, 4), x])
    assert state(model) == before


@pytest.mark.parametrize("gradients", [False, True])
def test_model_is_restored(gradients):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(4)
    before, values = state(model), copy.deepcopy(model.state_dict())
    loss = (lambda y, _: y.square()) if gradients else None
    surgery.calibrate(model, [rand(5, 4)], gradients=gradients, loss_fn=loss)
    assert state(model) == before and torch.equal(model[0].bias.grad, torch.ones(4))
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError):
        surgery.calibrate(model, [rand(5, 4), rand(5, 3)], gradients=gradients, loss_fn=loss)
    assert state(model) == before
    assert torch.is_grad_enabled()


def test_bad_arguments():
    model, x = nn.Sequential(nn.Linear(4, 4)), rand(2, 4)
    with pytest.raises(ValueError, match="batches is empty"):
        surgery.calibrate(model, iter([]))
    for batches in (x, {"input": x}, 3):
        with pytest.raises(TypeError, match="batches must be an iterable of batches"):
            surgery.calibrate(model, batches)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        surgery.calibrate(lambda x: x, [x])
    with pytest.raises(TypeError, match=r"dtype must be torch\.float64, torch\.float32 or None, got torch\.bfloat16"):
        surgery.calibrate(model, [x], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="loss_fn is given, but gradients is False"):
        surgery.calibrate(model, [x], loss_fn=lambda y, _: y)
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        surgery.calibrate(nn.Sequential(nn.ReLU()), [x])
    with pytest.raises(ValueError, match="that filter_fn accepts"):
        surgery.calibrate(model, [x], lambda *_: False)
    with pytest.raises(ValueError, match=r"meta device \(0\)"):
        surgery.calibrate(nn.Sequential(nn.Linear(4, 4, device="meta")), [x])


# ---------------------------------------------------------------- use
def test_check_names_all_that_does_not_fit():
    calibration = surgery.calibrate(nn.Sequential(nn.Linear(4, 5)), [rand(2, 4)])
    calibration.check({"0": (5, 4)})
    with pytest.raises(ValueError, match="another model") as error:
        calibration.check({"0": (5, 3), "1": (2, 5), "2": (2, 2)})
    assert "0: (5, 3) in the model, (5, 4) in the calibration" in str(error.value)
    assert "1: not in the calibration\n  2: not in the calibration" in str(error.value)
    with pytest.raises(ValueError, match="must be of the same layers"):
        calibration + surgery.calibrate(nn.Sequential(nn.Linear(3, 5)), [rand(2, 3)])


def test_compressed_model_can_be_calibrated_again_and_compression_uses_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    x = rand(200, 3) @ rand(3, 16, seed=1)
    calibration = surgery.calibrate(model, [x])
    surgery.compress_(model, {"0": structmat.LowRankConfig(rank=3)}, calibration=calibration)
    again = surgery.calibrate(model, [x])
    same(again["0"], calibration["0"])
    # The inputs lie in three dimensions: the outputs are kept, and so are the second layer's inputs.
    close(again["2"].inputs, calibration["2"].inputs, 0.05)
