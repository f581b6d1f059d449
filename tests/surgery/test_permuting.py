"""Hidden units are permuted exactly, where that is allowed, and to some use."""

import copy

import pytest
import torch
from torch import nn

import structmat as sm
from structmat import surgery
from structmat.surgery import HiddenUnits, permute_hidden_

CONFIG = sm.MonarchConfig(nblocks=4, rank=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(middle=None, bias=True, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64, bias), middle or nn.GELU(), nn.Linear(64, 16, bias)).to(dtype)


def hide(first, second, config=CONFIG):
    """Give two layers structured weights, in an order of units that hides it."""
    (m, n), g = first.weight.shape, generator()
    order = torch.randperm(m, generator=g)
    first.weight.data.copy_(config.random((m, n), generator=g).to_dense()[order])
    second.weight.data.copy_(config.random((second.weight.shape[0], m), generator=g).to_dense()[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_hidden_structure_is_found_and_nothing_else_changes(dtype, bias):
    model, x = mlp(bias=bias, dtype=dtype), torch.randn(9, 16, generator=generator()).to(dtype)
    hide(model[0], model[2])
    weight, before = model[0].weight, model(x)
    report = permute_hidden_(model, CONFIG, [("0", "2")], batch=x)
    for old, new in report.rows[0].errors.values():
        assert new <= (1e-2 if dtype == torch.bfloat16 else 1e-5) < old
    assert model[0].weight is weight
    torch.testing.assert_close(model(x), before, rtol=1e-4 if dtype != torch.bfloat16 else 5e-2, atol=1e-2)
    assert "0.0" in str(report)


def test_calibration_comes_back_in_the_new_order():
    model, x = mlp(), torch.randn(200, 16, generator=generator())
    hide(model[0], model[2])
    with_gradients = surgery.calibrate(model, [x], gradients=True, loss_fn=lambda y, _: y.square().sum())
    report = permute_hidden_(model, CONFIG, [("0", "2")], with_gradients)
    assert isinstance(report.calibration, surgery.Calibration)
    again = surgery.calibrate(model, [x], gradients=True, loss_fn=lambda y, _: y.square().sum())
    assert torch.allclose(report.calibration["0"].outputs, again["0"].outputs, rtol=1e-4, atol=1e-8)
    assert torch.allclose(report.calibration["2"].inputs, again["2"].inputs, rtol=1e-4, atol=1e-6)
    assert torch.equal(report.calibration["0"].inputs, with_gradients["0"].inputs)
    after = surgery.compress_(model, CONFIG, calibration=report.calibration)
    for row in after.rows:
        assert abs(row.calibrated_error - report.rows[0].errors[row.name][1]) <= 1e-6


class Mixing(nn.Module):
    def forward(self, x):
        return x.cumsum(-1)


@pytest.mark.parametrize("middle", [nn.Softmax(-1), Mixing(), nn.LayerNorm(64)], ids=["softmax", "cumsum", "norm"])
def test_what_lies_between_must_treat_units_alike(middle):
    model, x = mlp(nn.Sequential(middle, nn.Tanh())), torch.randn(9, 16, generator=generator())
    if isinstance(middle, nn.LayerNorm):
        middle.weight.data.copy_(torch.randn(64, generator=generator()))
    hide(model[0], model[2])
    state, before = copy.deepcopy(model.state_dict()), model(x)
    if isinstance(middle, nn.Softmax):  # the same for every order
        permute_hidden_(model, CONFIG, [("0", "2")], batch=x)
        torch.testing.assert_close(model(x), before)
        return
    with pytest.raises(ValueError, match=r"0 and 2 lies something that does not treat all units alike"):
        permute_hidden_(model, CONFIG, [("0", "2")], batch=x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_only_the_pair_that_did_it_is_named():
    model = nn.Sequential(mlp(), mlp(Mixing()))
    for part in model:
        hide(part[0], part[2])
    with pytest.raises(ValueError) as found:
        permute_hidden_(model, CONFIG, [("0.0", "0.2"), ("1.0", "1.2")], batch=torch.randn(3, 16))
    assert "1.0 and 1.2" in str(found.value)
    assert "0.0 and 0.2" not in str(found.value)


def test_an_exception_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(mlp(), mlp())
    for part in model:
        hide(part[0], part[2])
    state, calls = copy.deepcopy(model.state_dict()), []
    real = sm.surgery.permuting.search_order

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sm.surgery.permuting, "search_order", second_fails)
    with pytest.raises(KeyboardInterrupt):
        permute_hidden_(model, CONFIG, [("0.0", "0.2"), ("1.0", "1.2")])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_never_worse_than_as_it_was():
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    report = permute_hidden_(model, sm.LowRankConfig(rank=4), [("0", "2")])
    assert report.rows[0].order is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    report = permute_hidden_(model, CONFIG, [("0", "2")])
    old, new = (sum(e[i] ** 2 for e in report.rows[0].errors.values()) for i in (0, 1))
    assert new <= old
    again = mlp()
    permute_hidden_(again, CONFIG, [("0", "2")])
    assert torch.equal(model[0].weight, again[0].weight)  # deterministic


@pytest.mark.parametrize(
    ("pairs", "kind", "text"),
    [
        ([("0", "1")], ValueError, "GELU, not a dense linear layer"),
        ([("0", "5")], ValueError, "no module '5'"),
        ([("2", "0")], ValueError, "0 reads 16 units, made are 16 by 2"),
        (["02"], TypeError, "pairs must hold"),
        ([("0", "2"), ("0", "2")], ValueError, "same side of two pairs"),
        ([HiddenUnits(("0",), "2", heads=5)], ValueError, "heads must divide"),
        ([HiddenUnits(("0",), "2", queries=("0",))], ValueError, "queries need heads"),
        (None, ValueError, "no hidden units to permute"),
    ],
)
def test_bad_pairs(pairs, kind, text):
    model = mlp() if pairs != [("2", "0")] else nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 17))
    text = text.replace("made are 16", "made are 17")
    with pytest.raises(kind, match=text):
        permute_hidden_(model, CONFIG, pairs)


