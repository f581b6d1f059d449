"""heal: losses fall, only what is to be trained changes, everything else is put back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery


def error(compressed, dense, x):
    with torch.no_grad():
        return surgery.healing_loss(compressed(x), dense(x)).item()


# ---------------------------------------------------------------- it learns
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_a_perceptron_heals(mlp, inputs, config, device, mode):
    compressed, dense = mlp(config, device)
    held = inputs(40, device)[-1]
    before = error(compressed, dense, held)
    report = surgery.heal(compressed, dense, inputs(32), 200, mode=mode, lr=1e-2, progress=False)
    assert report.final < 0.5 * report.first and len(report.losses) == report.steps == report.best_step == 200
    assert error(compressed, dense, held) < (0.5 if mode == "distill" else 0.9) * before
    assert report.params == sum(p.numel() for i in (0, 3) for p in compressed[i].parameters())
    assert sorted(report.layers) == (["0", "3"] if mode == "layerwise" else [])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_transformers_heal(language, config, device, kind, mode):
    compressed, dense, batches = language(kind, config)
    compressed.to(device)
    dense.to(device)
    report = surgery.heal(compressed, dense, batches, 40, mode=mode, lr=1e-2, progress=False)
    assert report.final < 0.7 * report.first
    if mode == "layerwise":
        assert len(report.layers) == sum(isinstance(m, structmat.nn.StructuredLinear) for m in compressed.modules())
        assert all(last < first for first, last in report.layers.values())


@pytest.mark.parametrize("shape", [(12, 20), (1, 1), (6, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_layerwise_reaches_the_least_squares_optimum(shape, bias):
    """A block-diagonal layer with an input of full rank: each block is an ordinary least-squares problem."""
    m, n = shape
    nblocks = 1 if m == 1 else 3
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(n, m, bias=bias)).double()
    mix = torch.randn(n, n).double()
    x = torch.randn(200, n).double() @ mix / n**0.5 + 0.5
    compressed = copy.deepcopy(dense)
    surgery.replace_(compressed, structmat.BlockDiagonalConfig(nblocks=nblocks))
    report = surgery.heal(compressed, dense, [x], 500, mode="layerwise", lr=3e-2, progress=False)
    with torch.no_grad():
        y, best = dense(x), torch.empty(200, m).double()
        for rows, columns in zip(
            torch.arange(m).tensor_split(nblocks), torch.arange(n).tensor_split(nblocks), strict=True
        ):
            block = x[:, columns]
            if bias:
                block = torch.cat([block, torch.ones(200, 1).double()], 1)
            best[:, rows] = block @ torch.linalg.lstsq(block, y[:, rows]).solution
        optimum = surgery.healing_loss(best, y).item()
        got = surgery.healing_loss(compressed(x), y).item()
    assert optimum - 1e-12 <= got <= 1.001 * optimum + 1e-5
    assert report.first > 1.1 * optimum + 1e-3


def test_hidden_states_of_named_modules(mlp, inputs):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    x = inputs(1)
    report = surgery.heal(compressed, dense, x, 1, hidden=["[14]"], hidden_weight=2.0, lr=1e-3, progress=False)
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    with torch.no_grad():
        terms = [surgery.healing_loss(compressed[:k](x[0]), dense[:k](x[0])) for k in (2, 5, 6)]
    assert report.first == pytest.approx((terms[0] + terms[1] + terms[2]).item(), rel=1e-5)
    alone = surgery.heal(compressed, dense, x, 1, hidden=["[14]"], output_weight=0, progress=False)
    assert alone.first == pytest.approx((terms[0] + terms[1]).item() / 2, rel=1e-5)


def test_padded_positions_do_not_count(language):
    outcomes = []
    for token in (3, 7):
        compressed, dense, batches = language("gpt2", structmat.LowRankConfig(ratio=0.5))
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = token
        surgery.heal(compressed, dense, batches, 3, progress=False)
        layerwise = surgery.heal(compressed, dense, batches, 3, mode="layerwise", progress=False)
        outcomes.append((layerwise.losses, [p.detach().clone() for p in compressed.parameters()]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-5)
    for one, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_steps(language):
    results = []
    for recompute in (False, True):
        compressed, dense, batches = language("bert", structmat.LowRankConfig(ratio=0.5))
        calls = []
        compressed.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_, c=calls: c.append(1))
        options = {"hidden": ["bert.encoder.layer.0.intermediate"], "gradient_checkpointing": recompute}
        report = surgery.heal(compressed, dense, batches, 3, progress=False, **options)
        results.append((report.losses, len(calls)))
        assert not any("forward" in vars(m) for m in compressed.modules())
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert (results[0][1], results[1][1]) == (3, 6)


# ---------------------------------------------------------------- what changes and what does not
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_only_structured_layers_change_and_all_is_put_back(language, snapshot, mode):
    compressed, dense, batches = language("bert", structmat.MonarchConfig(nblocks=4, ratio=0.5))
    compressed.train()
    compressed.bert.encoder.eval()
    dense.train()
    for name, p in compressed.named_parameters():
        p.requires_grad_("query" not in name)
    p = compressed.bert.embeddings.word_embeddings.weight
    p.grad = torch.ones_like(p)
    before, original = snapshot(compressed), snapshot(dense)
    surgery.heal(compressed, dense, batches, 3, mode=mode, lr=1e-2, progress=False)
    after = snapshot(compressed)
    structured = {
        f"{name}.{key}"
        for name, m in compressed.named_modules()
        if isinstance(m, structmat.nn.StructuredLinear)
        for key, _ in m.named_parameters()
    }
    changed = {name for name, t in after["state"].items() if not torch.equal(t, before["state"][name])}
    assert changed <= structured and len(changed) > 0.9 * len(structured)
    del before["state"], after["state"]
    assert after["flags"].keys() == before["flags"].keys()
    for name, (flag, grad) in before["flags"].items():
        assert after["flags"][name][0] == flag and after["flags"][name][1] is grad
    assert after["modes"] == before["modes"] and after["forward"] == before["forward"]
    now = snapshot(dense)
    assert all(torch.equal(t, original["state"][name]) for name, t in now["state"].items())
    assert now["modes"] == original["modes"] and now["flags"] == original["flags"]
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("what", ["all", "filter"])
def test_which_parameters_train(mlp, inputs, what):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    before = {name: p.detach().clone() for name, p in compressed.named_parameters()}
    train = "all" if what == "all" else lambda name, p: name in ("0.bias", "5.weight")
    surgery.heal(compressed, dense, inputs(), 3, train=train, progress=False)
    changed = {name for name, p in compressed.named_parameters() if not torch.equal(p, before[name])}
    assert changed == (set(before) if what == "all" else {"0.bias", "5.weight"})


def test_dropout_is_off_unless_asked_for(mlp, inputs):
    config, losses = structmat.LowRankConfig(ratio=0.5), []
    for rate, dropout in ((0.0, False), (0.5, False), (0.5, True)):
        compressed, dense = mlp(config, dropout=rate)
        compressed[1] = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(64, affine=False))
        dense[1] = copy.deepcopy(compressed[1])
        state = torch.get_rng_state()
        losses.append(surgery.heal(compressed, dense, inputs(), 4, dropout=dropout, progress=False).losses)
        assert dropout or torch.equal(torch.get_rng_state(), state)
        assert compressed[1][1].num_batches_tracked == 0 and compressed.training and compressed[1][1].training
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------- precision, devices
def test_bfloat16_steps_are_not_lost(mlp, inputs, device):
    """Steps far below a bfloat16 weight's resolution add up in float32 copies."""
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5), device, torch.bfloat16)
    wide, wide_dense = copy.deepcopy(compressed).float(), copy.deepcopy(dense).float()
    batches = inputs(4, dtype=torch.bfloat16)
    options = {"lr": 1e-4, "accumulate": 2, "mode": "layerwise", "warmup": 0, "progress": False}
    start = [p.detach().clone() for p in compressed.parameters()]
    surgery.heal(compressed, dense, batches, 120, **options)
    surgery.heal(wide, wide_dense, [b.float() for b in batches], 120, **options)
    moved, expected = [
        torch.cat([(p.detach().float() - s.float()).flatten() for p, s in zip(net.parameters(), start, strict=True)])
        for net in (compressed, wide)
    ]
    assert all(p.dtype == torch.bfloat16 for p in compressed.parameters())
    assert torch.cosine_similarity(moved, expected, 0) > 0.8 and 0.8 < moved.norm() / expected.norm() < 1.25
    assert all(not p._post_accumulate_grad_hooks for p in compressed.parameters())


