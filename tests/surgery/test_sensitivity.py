"""sensitivity: exact where the model is linear, and without a trace in the model."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.calibrated import metric_of

HALF = structmat.LowRankConfig(ratio=0.4)


def model(*sizes, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(nn.Linear(n, m, bias=bias, dtype=dtype) for n, m in pairs))


def data(n, count=64, dtype=torch.float64):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(1), dtype=dtype) + 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_it_predicts_the_change_of_a_linear_models_output(bias):
    net, x = model(16, 20, 12, bias=bias), data(16)
    batches = [x[:40], x[40:]]
    calibration = surgery.calibrate(net, batches, progress=False)
    found = surgery.sensitivity(net, calibration, batches, HALF)
    assert list(found) == ["0", "1"] and found["1"] == pytest.approx(1.0, rel=1e-9)
    moments = calibration["0"].centred() if bias else calibration["0"]
    with torch.no_grad():
        before = net(x)
        W = net[0].weight.clone()
        report = surgery.compress_(net, {"0": HALF}, calibration=calibration)
        change = (net(x) - before).square().sum(-1).mean().item()
    loss = report.compressed[0].calibrated_error ** 2 * metric_of(moments, W).squared(W)
    assert change == pytest.approx(found["0"] * loss, rel=1e-9)


def test_weights_of_the_sensitivity_beat_equal_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double()
    net[4].weight.data *= 0.02  # what comes out of it, and hence of all before it, is small
    net.append(nn.Linear(24, 4).double())
    x = data(24, 256)
    calibration = surgery.calibrate(net, [x], progress=False)
    low = structmat.LowRankConfig(ratio=1)
    changes = []
    for weight in (surgery.sensitivity(net, calibration, [x[:64]], HALF), None):
        plan = surgery.allocate(net, 0.5, low, calibration=calibration, weight=weight)
        copy = nn.Sequential(*net)
        surgery.compress_(copy, plan, calibration=calibration)
        with torch.no_grad():
            changes.append((copy(x) - net(x)).square().sum().item())
    assert changes[0] < changes[1]


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = data(16, dtype=torch.float32)
    calibration = surgery.calibrate(net, [x], progress=False)
    found = [surgery.sensitivity(net, calibration, iter([x]), HALF) for _ in range(2)]
    assert found[0] == found[1] and net.training and net[1].training
    calls = 0

    def forward(net, batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("stop")
        return net(batch)

    with pytest.raises(RuntimeError, match="stop"):
        surgery.sensitivity(net, calibration, [x], HALF, forward=forward)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters()) and type(net[0]) is nn.Linear


def test_other_hooks_see_the_replaced_output():
    net, x = model(16, 16, 8), data(16)
    calibration = surgery.calibrate(net, [x], progress=False)
    plain = surgery.sensitivity(net, calibration, [x], HALF)
    net[1].register_forward_hook(lambda _, __, y: 3 * y)
    tripled = surgery.sensitivity(net, calibration, [x], HALF)
    assert tripled == pytest.approx({k: 9 * v for k, v in plain.items()}, rel=1e-9)


def test_layers_that_lose_nothing_get_the_smallest_weight():
    net, x = model(16, 16, 16, 16), data(16)
    with torch.no_grad():
        net[1].weight.copy_(torch.ones(16, 16))  # of rank 1
    calibration = surgery.calibrate(net, [x], progress=False)
    found = surgery.sensitivity(net, calibration, [x], HALF)
    assert found["1"] == min(found["0"], found["2"]) > 0
    alone = surgery.sensitivity(net, calibration, [x], {"1": HALF})
    assert alone == {"1": 1.0}


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, input_ids, attention_mask=None):
        hidden = torch.tanh(self.fc(self.embed(input_ids)))
        return types.SimpleNamespace(logits=self.head(hidden), last_hidden_state=hidden)


def test_logits_are_compared_as_distributions_and_padding_does_not_count():
    net = Classifier(5).double()
    ids = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:2, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    calibration = surgery.calibrate(net, [batch], progress=False)
    config = {"*": structmat.LowRankConfig(rank=2)}
    found = surgery.sensitivity(net, calibration, [batch], config)
    other = ids.clone()
    other[mask == 0] = 7
    assert surgery.sensitivity(net, calibration, [{**batch, "input_ids": other}], config) == found
    moments = calibration["head"].centred()
    result = structmat.project(net.head.weight, config["*"], moments)
    with torch.no_grad():
        hidden = net(ids).last_hidden_state[mask != 0]
        before = net.head(hidden).log_softmax(-1)
        moved = (hidden - calibration["head"].mean) @ (result.matrix.to_dense() - net.head.weight).mT
        after = (net.head(hidden) + moved).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    loss = result.calibrated_error**2 * metric_of(moments, net.head.weight).squared(net.head.weight.detach())
    assert found["head"] == pytest.approx(kl / loss, rel=1e-9)
    squared = surgery.sensitivity(net, calibration, [batch], config, distance="squared")
    assert squared["head"] == pytest.approx(1.0, rel=1e-9)
    own = surgery.sensitivity(
        net, calibration, [batch], config, output=lambda o, b: o.last_hidden_state[b["attention_mask"] != 0]
    )
    assert own["head"] == own["fc"] > 0  # the head does not move it
    scores = surgery.sensitivity(Classifier(1).double(), calibration, [batch], {"fc": config["*"]})
    assert scores["fc"] > 0  # one class has no distribution: the squared difference


def test_conv1d_and_low_precision():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    net = nn.Sequential(transformers.Conv1D(12, 8), nn.Linear(12, 8))
    x = data(8, dtype=torch.float32)
    calibration = surgery.calibrate(net, [x], progress=False)
    found = surgery.sensitivity(net, calibration, [x.view(4, 16, 8)], HALF)
    assert found["1"] == pytest.approx(1.0, rel=1e-3) and found["0"] > 0
    half = model(16, 16, 8, dtype=torch.bfloat16)
    x = data(16, dtype=torch.bfloat16)
    found = surgery.sensitivity(half, surgery.calibrate(half, [x], progress=False), [x], HALF)
    assert found["1"] == pytest.approx(1.0, rel=0.1)


def test_errors_name_what_is_wrong():
    net, x = model(16, 16, 8), data(16)
    calibration = surgery.calibrate(net, [x], progress=False)
    with pytest.raises(ValueError, match="batches is empty"):
        surgery.sensitivity(net, calibration, [], HALF)
    with pytest.raises(TypeError, match="batches must be an iterable of batches, got a Tensor"):
        surgery.sensitivity(net, calibration, x, HALF)
    with pytest.raises(ValueError, match="distance must be"):
        surgery.sensitivity(net, calibration, [x], HALF, distance="cosine")
    with pytest.raises(ValueError, match="no moments of 1"):
        surgery.sensitivity(net, {"0": calibration["0"]}, [x], HALF)
    with pytest.raises(ValueError, match="without logits or last_hidden_state: give output"):
        surgery.sensitivity(net, calibration, [x], HALF, forward=lambda net, batch: {"y": net(batch)})
    with pytest.raises(TypeError, match="output must return a tensor, got a list"):
        surgery.sensitivity(net, calibration, [x], HALF, output=lambda *_: [1])
    with pytest.raises(ValueError, match=r"with 0 replaced, the output of batch 1 \(counted from 0\)"):
        surgery.sensitivity(net, calibration, [x, x * float("nan")], HALF)
    with pytest.raises(structmat.BudgetError, match="cannot take their config"):
        surgery.sensitivity(net, calibration, [x], structmat.LowRankConfig(max_params=3))
