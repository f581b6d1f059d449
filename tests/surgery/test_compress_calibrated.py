"""compress_ with a calibration: what layers put out is kept, biases take up means, and layers follow one another."""

import copy
import itertools

import pytest
import torch
from torch import nn

import structmat
from structmat import LowRankConfig, MonarchConfig, surgery
from structmat.testing import relative_error


def data(count=4, size=16, tokens=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [torch.randn(tokens, size, generator=g, dtype=torch.float64) @ mix + 1 for _ in range(count)]


def network(*sizes, bias=True):
    torch.manual_seed(0)
    layers = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1]).double()


@torch.no_grad()
def run(model, batches):
    return torch.cat([model(x) for x in batches])


CONFIG = MonarchConfig(nblocks=2, ratio=0.5)


def test_the_layers_are_those_of_project():
    batches, model = data(), network(16, 24, 10)
    dense, calibration = copy.deepcopy(model), surgery.calibrate(model, data())
    report = surgery.compress_(model, CONFIG, calibration=calibration, damping=0.2)
    for row, name in zip(report.compressed, ("0", "2"), strict=True):
        expected = structmat.project(dense.get_submodule(name).weight, CONFIG, calibration[name].centred(), 0.2)
        assert torch.equal(model.get_submodule(name).weight().to_dense(), expected.matrix.to_dense())
        assert (row.calibrated_error, row.error) == (expected.calibrated_error, expected.error)
        assert row.calibrated_error < row.plain_calibrated_error
    plain = copy.deepcopy(dense)
    assert "calibrated" not in str(surgery.compress_(plain, CONFIG)) and "calibrated" in str(report)
    assert surgery.Report.from_json(report.to_json()) == report
    target = run(dense, batches)
    assert relative_error(run(model, batches), target) < 0.9 * relative_error(run(plain, batches), target)


def test_the_mean_of_a_layers_outputs_is_kept():
    batches, model = data(), network(16, 24)
    target, bias = run(model, batches), model[0].bias
    surgery.compress_(model, LowRankConfig(rank=2), calibration=surgery.calibrate(model, batches))
    assert model[0].bias is bias
    got = run(model, batches)
    assert relative_error(got.mean(0), target.mean(0)) <= 1e-12
    assert relative_error(got, target) > 0.01


@pytest.mark.parametrize("shared", [False, True])
def test_layers_without_a_bias_of_their_own_keep_their_second_moments(shared):
    model = network(16, 16, 16, bias=shared)
    if shared:
        model[2].bias = model[0].bias
    before = copy.deepcopy(model)
    calibration = surgery.calibrate(model, data())
    surgery.compress_(model, CONFIG, calibration=calibration)
    expected = structmat.project(before[2].weight, CONFIG, calibration["2"])
    assert torch.equal(model[2].weight().to_dense(), expected.matrix.to_dense())
    if shared:
        assert torch.equal(model[0].bias, before[0].bias)


def test_in_order_every_mean_stays_and_the_output_is_nearer():
    batches, model = data(count=8), network(16, 32, 32, 32, 32, 8)
    dense, calibration = copy.deepcopy(model), surgery.calibrate(model, batches)
    apart = copy.deepcopy(model)
    surgery.compress_(apart, CONFIG, calibration=calibration)
    surgery.compress_(model, CONFIG, calibration=calibration, compensate=iter(batches))
    target = run(dense, batches)
    errors = [relative_error(run(m, batches), target) for m in (model, apart)]
    assert errors[0] < errors[1]
    for end in (1, 3, 5, 7, 9):  # after each linear layer
        got, expected = run(model[:end], batches).mean(0), run(dense[:end], batches).mean(0)
        assert relative_error(got, expected) <= 1e-10
        if end > 1:
            assert relative_error(run(apart[:end], batches).mean(0), expected) > 1e-4


