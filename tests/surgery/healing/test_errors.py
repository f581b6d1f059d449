"""heal refuses what it cannot do, and says what happened when numbers break."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

LOWRANK = structmat.LowRankConfig(ratio=0.5)


def same(model, state):
    return all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.fixture
def refused(mlp, inputs, snapshot):
    """A function that heals with some arguments changed, expects an error, and finds both models as they were."""

    def attempt(kind, words, compressed=None, dense=None, batches=None, steps=4, **options):
        first, second = mlp(LOWRANK)
        compressed, dense = compressed or first, dense or second
        before = (snapshot(compressed), snapshot(dense)) if isinstance(compressed, nn.Module) else None
        with pytest.raises(kind, match=words):
            surgery.heal(compressed, dense, inputs() if batches is None else batches, steps, progress=False, **options)
        if before:
            assert same(compressed, before[0]["state"]) and same(dense, before[1]["state"])
            for model, was in zip((compressed, dense), before, strict=True):
                now = snapshot(model)
                assert (now["flags"], now["modes"], now["forward"]) == (was["flags"], was["modes"], was["forward"])
                assert not any(m._forward_hooks for m in model.modules())

    return attempt


def test_arguments(refused):
    for kind, words, options in [
        (ValueError, "mode must be one of", {"mode": "both"}),
        (TypeError, "steps must be an integer", {"steps": 1.5}),
        (ValueError, "steps must be at least 1", {"steps": 0}),
        (ValueError, "lr must be a positive number", {"lr": 0.0}),
        (ValueError, "clip must be a positive number", {"clip": -1.0}),
        (ValueError, "warmup must be at most steps", {"warmup": 5}),
        (ValueError, "accumulate must be at least 1", {"accumulate": 0}),
        (ValueError, "temperature must be", {"temperature": -1.0}),
        (ValueError, "float16 would need loss scaling", {"autocast": torch.float16}),
        (ValueError, "are for mode", {"mode": "layerwise", "dropout": True}),
        (TypeError, "train must be", {"train": "some"}),
        (ValueError, "chooses no parameter", {"train": lambda name, p: False}),
        (ValueError, "trains structured layers only.*5.weight", {"train": "all", "mode": "layerwise"}),
        (TypeError, "hidden must be a sequence", {"hidden": "0"}),
        (ValueError, "has a name like 'x'", {"hidden": ["0", "x"]}),
        (ValueError, "needs a transformers model", {"gradient_checkpointing": True}),
        (TypeError, "got one dict: use", {"batches": {"input": torch.zeros(2, 32)}}),
        (TypeError, "batches must be an iterable", {"batches": 3}),
        (ValueError, "batches is empty", {"batches": []}),
        (TypeError, "a batch must be a mapping", {"batches": [3]}),
        (ValueError, "does forward turn gradients off", {"forward": torch.no_grad()(lambda model, x: model(x))}),
        (ValueError, "called none of the layers", {"mode": "layerwise", "forward": lambda model, x: x}),
    ]:
        refused(kind, words, **options)


def test_models(refused, mlp):
    compressed, dense = mlp(LOWRANK)
    refused(TypeError, "compressed must be a torch.nn.Module", compressed=3)
    refused(ValueError, "are one model", compressed, compressed)
    refused(ValueError, "is a DataParallel", nn.DataParallel(compressed))
    refused(ValueError, "has no structured layer", copy.deepcopy(dense))
    refused(ValueError, r"0\.bias is float16", copy.deepcopy(compressed).half())
    refused(ValueError, "output has shape", dense=dense[:3])
    refused(ValueError, "dense has no module '3'", dense=dense[:3], mode="layerwise")
    shared = copy.deepcopy(dense)
    shared[0].bias = compressed[0].bias
    refused(ValueError, r"0\.bias is a parameter of dense too", compressed, shared)


@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_nan_in_a_batch_names_the_step_and_the_weights_go_back(mlp, inputs, snapshot, mode):
    batches = inputs(60)
    batches[55][0, 0] = float("nan")
    compressed, dense = mlp(LOWRANK)
    surgery.heal(compressed, dense, batches[:50], 50, mode=mode, warmup=0, lr=1e-3, progress=False)
    compressed, dense = mlp(LOWRANK)
    start = snapshot(compressed)
    with pytest.raises(ValueError, match="step 55: the loss is nan; the weights are again those after 50 steps"):
        surgery.heal(compressed, dense, batches, 60, mode=mode, lr=1e-3, progress=False)
    assert not same(compressed, start["state"]) and all(p.isfinite().all() for p in compressed.parameters())
    assert snapshot(compressed)["flags"] == start["flags"]
    compressed, dense = mlp(LOWRANK)
    values, seen = iter([3.0, 1.0, 2.0]), []

    def validate(model):
        seen.append(model[0].weight.left.detach().clone())
        return next(values)

    options = {"validate": validate, "validate_every": 20, "progress": False}
    with pytest.raises(ValueError, match="those after 20 steps"):
        surgery.heal(compressed, dense, batches, 60, mode=mode, **options)
    assert torch.equal(compressed[0].weight.left, seen[1])


def test_a_gradient_without_end_changes_nothing(mlp, inputs, snapshot):
    compressed, dense = mlp(LOWRANK)
    before = snapshot(compressed)["state"]

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    with pytest.raises(ValueError, match=r"step 0: the gradients' norm is (nan|inf)"):
        surgery.heal(compressed, dense, inputs(), 4, forward=lambda m, x: Steep.apply(m(x)), progress=False)
    assert same(compressed, before)


def test_an_iterator_that_ends_leaves_what_was_done(mlp, inputs):
    compressed, dense = mlp(LOWRANK)
    with pytest.raises(ValueError, match="iterator, which ended after 7 batches: 3 of 10 steps were done"):
        surgery.heal(compressed, dense, iter(inputs(7)), 10, accumulate=2, warmup=1, progress=False)
    other, dense = mlp(LOWRANK)
    calls = []

    def forward(model, x):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        surgery.heal(other, dense, inputs(7), 10, accumulate=2, warmup=1, forward=forward, progress=False)
    assert same(compressed, other.state_dict())
