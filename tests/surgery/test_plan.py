"""Plans: saved, loaded, and only taken by the model that they are of."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

CONFIGS = {
    "0": [structmat.LowRankConfig(ratio=1), structmat.MonarchConfig(nblocks=(2, 4))],
    "1": structmat.PixelflyConfig(block=(8, 8), split="rule"),
    "a[[]0]": structmat.BlockDiagonalConfig(),
}


def model(width=32):
    torch.manual_seed(0)
    return nn.ModuleDict({"0": nn.Linear(32, 32), "1": nn.Linear(32, width), "a[0]": nn.Linear(width, 16)})


def plan_of(net, **kwargs):
    return surgery.allocate(net, 0.7, CONFIGS, rule="error", **kwargs)


def flops(weight):
    return 2.0 * weight.numel() if isinstance(weight, torch.Tensor) else float(weight.flops)


@pytest.mark.parametrize("cost", ["params", flops])
def test_round_trip(tmp_path, cost):
    plan = plan_of(model(), cost=cost)
    plan.save(tmp_path / "plan.json")
    again = surgery.Allocation.load(tmp_path / "plan.json")
    assert again.configs == plan.configs and again.report == plan.report and again.costs == plan.costs
    for name in ("budget", "spent", "unit", "gap", "error", "params", "unused"):
        assert getattr(again, name) == getattr(plan, name)
    assert str(again) == str(plan)
    one, two = model(), model()
    reports = surgery.compress_(one, plan), surgery.compress_(two, again)
    assert reports[0].params_after == reports[1].params_after and again.configs
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_plan_that_another_rule_made_and_replace(tmp_path):
    plan = surgery.allocate(model(), 0.5, structmat.MonarchConfig(nblocks=2))
    plan.save(tmp_path / "plan.json")
    again = surgery.Allocation.load(tmp_path / "plan.json")
    assert again.error is None and surgery.replace_(model(), again).params_after == plan.params


@pytest.mark.parametrize("change", [surgery.compress_, surgery.replace_])
def test_a_plan_for_another_model(change):
    plan = plan_of(model())
    other = model(width=24)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"plan for another model") as error:
        change(other, plan)
    assert "1: 32 x 32 in the plan, 24 x 32 in the model" in str(error.value)
    assert "a[0]: 16 x 32 in the plan, 16 x 24 in the model" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    fewer = nn.ModuleDict({"0": nn.Linear(32, 32), "1": nn.LayerNorm(32)})
    with pytest.raises(
        ValueError, match=r"1: a linear layer in the plan, LayerNorm in the model\n.*a.*not in the model"
    ):
        change(fewer, plan)
    done = model()
    surgery.compress_(done, plan)
    with pytest.raises(ValueError, match=r"in the plan, .*Linear in the model"):  # it has been compressed already
        change(done, plan)
    with pytest.raises(TypeError, match="model must be"):
        change("net", plan)


def test_files_that_are_no_plans(tmp_path):
    path = tmp_path / "plan.json"
    plan_of(model()).save(path)
    text = path.read_bytes()
    for size in (0, 1, len(text) // 2, len(text) - 3):
        path.write_bytes(text[:size])
        with pytest.raises(ValueError, match=r"plan\.json is not a plan that can be read"):
            surgery.Allocation.load(path)
    good = json.loads(text)
    for change, said in (
        ({"version": 2}, "version 2, this structmat reads 1"),
        ({"format": "other"}, "no format 'structmat.plan'"),
        ({"configs": {"0": {"structure": "toast"}}}, "unknown structure 'toast'"),
        ({"configs": {"0": {"structure": "lowrank", "width": 3}}}, "lowrank takes"),
        ({"configs": [1]}, "not a plan"),
        ({"budget": "much"}, "budget is no number"),
        ({"report": {}}, "not the JSON of a Report"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=said):
            surgery.Allocation.load(path)
    del good["costs"]
    for content in (json.dumps(good), "[1, 2]", "\x00\x01", "3"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a plan that can be read"):
            surgery.Allocation.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a plan that can be read"):
        surgery.Allocation.load(path)
    with pytest.raises(OSError):
        surgery.Allocation.load(tmp_path / "none.json")
    with pytest.raises(OSError):
        plan_of(model()).save(tmp_path / "none" / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]
