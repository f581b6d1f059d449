"""Healing within a time makes a compressed model more like the dense one."""

import copy

import torch
from harness.compression import ALTERNATIVES, Problem
from harness.healing import heal

from structmat import surgery


def test_a_pivoted_plan_is_better_and_heals(capsys):
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 16))
    x = torch.randn(256, 24) * torch.logspace(0, -1, 24)
    batches = [(part,) for part in x.split(64)]
    problem = Problem(copy.deepcopy(dense), "*", batches, surgery.calibrate(dense, batches), None, 0.5)

    def distance(model):
        return ((model(x) - dense(x)).norm() / dense(x).norm()).item()

    models = {name: ALTERNATIVES[f"{name}, allocated"](problem)[0] for name in ("low rank", "pivoted low rank")}
    before = distance(models["pivoted low rank"])
    assert before < distance(models["low rank"])
    seconds, facts = heal(models["pivoted low rank"], problem.model, batches, 1.0, [1e-12, 1e-3], torch.device("cpu"))
    assert distance(models["pivoted low rank"]) < 0.9 * before
    assert 0 < seconds < 30
    assert facts["lr"] == 1e-3 and facts["tried"]["0.001"] < facts["tried"]["1e-12"]
    assert "healed: " in capsys.readouterr().out