@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_autocast(mlp, inputs, device, mode):
    compressed, dense = mlp(structmat.MonarchConfig(nblocks=4, ratio=0.5), device)
    options = {"mode": mode, "lr": 1e-2, "autocast": torch.bfloat16, "progress": False}
    report = surgery.heal(compressed, dense, inputs(16), 150, **options)
    assert report.final < 0.85 * report.first and compressed[0].bias.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_the_dense_model_may_be_elsewhere(mlp, inputs, mode):
    config = structmat.LowRankConfig(ratio=0.5)
    compressed, dense = mlp(config)
    here = surgery.heal(compressed, dense, inputs(), 5, mode=mode, progress=False)
    compressed, dense = mlp(config)
    there = surgery.heal(compressed.cuda(), dense, inputs(), 5, mode=mode, progress=False)
    assert next(dense.parameters()).device.type == "cpu"
    assert there.losses == pytest.approx(here.losses, rel=1e-3)


def test_dense_of_another_dtype(mlp, inputs):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    report = surgery.heal(compressed.double(), dense, inputs(16), 60, mode="layerwise", lr=1e-2, progress=False)
    assert report.final < 0.9 * report.first and compressed[0].bias.dtype == torch.float64


def test_accumulated_batches_are_one_large_one(mlp, inputs):
    config, weights = structmat.LowRankConfig(ratio=0.5), []
    batches = [b.double() for b in inputs(4)]
    for accumulate, given in ((4, batches), (1, [torch.stack(batches)])):
        compressed, dense = mlp(config, dtype=torch.float64)

        # Of equal variance, so that the mean of the losses is the loss of the whole.
        def forward(model, x, dense=dense):
            return model(x) / (dense(x) - dense(x).mean()).pow(2).mean((-2, -1), keepdim=True).sqrt()

        surgery.heal(compressed, dense, given, 1, accumulate=accumulate, clip=None, forward=forward, progress=False)
        weights.append(compressed[0].weight.left.detach())
    assert torch.dist(*weights) <= 2e-2 * 3e-4 * weights[0].numel() ** 0.5