class Attention(nn.Module):
    """Three layers with one input, one that is called twice, one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(16, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.idle = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.out(self.q(x) * self.k(x) + self.v(x))))


def test_shared_inputs_repeated_and_idle_layers():
    from structmat.surgery.in_order import _groups

    batches, model = data(), Attention().double()
    assert _groups(model, ["out", "q", "k", "v", "idle"], batches[0]) == [["q", "k", "v"], ["out"], ["idle"]]
    calibration = surgery.calibrate(model, batches)
    with pytest.raises(ValueError, match=r"no moments of idle: .*these layers saw no input"):
        surgery.compress_(model, CONFIG, calibration=calibration)
    before = copy.deepcopy(model)
    surgery.compress_(before, CONFIG, lambda name, _: name in "qkv", calibration=calibration, compensate=batches)
    weight = before.out.weight
    seen = surgery.calibrate(before, batches)["out"]  # of both calls
    assert seen.count == 2 * sum(len(x) for x in batches)
    surgery.compress_(model, CONFIG, lambda name, _: name != "idle", calibration=calibration, compensate=batches)
    assert torch.equal(model.q.weight().to_dense(), before.q.weight().to_dense())
    expected = structmat.project(weight, CONFIG, seen.centred()).matrix.to_dense()
    assert relative_error(model.out.weight().to_dense(), expected) <= 1e-12


@pytest.mark.parametrize("compensate", [False, True])
def test_a_failure_changes_nothing(compensate, monkeypatch):
    batches, model = data(), network(16, 16, 16, 16)
    calibration, state = surgery.calibrate(model, batches), copy.deepcopy(model.state_dict())
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        return structmat.project(*args)

    monkeypatch.setattr("structmat.surgery.fitting.project", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        surgery.compress_(model, CONFIG, calibration=calibration, compensate=batches if compensate else None)
    assert [type(layer) for layer in model[::2]] == [nn.Linear] * 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype):
    model = network(16, 24, 10).to(dtype)
    batches = [x.to(dtype) for x in data()]
    target = run(model, batches).double()
    plain, calibration = copy.deepcopy(model), surgery.calibrate(model, batches)
    surgery.compress_(plain, CONFIG)
    surgery.compress_(model, CONFIG, calibration=calibration, compensate=batches)
    assert {p.dtype for p in model.parameters()} == {dtype}
    errors = [relative_error(run(m, batches).double(), target) for m in (model, plain)]
    assert errors[0] < errors[1]


def test_gpt2_with_output_gradients():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=12)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(40, (4, 3, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": x, "labels": x} for x in tokens]
    calibration = surgery.calibrate(model, batches, gradients=True)
    report = surgery.compress_(
        model, {"transformer.h.*": CONFIG}, calibration=calibration, compensate=batches, progress=False
    )
    assert len(report.compressed) == 8 and torch.isfinite(model(**batches[0]).loss)
    for row in report.compressed:
        assert row.calibrated_error < row.plain_calibrated_error


def test_errors():
    batches, model = data(), network(16, 24, 10)
    calibration = surgery.calibrate(model, batches)
    other = surgery.calibrate(network(16, 20, 10), batches)
    with pytest.raises(ValueError, match="another model: 2 has 24 inputs, its moments are of 20"):
        surgery.compress_(model, CONFIG, calibration=other)
    with pytest.raises(ValueError, match=r"no moments of 2: .*It has 1 layers"):
        surgery.compress_(model, CONFIG, calibration={"0": calibration["0"]})
    with pytest.raises(TypeError, match="calibration must be what calibrate returned, got list"):
        surgery.compress_(model, CONFIG, calibration=[])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="compensate needs the calibration"):
        surgery.compress_(model, CONFIG, compensate=batches)
    with pytest.raises(ValueError, match="compensate has no batches"):
        surgery.compress_(model, CONFIG, calibration=calibration, compensate=[])
    with pytest.raises(ValueError, match="damping must be"):
        surgery.compress_(model, CONFIG, calibration=calibration, damping=-1)
    assert type(model[0]) is nn.Linear
