"""The models: sizes, gradients, compilation, autocast, state dicts, meta device, counts, and that they learn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structmat
from structmat.models import GPT, MLPMixer, VisionTransformer, model_summary

STRUCTURES = {
    "dense": None,
    "monarch": structmat.MonarchConfig(nblocks=2),
    "butterfly": structmat.ButterflyConfig(),
    "lowrank": structmat.LowRankConfig(ratio=0.5),
    "blockdiagonal": structmat.BlockDiagonalConfig(nblocks=2),
    "mapping": {"*.fc1": structmat.LowRankConfig(rank=2), "blocks.1.*": structmat.MonarchConfig(nblocks=2)},
}


def make(name, structure=None, **kwargs):
    torch.manual_seed(0)
    size = {"dim": 16, "depth": 2, "structure": structure, **kwargs}
    if name == "mixer":
        return MLPMixer((8, 12), (4, 2), 5, channels=2, **size)
    if name == "vit":
        return VisionTransformer((8, 12), (4, 2), 5, channels=2, heads=4, **size)
    return GPT(11, 9, heads=2, **size)


def example(name, batch=3, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    if name == "gpt":
        return torch.randint(11, (batch, 9), generator=generator).to(device)
    return torch.randn(batch, 2, 8, 12, generator=generator).to(device)


SHAPES = {"mixer": (3, 5), "vit": (3, 5), "gpt": (3, 9, 11)}
every_model = pytest.mark.parametrize("name", SHAPES)


@every_model
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_every_parameter_learns(name, structure):
    model = make(name, structure)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in before.values())
    y = model(example(name))
    assert y.shape == SHAPES[name] and y.dtype == torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y.square().sum().backward()
    optimizer.step()
    still = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    # The last bias of an MLP over tokens shifts all channels of a token alike, which every later LayerNorm takes out:
    # it has no gradient but for rounding.
    assert [key for key in still if not key.endswith("tokens.fc2.bias")] == []


@every_model
def test_what_is_structured_by_default(name):
    model = make(name, structmat.MonarchConfig(nblocks=2))
    linear = {
        key: type(m) for key, m in model.named_modules() if isinstance(m, (nn.Linear, structmat.nn.MonarchLinear))
    }
    inside = {key for key, cls in linear.items() if cls is structmat.nn.MonarchLinear}
    assert inside == {key for key in linear if key.startswith("blocks.")} and len(inside) == 8
    assert set(linear) - inside == (set() if name == "gpt" else {"head"})


@every_model
def test_structured_layers_start_with_the_variance_of_dense_ones(name):
    x = torch.randn(512, 64)
    for structure in (None, structmat.MonarchConfig(nblocks=4), structmat.LowRankConfig(ratio=0.5)):
        layer = make(name, structure, dim=64).blocks[0]
        layer = (layer.channels if name == "mixer" else layer.mlp).fc1
        # nn.Linear: 64 / (3 * 64) from the weights and 1 / (3 * 64) from the bias
        assert layer(x).var().item() == pytest.approx((1 + 1 / 64) / 3, rel=0.25)


@every_model
@pytest.mark.parametrize("structure", [None, structmat.ButterflyConfig()], ids=["dense", "butterfly"])
def test_state_dict_copy_and_pickle(name, structure):
    model, x = make(name, structure).eval(), example(name)
    other = make(name, structure).eval()
    for p in other.parameters():
        p.data.zero_()
    assert other.load_state_dict(model.state_dict()) == ([], [])
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@every_model
def test_compiles_whole(name):
    model, x = make(name, structmat.MonarchConfig(nblocks=2), depth=1), example(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_model
def test_autocast(name):
    model, x = make(name, structmat.LowRankConfig(ratio=0.5)), example(name)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert ((y - exact).norm() / exact.norm()).item() < 5e-2
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(name, dtype):
    model, x = make(name, structmat.MonarchConfig(nblocks=2), dtype=dtype), example(name)
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = model(x if name == "gpt" else x.to(dtype))
    assert y.dtype == dtype and y.isfinite().all()


@every_model
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_meta_device_and_counts(name, structure):
    model, meta = make(name, structure), make(name, structure, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert {k: p.shape for k, p in meta.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    expected = 0 if structure is None else 8 if not isinstance(structure, dict) else 6 if name == "mixer" else 5
    real, counted = model_summary(model, example(name)), model_summary(meta, example(name, device="meta"))
    assert real == counted
    assert real.params == sum(p.numel() for p in model.parameters()) == sum(row.params for row in real.rows)
    values = [m.weight() for m in model.modules() if isinstance(m, structmat.nn.StructuredLinear)]
    structured = {row.name: row for row in real.rows if row.shape is not None and row.structure != "dense"}
    assert len(structured) == len(values) == expected
    assert model_summary(model).flops is None
    assert f"{real.params:,}" in str(real).splitlines()[-1]


def test_flops_are_those_of_the_parts():
    counted = {row.name: row.flops for row in model_summary(make("vit"), example("vit")).rows}
    tokens = 3 * 13
    assert counted["patches"] == 2 * 3 * 12 * 16 * (2 * 4 * 2)
    assert counted["blocks.0.attention.qkv"] == 2 * tokens * 16 * 48
    assert counted["blocks.0.mlp.fc1"] == 2 * tokens * 16 * 64
    assert counted["blocks.0.attention"] == 4 * 3 * 16 * 13 * 13
    assert counted["head"] == 2 * 3 * 16 * 5
    counted = {row.name: row.flops for row in model_summary(make("gpt"), example("gpt")).rows}
    assert counted["blocks.1.attention"] == 4 * 3 * 16 * 45  # 9 * 10 / 2 pairs
    assert counted[""] == 2 * 3 * 9 * 11 * 16
    model = make("gpt", structmat.LowRankConfig(rank=2))
    counted = {row.name: row.flops for row in model_summary(model, example("gpt")).rows}
    assert counted["blocks.0.mlp.fc1"] == 2 * 27 * 2 * (16 + 64)


@pytest.mark.parametrize("structure", [None, structmat.MonarchConfig(nblocks=4)], ids=["dense", "monarch"])
@pytest.mark.parametrize("name", ["mixer", "vit"])
def test_learns_to_classify(name, structure):
    model = make(name, structure, dim=32, depth=1)
    x = torch.randn(64, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 5
    x[:, 0] += y[:, None, None] - 2
    losses = _train(model, lambda: F.cross_entropy(model(x), y), 30)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("structure", [None, structmat.MonarchConfig(nblocks=4)], ids=["dense", "monarch"])
def test_learns_to_count(structure):
    model = make("gpt", structure, dim=32, depth=1)
    x = (torch.arange(11)[:, None] + torch.arange(10)) % 11
    losses = _train(model, lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()), 60)
    assert losses[-1] < 0.1 * losses[0]
    out = model.generate(x[:, :3], 12, temperature=0)
    assert torch.equal(out, (torch.arange(11)[:, None] + torch.arange(15)) % 11)


def _train(model, loss_of, steps):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_gpt_is_causal_and_generates_what_the_generator_says():
    model, tokens = make("gpt", structmat.MonarchConfig(nblocks=2)), example("gpt")
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    assert torch.equal(model(tokens)[:, :5], model(other)[:, :5])
    draws = [model.generate(tokens[:, :2], 20, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (3, 22) and torch.equal(draws[0][:, :2], tokens[:, :2])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(model.generate(tokens, 0), tokens)


def test_dropout_is_off_in_evaluation():
    for name in SHAPES:
        model, x = make(name, structmat.MonarchConfig(nblocks=2), dropout=0.5), example(name)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_awkward_sizes():
    structure = structmat.MonarchConfig(nblocks=2)
    mixer = MLPMixer((7, 21), 7, 1, channels=1, dim=7, depth=1, token_hidden=2, channel_hidden=5, structure=structure)
    assert mixer(torch.ones(2, 1, 7, 21)).shape == (2, 1)
    vit = VisionTransformer(
        3, 3, 2, dim=6, depth=1, heads=3, class_token=False, structure=structmat.LowRankConfig(rank=1)
    )
    assert vit(torch.ones(0, 3, 3, 3)).shape == (0, 2)
    gpt = GPT(3, 1, dim=2, depth=1, heads=1, structure=structure)
    assert gpt(torch.zeros(2, 1, dtype=torch.long)).shape == (2, 1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MLPMixer(30, 7, 10), ValueError, "patch_size must divide image_size, got patches of 7 x 7 for images"),
        (lambda: VisionTransformer((28, 30), 7, 10), ValueError, "28 x 30"),
        (
            lambda: VisionTransformer((28, 28, 3), 7, 10),
            ValueError,
            r"image_size must be a number or \(height, width\)",
        ),
        (lambda: MLPMixer(28.0, 7, 10), TypeError, "image_size must be an integer"),
        (lambda: VisionTransformer(28, 7, 10, dim=10, heads=3), ValueError, "heads must divide dim, got 3"),
        (lambda: GPT(11, 8, dim=8, heads=2, depth=0), ValueError, "depth must be at least 1"),
        (lambda: GPT(11, 8, dim=8, heads=2, depth=1, dropout=1.5), ValueError, r"dropout must be a number in \[0, 1\)"),
        (lambda: make("gpt", "monarch"), TypeError, "config must be a Config"),
        (lambda: make("vit", {"*.fc3": structmat.MonarchConfig()}), ValueError, "there is nothing to replace"),
        (
            lambda: make("vit", {"*.fc1": structmat.MonarchConfig(), "*.fc3": structmat.MonarchConfig()}),
            ValueError,
            r"match no layer: \*.fc3; layers still dense: blocks.0.attention.qkv",
        ),
        (lambda: make("gpt", structmat.LowRankConfig(ratio=0.01)), structmat.BudgetError, "blocks.0.attention.qkv"),
        (
            lambda: make("mixer")(torch.ones(1, 2, 8, 8)),
            ValueError,
            r"x must have shape \(batch, 2, 8, 12\), got \(1, 2",
        ),
        (lambda: make("gpt")(torch.ones(1, 10, dtype=torch.long)), ValueError, "length at most 9, got"),
        (lambda: make("gpt").generate(torch.ones(1, 0, dtype=torch.long), 2), ValueError, "length at least 1"),
        (lambda: make("gpt").generate(example("gpt"), 2, temperature=-1.0), ValueError, "temperature must be"),
        (lambda: model_summary("gpt"), TypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