def test_other_bad_arguments():
    model = mlp()
    with pytest.raises(TypeError, match="Butterfly"):
        permute_hidden_(model, sm.ButterflyConfig(), [("0", "2")])
    with pytest.raises(ValueError, match="no moments of 0"):
        permute_hidden_(model, CONFIG, [("0", "2")], {})
    model[2].weight = nn.Parameter(model[0].weight.data.mT)
    model.append(nn.Linear(16, 64))
    model[3].weight = model[0].weight
    with pytest.raises(ValueError, match=r"tied to .*3\.weight"):
        permute_hidden_(model, CONFIG, [("0", "2")])
    surgery.compress_(model := mlp(), CONFIG)
    with pytest.raises(ValueError, match="not a dense linear layer"):
        permute_hidden_(model, CONFIG, [("0", "2")])


def test_encoder_layers_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16, generator=generator())
    for block in model.layers:
        hide(block.linear1, block.linear2)
    report = permute_hidden_(model, CONFIG, batch=x)
    assert [row.units for row in report.rows] == [
        HiddenUnits((f"layers.{i}.linear1",), f"layers.{i}.linear2") for i in (0, 1)
    ]
    assert all(new <= 1e-5 for row in report.rows for _, new in row.errors.values())


# ---------------------------------------------------------------- transformers
def bert(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))


def vit(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **sizes))


def gpt2(transformers):
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    )


def llama(transformers, groups=4):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=groups, **sizes)
    return transformers.LlamaModel(config)


def grouped_llama(transformers):
    return llama(transformers, 2)


def opt(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64}
    return transformers.OPTModel(transformers.OPTConfig(vocab_size=50, word_embed_proj_dim=32, **sizes))


def distilbert(transformers):
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
    return transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize(
    ("make", "mlps", "attentions"),
    [(bert, 2, 2), (vit, 1, 1), (gpt2, 1, 0), (llama, 1, 1), (grouped_llama, 1, 0), (opt, 1, 1), (distilbert, 1, 1)],
)
def test_blocks_of_transformers_are_found(make, mlps, attentions):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(transformers).double().eval()
    for parameter in model.parameters():  # biases begin as zeros, which any order leaves
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator(), dtype=parameter.dtype))
    g = generator(1)
    if make is vit:
        batch = {"pixel_values": torch.randn(2, 3, 32, 32, generator=g).double()}
    else:
        batch = {"input_ids": torch.randint(3, 50, (2, 7), generator=g)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = sm.BlockDiagonalConfig(nblocks=4)  # some order is better for any weights
    report = permute_hidden_(model, config, batch=batch)
    heads = [row.units.heads for row in report.rows]
    assert (heads.count(None), len(heads) - heads.count(None)) == (mlps, attentions)
    assert all(h in (None, 4) for h in heads)
    assert all(row.order is not None for row in report.rows)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {f"{name}.weight" for row in report.rows for name in row.units.first}
    assert expected <= changed
    assert any("grouped" in line for line in report.left_alone) == (make is grouped_llama)
