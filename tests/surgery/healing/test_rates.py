"""learning_rates: the best of several is found, the models are left as they were, bad input is named."""

from __future__ import annotations

import math

import pytest
import torch

from structmat import surgery


def test_the_rate_that_heals_is_found_and_nothing_changes(mlp, inputs, config, device):
    compressed, dense = mlp(config, device)
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    torch.manual_seed(7)
    numbers = torch.get_rng_state()
    found = surgery.learning_rates(compressed, dense, inputs(20, device), [1e-6, 1e-2, 1e3], 20)
    assert list(found) == [1e-6, 1e-2, 1e3] and min(found, key=lambda rate: found[rate]) == 1e-2
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in compressed.parameters())


def test_a_trial_is_a_healing_of_as_many_steps(mlp, inputs, config):
    compressed, dense = mlp(config)
    held = inputs(20)[-2:]

    def judge(model):
        return sum(surgery.healing_loss(model(x), dense(x)).item() for x in held) / len(held)

    found = surgery.learning_rates(compressed, dense, inputs(20)[:-2], [1e-2], 15, validate=judge)
    default = surgery.learning_rates(compressed, dense, inputs(20), [1e-2], 15)
    # The last validation is that of the run, not the best one.
    report = surgery.heal(
        compressed, dense, inputs(20)[:-2], 15, lr=1e-2, validate=judge, validate_every=15, progress=False
    )
    assert found[1e-2] == report.validations[-1][1] == pytest.approx(default[1e-2], rel=1e-5)


def test_layerwise_trials_are_judged_end_to_end(mlp, inputs, config):
    compressed, dense = mlp(config)
    found = surgery.learning_rates(compressed, dense, inputs(20), [1e-6, 1e-2], 30, mode="layerwise")
    assert found[1e-2] < found[1e-6]


def test_a_rate_that_breaks_the_model_counts_as_infinite(mlp, inputs, config):
    compressed, dense = mlp(config)
    for rate in (1e30, 1e-3):
        values = iter([1.0, float("nan") if rate > 1 else 0.5])
        found = surgery.learning_rates(compressed, dense, inputs(4), [rate], 2, validate=lambda _, v=values: next(v))
        assert math.isinf(found[rate]) == (rate > 1)

    def steep(model, batch):
        out = model(batch)
        return out * 1e30 if steep.broken and model is compressed else out

    steep.broken = True
    found = surgery.learning_rates(compressed, dense, inputs(4), [1e-3], 2, validate=lambda _: 1.0, forward=steep)
    assert found == {1e-3: math.inf}
    steep.broken = False
    found = surgery.learning_rates(compressed, dense, inputs(4), [1e-3], 2, validate=lambda _: 1.0, forward=steep)
    assert found == {1e-3: 1.0}


def test_bad_input_is_named(mlp, inputs, config):
    compressed, dense = mlp(config)
    batches = inputs(4)
    for rates in ([], [0.0], [-1e-3], [float("nan")]):
        with pytest.raises(ValueError, match="rates must be positive numbers, at least one"):
            surgery.learning_rates(compressed, dense, batches, rates)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        surgery.learning_rates(compressed, dense, batches, steps=0)
    with pytest.raises(TypeError, match="learning_rates sets lr itself"):
        surgery.learning_rates(compressed, dense, batches, lr=1e-3)
    for few in (batches[:1], iter(batches)):
        with pytest.raises(ValueError, match="batches must be a list of at least two"):
            surgery.learning_rates(compressed, dense, few)
    with pytest.raises(ValueError, match="mode must be one of"):
        surgery.learning_rates(compressed, dense, batches, mode="else")
