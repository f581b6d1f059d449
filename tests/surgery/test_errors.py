"""What compress_ and its sisters refuse, with nothing half done."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

MONARCH = structmat.MonarchConfig(nblocks=4, rank=2)


def mlp(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 36, **kwargs), nn.Tanh(), nn.Linear(36, 20, **kwargs))


def test_nothing_to_replace():
    with pytest.raises(
        ValueError, match=r"nothing to replace: looked for .*nn\.Linear or transformers' Conv1D in 1 module$"
    ):
        surgery.compress_(nn.Sequential(), MONARCH)
    with pytest.raises(ValueError, match=r"matches one of 'typo\.\*' in 4 modules\n  0: no pattern matches its name"):
        surgery.compress_(mlp(), {"typo.*": MONARCH})
    with pytest.raises(ValueError, match="that filter_fn accepts in 4 modules"):
        surgery.compress_(mlp(), MONARCH, filter_fn=lambda name, module: False)
    with pytest.raises(ValueError, match=r"nothing to replace: looked for structmat.nn.StructuredLinear in 4 modules"):
        surgery.densify_(mlp())


def test_the_model_itself_is_a_layer():
    with pytest.raises(ValueError, match="itself a Linear, which cannot be replaced in place"):
        surgery.compress_(nn.Linear(8, 8), MONARCH)
    with pytest.raises(ValueError, match="itself a structured layer"):
        surgery.densify_(structmat.nn.LowRankLinear(8, 8, rank=2))


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        surgery.compress_([nn.Linear(8, 8)], MONARCH)
    with pytest.raises(TypeError, match=r"config must be a Config .* got str"):
        surgery.compress_(mlp(), "monarch")
    with pytest.raises(TypeError, match=r"got dict for '0'"):
        surgery.compress_(mlp(), {"0": {"structure": "monarch"}})


def assert_refused(model, config, error, match, call=surgery.compress_, **kwargs):
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=match) as caught:
        call(model, config, **kwargs)
    assert caught.type is error
    assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_all_impossible_layers_are_named_and_nothing_is_done(dry_run):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(3, 64), nn.Linear(64, 64))
    config = structmat.LowRankConfig(ratio=0.1)
    match = r"(?s)2 of 4 layers .* nothing was changed.*filter_fn.*\n  1: lowrank needs.*\n  2: lowrank needs"
    assert_refused(model, config, structmat.BudgetError, match, dry_run=dry_run)
    assert_refused(model, structmat.BlockDiagonalConfig(nblocks=5), ValueError, r"(?s)\n  1: nblocks.*\n  2: nblocks")
    assert_refused(model, config, structmat.BudgetError, match, call=surgery.replace_)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    assert_refused(model, MONARCH, ValueError, "NaN or infinite entries, nothing was changed: 2;")
    assert len(surgery.compress_(model, MONARCH, dry_run=True).compressed) == 2


def test_an_interruption_changes_nothing(monkeypatch):
    model = mlp()
    real, calls = structmat.project, []

    def project(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("structmat.surgery.fitting.project", project)
    with pytest.raises(KeyboardInterrupt):
        surgery.compress_(model, MONARCH)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_meta_device():
    model = mlp(device="meta")
    assert_refused(model, MONARCH, ValueError, "weights of 0, 2 are on the meta device")
    dry = surgery.compress_(model, MONARCH, dry_run=True)
    assert isinstance(model[0], nn.Linear)
    report = surgery.replace_(model, MONARCH)
    assert model[0].weight.left.is_meta
    assert model[0].bias.is_meta
    assert report.model_params_after == dry.model_params_after == sum(p.numel() for p in model.parameters())
    assert all(row.error is None for row in dry.rows)
    assert "dry run: nothing was changed" in str(dry)


class DistributedDataParallel(nn.Module):  # told by its name: the real one needs a process group
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_distributed_wrappers_are_refused():
    with pytest.raises(ValueError, match="the model is a DistributedDataParallel, which has taken over"):
        surgery.compress_(DistributedDataParallel(mlp()), MONARCH)


def test_a_model_of_pointwise_convolutions_says_that_they_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU(), torch.nn.Conv1d(16, 8, 1))
    with pytest.raises(
        ValueError, match="4 modules; 2 of them are convolutions, which are left alone, those of kernel 1"
    ):
        surgery.compress_(model, structmat.LowRankConfig(ratio=0.5))
