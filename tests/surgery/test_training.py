"""Training recipes: the loss and the optimizer go on over an exchange of layers; schedule; distillation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import structmat
from structmat import surgery
from structmat.testing import market

CONFIGS = [
    structmat.MonarchConfig(nblocks=4, ratio=0.5),
    structmat.LowRankConfig(ratio=0.5),
    structmat.BlockDiagonalConfig(ratio=0.5),
    structmat.ButterflyConfig(ratio=0.8),
]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(128, 32, generator=GENERATOR)
Y = X[:, :8].argmax(-1)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def structured(config):
    net = mlp()
    surgery.replace_(net, {"0": config, "2": config})
    return net


def train(net, optimizer, steps, scheduler=None):
    for _ in range(steps):
        loss = F.cross_entropy(net(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return F.cross_entropy(net(X), Y).item()


def holds_exactly(optimizer, net):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return len(held) == len(set(held)) and set(held) == set(net.parameters()) and set(optimizer.state) <= set(held)


# ---------------------------------------------------------------- sparse to dense
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.structure)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_densify_keeps_the_loss_and_the_optimizer_goes_on(config, make):
    net = structured(config)
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    before = train(net, optimizer, 15, scheduler)
    groups, rate = optimizer.param_groups, optimizer.param_groups[0]["lr"]
    kept = {p: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in net[4].parameters()}
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    assert abs(F.cross_entropy(net(X), Y).item() - before) < 1e-5
    assert optimizer.param_groups is groups and groups[0]["lr"] == rate < 0.05
    assert holds_exactly(optimizer, net)
    for p, state in kept.items():
        torch.testing.assert_close(dict(optimizer.state[p]), state, rtol=0, atol=0)
    weights = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
    assert train(net, optimizer, 25, scheduler) < before
    assert groups[0]["lr"] == pytest.approx(0, abs=1e-8)
    assert not torch.equal(net[0].weight, weights[0]) and not torch.equal(net[2].weight, weights[1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.structure)
def test_adam_starts_anew_for_the_new_weights_only(config):
    net = structured(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    train(net, optimizer, 5)
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    assert net[0].weight not in optimizer.state and int(optimizer.state[net[4].weight]["step"]) == 5
    old = net[0].weight.detach().clone()
    train(net, optimizer, 1)
    # The first step of Adam has the length lr in every entry, by the sign of the gradient.
    moved, large = (net[0].weight - old), net[0].weight.grad.abs() > 1e-5
    torch.testing.assert_close(moved[large], -1e-2 * net[0].weight.grad[large].sign(), rtol=2e-3, atol=0)
    assert int(optimizer.state[net[0].weight]["step"]) == 1 and int(optimizer.state[net[4].weight]["step"]) == 6


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.structure)
def test_sgd_momentum_is_the_velocity_of_the_product(config):
    net = structured(config).double()
    # Factors in a group of their own, with another lr than the rest: structmat.nn.parameter_groups does so.
    groups = structmat.nn.parameter_groups(net, 0.0)
    groups[1]["lr"] = 0.02
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(X.double()), Y).backward()
        optimizer.step()
    values, step = {}, 1e-6
    for sign in (-1, 1):  # the factors go on by a small part of their velocity, and back
        moved = copy.deepcopy(net)
        for p, q in zip(net[0].weight.parameters(), moved[0].weight.parameters(), strict=True):
            q.data += sign * step * optimizer.state[p]["momentum_buffer"]
        values[sign] = moved[0].weight().to_dense().detach()
    velocity = (values[1] - values[-1]) / (2 * step)
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    buffer = optimizer.state[net[0].weight]["momentum_buffer"]
    assert (buffer - velocity).norm() < 1e-8 * velocity.norm() and buffer.dtype == torch.float64


@pytest.mark.parametrize("entry", [e for e in market() if e().ndim == 2 and not e().dtype.is_complex], ids=repr)
def test_every_class_goes_on_as_a_dense_layer(entry):
    net = nn.Sequential(structmat.nn.StructuredLinear(entry(seed=1)))
    m, n = net[0].out_features, net[0].in_features
    x, goal = torch.randn(9, n, generator=GENERATOR).double(), torch.randn(9, m, generator=GENERATOR).double()

    def loss():
        return F.mse_loss(net(x), goal)

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    loss().backward()
    optimizer.step()
    before, factors = loss().item(), list(net[0].weight.parameters())
    velocity, step = torch.zeros(m, n, dtype=torch.float64), 1e-6
    for sign in (-1, 1):
        moved = copy.deepcopy(net)
        for p, q in zip(factors, moved[0].weight.parameters(), strict=True):
            q.data += sign * step * optimizer.state[p]["momentum_buffer"]
        velocity += sign * moved[0].weight().to_dense().detach() / (2 * step)
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    assert loss().item() == pytest.approx(before, rel=1e-10)
    assert holds_exactly(optimizer, net) or not factors  # a permutation has nothing to train, and stays so
    if factors:
        assert torch.dist(optimizer.state[net[0].weight]["momentum_buffer"], velocity) <= 1e-6 * (1 + velocity.norm())
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    assert loss().item() <= before


def test_velocity_of_a_low_rank_product_by_hand_with_two_learning_rates():
    layer = structmat.nn.LowRankLinear(6, 5, rank=2, bias=False)
    net = nn.Sequential(layer)
    left, right = layer.weight.left, layer.weight.right
    optimizer = torch.optim.SGD([{"params": [left], "lr": 0.1}, {"params": [right], "lr": 0.3}], momentum=0.9)
    net(torch.randn(7, 6, generator=GENERATOR)).square().sum().backward()
    optimizer.step()
    dl, dr = (optimizer.state[p]["momentum_buffer"] for p in (left, right))
    want = (dl @ right + 3 * left @ dr).detach()
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 0]
    torch.testing.assert_close(optimizer.state[net[0].weight]["momentum_buffer"], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype):
    net = nn.Sequential(structmat.nn.MonarchLinear(16, 16, dtype=dtype))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(4, 16, dtype=dtype, generator=GENERATOR)
    net(x).abs().square().sum().backward()
    optimizer.step()
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    buffer = optimizer.state[net[0].weight]["momentum_buffer"]
    assert buffer.dtype == dtype and buffer.shape == (16, 16) and buffer.abs().sum() > 0
    net(x).abs().square().sum().backward()
    optimizer.step()
    assert holds_exactly(optimizer, net)


def test_groups_order_names_and_frozen_weights():
    net = structured(CONFIGS[1])
    net[2].weight.requires_grad_(False)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    (group,) = optimizer.param_groups
    assert group["params"] == [net[0].bias, net[0].weight, net[2].bias, net[4].weight, net[4].bias]
    assert group["param_names"] == ["0.bias", "0.weight.left", "2.bias", "4.weight", "4.bias"]
    assert not net[2].weight.requires_grad
    copy_of = torch.optim.AdamW([(n, p) for n, p in zip(group["param_names"], group["params"], strict=True)], lr=1e-3)
    copy_of.load_state_dict(optimizer.state_dict())


def test_shared_layers_enter_once():
    layer = structmat.nn.MonarchLinear(32, 32)
    twin = structmat.nn.MonarchLinear(32, 32)
    twin.weight = layer.weight
    net = nn.Sequential(layer, twin, nn.Linear(32, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = train(net, optimizer, 3)
    with surgery.carry_optimizer(net, optimizer):
        surgery.densify_(net)
    assert net[0].weight is net[1].weight and holds_exactly(optimizer, net)
    assert "momentum_buffer" in optimizer.state[net[0].weight]
    assert abs(F.cross_entropy(net(X), Y).item() - before) < 1e-5


def test_an_error_inside_leaves_the_optimizer_as_it_was():
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, 2)
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(structmat.BudgetError), surgery.carry_optimizer(net, optimizer):
        surgery.compress_(net, structmat.LowRankConfig(ratio=0.001))
    assert optimizer.param_groups[0]["params"] == held and len(optimizer.state) == len(held)
    for wrong in (torch.optim.LBFGS(net.parameters()), None):
        with (
            pytest.raises(TypeError, match="optimizer must be a torch"),
            surgery.carry_optimizer(net, wrong),
        ):
            pass


# ---------------------------------------------------------------- dense to sparse
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.structure)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_dense_to_sparse_with_a_teacher(config, make):
    net = mlp()
    train(net, torch.optim.AdamW(net.parameters(), lr=1e-2), 60)
    teacher = copy.deepcopy(net).eval()
    optimizer = make(net.parameters())
    train(net, optimizer, 1)
    with surgery.carry_optimizer(net, optimizer):
        surgery.compress_(net, {"0": config, "2": config})
    assert holds_exactly(optimizer, net) and net[4].weight in optimizer.state
    assert not any(p in optimizer.state for p in net[0].weight.parameters())
    losses = []
    for _ in range(40):
        with torch.no_grad():
            wanted = teacher(X)
        loss = surgery.distillation_loss(net(X), wanted, Y, temperature=2.0, alpha=0.7)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_replace_takes_the_fresh_bias_too():
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, 1)
    with surgery.carry_optimizer(net, optimizer):
        surgery.replace_(net, CONFIGS[1])
    assert holds_exactly(optimizer, net)


# ---------------------------------------------------------------- gradual schedule
def test_gradual_ratio_is_cubic_in_equal_steps():
    ratios = [surgery.gradual_ratio(step, 5, 20, 0.1, levels=4) for step in range(30)]
    assert ratios[:5] == [1.0] * 5 and ratios[20:] == [0.1] * 10
    assert sorted(ratios, reverse=True) == ratios and len(set(ratios)) == 5
    assert ratios[10] == pytest.approx(0.1 + 0.9 / 8)
    assert surgery.gradual_ratio(0, 0, 1, 0.3, levels=1) == pytest.approx(0.3)
    for wrong in ({"step": -1}, {"end": 5}, {"levels": 0}, {"final": 0}, {"final": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            surgery.gradual_ratio(**({"step": 0, "start": 5, "end": 20, "final": 0.1} | wrong))


@pytest.mark.parametrize("rule", ["equal", "error"])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: c.structure)
def test_gradual_training_reaches_the_ratio_and_learns(config, rule):
    net, ratio, sizes = mlp(), 1.0, []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(60):
        now = surgery.gradual_ratio(step, 10, 40, 0.3, levels=3)
        if now != ratio:
            ratio = now
            sizes.append(surgery.reproject_(net, ratio, {"[02]": config}, rule, optimizer).params_after)
            assert holds_exactly(optimizer, net)
        last = train(net, optimizer, 1)
    assert len(sizes) == 3 and sizes[0] > sizes[2] and sizes[0] >= sizes[1] >= sizes[2] and sizes[2] <= 0.3 * 2048
    assert last < 1.5


def test_reproject_starts_from_the_trained_product_and_spares_what_it_is_not_to_touch():
    net = structured(structmat.LowRankConfig(ratio=0.5))
    weight, other = net[0].weight().to_dense().detach(), net[2]
    report = surgery.reproject_(net, 0.25, structmat.LowRankConfig(ratio=1), filter_fn=lambda name, _: name == "0")
    expected = structmat.project(weight, structmat.LowRankConfig(ratio=0.25))
    assert net[2] is other and report.params_after == 256
    assert torch.dist(net[0].weight().to_dense(), expected.matrix.to_dense()) < 1e-5
    assert report.compressed[0].error == pytest.approx(expected.error, rel=1e-5)


def test_reproject_that_fails_changes_nothing():
    net = structured(structmat.LowRankConfig(ratio=0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 2)
    layers, held, output = list(net), list(optimizer.param_groups[0]["params"]), net(X)
    with pytest.raises(structmat.BudgetError):
        surgery.reproject_(net, 0.001, structmat.LowRankConfig(ratio=1), optimizer=optimizer)
    assert list(net) == layers and torch.equal(net(X), output)
    assert optimizer.param_groups[0]["params"] == held and len(optimizer.state) == len(held)


# ---------------------------------------------------------------- distillation
def test_distillation_loss_is_its_formula():
    student = torch.randn(3, 5, 7, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    teacher = torch.randn(3, 5, 7, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    targets = torch.randint(7, (3, 5), generator=GENERATOR)
    targets[0, :2] = -100
    T, alpha = 3.0, 0.3
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    kept = targets != -100
    hand = alpha * T**2 * (p * (p.log() - q.log())).sum(-1)[kept].mean()
    hand = hand + (1 - alpha) * -student.log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean()
    loss = surgery.distillation_loss(student, teacher, targets, T, alpha)
    torch.testing.assert_close(loss, hand, rtol=1e-12, atol=0)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    zero = surgery.distillation_loss(student, student, alpha=1)
    assert abs(zero.item()) < 1e-12


def test_distillation_loss_refuses():
    a = torch.zeros(4, 3)
    for args, words in [
        ((a, torch.zeros(4, 2)), "teacher_logits must have the shape"),
        ((a, a), "without targets alpha must be 1"),
        ((a, a, torch.zeros(3, dtype=torch.int64)), "targets must have shape"),
        ((a, a, None, 0.0, 1), "temperature must be positive"),
        ((a, a, None, 1.0, 2), "alpha in"),
    ]:
        with pytest.raises(ValueError, match=words):
            surgery.distillation_loss(*args)
    with pytest.raises(TypeError, match="student_logits must be a torch"):
        surgery.distillation_loss([1.0], a)
