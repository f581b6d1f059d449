"""Checkpoints: a resumed run ends at the bits of an uninterrupted one; files of other runs are refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import structmat
from structmat import surgery

LOWRANK = structmat.LowRankConfig(ratio=0.5)


class Interrupted(Exception):
    pass


def noisy(data, shuffle_with=None):
    """A loader that draws from every global generator, or from one of its own."""

    def collate(rows):
        noise = float(np.random.rand()) + random.random()
        return torch.stack(rows) + noise * torch.rand(()) * 0.1

    return torch.utils.data.DataLoader(data, 8, shuffle=True, collate_fn=collate, generator=shuffle_with)


def seed():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("own", [False, True], ids=["global generators", "own generator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(mlp, inputs, tmp_path, device, mode, dtype, own, stop):
    data = torch.cat(inputs(3)).to(dtype)[:41]  # 6 batches a round, the last one of a single row

    def run(stop=None, path=None):
        """Heal a fresh pair of models, with an exception in the middle if asked for."""
        compressed, dense = mlp(LOWRANK, device, dtype, dropout=0.3)
        loader = noisy(data, torch.Generator().manual_seed(7) if own else None)
        calls = []

        def forward(model, x):
            if model is dense:
                calls.append(1)
                if stop is not None and len(calls) > 2 * stop:
                    raise Interrupted
            return model(x)

        def validate(model):
            return surgery.healing_loss(model(data.to(device)), dense(data.to(device))).item()

        report = surgery.heal(
            compressed, dense, loader, 17, mode=mode, lr=1e-2, accumulate=2, dropout=mode == "distill",
            forward=forward, validate=validate, validate_every=3, checkpoint=path, checkpoint_every=4, progress=False,
        )  # fmt: skip
        return report, compressed

    seed()
    whole, expected = run()
    random_after = torch.rand(3)
    path = tmp_path / "heal.pt"
    seed()
    with pytest.raises(Interrupted):
        run(stop, path)
    assert path.exists()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed, model = run(None, path)
    assert torch.equal(torch.rand(3), random_after)
    assert (resumed.losses, resumed.validations) == (whole.losses, whole.validations)
    assert (resumed.best_step, resumed.layers) == (whole.best_step, whole.layers) and len(set(whole.losses)) > 10
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # A finished run is not done again.
    again, model = run(None, path)
    assert (again.losses, again.seconds) == (resumed.losses, resumed.seconds)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_an_iterator_is_taken_up_where_it_was(mlp, inputs, tmp_path):
    compressed, dense = mlp(LOWRANK)
    whole = surgery.heal(compressed, dense, inputs(8), 8, progress=False)
    options = {"checkpoint": tmp_path / "heal.pt", "checkpoint_every": 2, "progress": False}
    other, dense = mlp(LOWRANK)
    with pytest.raises(ValueError, match="ended after 5 batches: 5 of 8 steps were done"):
        surgery.heal(other, dense, iter(inputs(8)[:5]), 8, **options)
    other, dense = mlp(LOWRANK)
    assert surgery.heal(other, dense, iter(inputs(8)), 8, **options).losses == whole.losses
    assert all(torch.equal(t, compressed.state_dict()[name]) for name, t in other.state_dict().items())


def test_checkpoints_of_other_runs_are_refused(mlp, inputs, tmp_path):
    path = tmp_path / "heal.pt"
    compressed, dense = mlp(LOWRANK)
    good = {"lr": 1e-3, "checkpoint": path, "progress": False}
    surgery.heal(compressed, dense, inputs(), 4, **good)
    content = path.read_bytes()

    def attempt(words, change=None, config=LOWRANK, steps=4, **options):
        compressed, dense = mlp(config)
        if change:
            change(compressed, dense)
        before = {name: t.clone() for name, t in compressed.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            surgery.heal(compressed, dense, inputs(), steps, **(good | options))
        assert all(torch.equal(t, before[name]) for name, t in compressed.state_dict().items())
        assert path.read_bytes() == content

    attempt("lr: 0.001 there, 0.01 here", lr=1e-2)
    attempt("steps: 4 there, 5 here", steps=5)
    attempt("mode: 'distill' there, 'layerwise' here", mode="layerwise")
    attempt("the trained parameters", config=structmat.LowRankConfig(ratio=0.4))
    attempt("the trained parameters", train="all")
    attempt("the dense model", change=lambda c, d: d[0].weight.data.mul_(1.01))
    attempt("the compressed model's other parameters", change=lambda c, d: c[5].weight.data.add_(1e-3))
    path.write_bytes(b"something else")
    content = path.read_bytes()
    attempt("no checkpoint of heal")
    torch.save({"weights": 1}, path)
    content = path.read_bytes()
    attempt("no checkpoint of heal")


def test_other_data_are_noticed(mlp, inputs, tmp_path):
    path = tmp_path / "heal.pt"
    compressed, dense = mlp(LOWRANK)
    surgery.heal(compressed, dense, lambda: inputs(6), 4, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="batches has 3 batches, the checkpoint was made after 4"):
        surgery.heal(compressed, dense, lambda: inputs(3), 4, checkpoint=path, progress=False)