# ---------------------------------------------------------------- data
def test_batches_of_every_kind(mlp, inputs):
    config, batches = structmat.LowRankConfig(ratio=0.5), inputs(3)
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=16)
    kinds = {
        "list": batches,
        "loader": loader,
        "function": lambda: iter(batches),
        "iterator": iter(batches * 2),
        "tuples": [(b,) for b in batches],
        "mappings": [{"input": b} for b in batches],
    }
    losses = {}
    for name, given in kinds.items():
        compressed, dense = mlp(config)
        losses[name] = surgery.heal(compressed, dense, given, 6, progress=False).losses
    compressed, dense = mlp(config)
    odd = [type("Odd", (), {"x": b})() for b in batches]
    losses["odd"] = surgery.heal(compressed, dense, odd, 6, forward=lambda m, b: m(b.x), progress=False).losses
    for name, values in losses.items():
        assert values == losses["list"], name


def test_validation_keeps_the_best_weights(mlp, inputs):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    seen, values = [], [5.0, 3.0, float("nan"), 1.0, 4.0]

    def validate(model):
        assert model is compressed and not model.training and not torch.is_grad_enabled()
        seen.append(model[0].weight.left.detach().clone())
        return values[len(seen) - 1]

    report = surgery.heal(
        compressed, dense, inputs(), 35, dropout=True, validate=validate, validate_every=10, lr=1e-2, progress=False
    )
    assert [step for step, _ in report.validations] == [0, 10, 20, 30, 35] and report.best_step == 30
    assert torch.equal(compressed[0].weight.left, seen[3]) and not torch.equal(seen[3], seen[4])
    assert "validation 5 -> 1, kept from step 30" in str(report)


def test_the_report_is_saved(mlp, inputs, tmp_path):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    report = surgery.heal(compressed, dense, inputs(), 4, mode="layerwise", progress=False)
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert surgery.HealReport.from_json(text) == report and json.loads(text)["mode"] == "layerwise"
    assert str(report).startswith("healed by layerwise: 4 steps in ") and "\n" not in str(report)
    with pytest.raises(ValueError, match="not the JSON of a HealReport"):
        surgery.HealReport.from_json("{}")


def test_progress_bar(mlp, inputs, capfd):
    compressed, dense = mlp(structmat.LowRankConfig(ratio=0.5))
    surgery.heal(compressed, dense, inputs(), 3, progress=True)
    assert "healing: 100%" in capfd.readouterr().err
    surgery.heal(compressed, dense, inputs(), 3, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("mode", ["distill", "layerwise"])
def test_complex_layers(mode, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 8)).to(torch.complex64)
    compressed = copy.deepcopy(dense)
    surgery.compress_(compressed, structmat.LowRankConfig(rank=3), progress=False)
    x = torch.randn(64, 12, dtype=torch.complex64) @ torch.randn(12, 12, dtype=torch.complex64)
    options = {"mode": mode, "lr": 1e-2, "checkpoint": tmp_path / "heal.pt", "progress": False}
    report = surgery.heal(compressed, dense, [x], 100, **options)
    assert report.final < 0.8 * report.first and compressed[0].bias.dtype == torch.complex64
