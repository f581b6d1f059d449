"""Real architectures: GPT-2 with its Conv1D and tied head, and BERT."""

from __future__ import annotations

import copy

import pytest
import torch

import structmat
from structmat import surgery

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def gpt2(**kwargs):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50, **kwargs)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def densified_in_place(model, original):
    """The original model with its Conv1D weights set to what the compressed model's layers are as matrices."""
    dense = copy.deepcopy(original)
    for name, layer in model.named_modules():
        if isinstance(layer, structmat.nn.StructuredLinear):
            dense.get_submodule(name).weight.data.copy_(layer.weight().to_dense().mT)
    return dense


def test_conv1d_of_gpt2(tokens):
    model = gpt2()
    original = copy.deepcopy(model)
    report = surgery.compress_(model, structmat.MonarchConfig(nblocks=4, ratio=0.5))
    assert len(report.compressed) == 8
    attention = model.transformer.h[0].attn
    assert isinstance(attention.c_attn, structmat.nn.MonarchLinear)
    assert (attention.c_attn.in_features, attention.c_attn.out_features) == (32, 96)
    assert report.rows[0].shape == (96, 32)
    assert attention.c_attn.nf == 96
    assert torch.equal(attention.c_attn.bias, original.transformer.h[0].attn.c_attn.bias)
    assert {row.name: row.skipped for row in report.skipped} == {
        "lm_head": "its weight is tied to transformer.wte.weight"
    }
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        expected = densified_in_place(model, original)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        surgery.densify_(model)
        assert type(model.transformer.h[0].attn.c_attn) is Conv1D
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_projection_of_conv1d_is_that_of_the_transposed_weight():
    model = gpt2()
    weight = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    surgery.compress_(model, {"*.c_fc": structmat.LowRankConfig(rank=4)})
    expected = structmat.project(weight.mT, structmat.LowRankConfig(rank=4)).matrix
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight.left, expected.left)


@pytest.mark.parametrize("how", ["compressed", "replaced", "loaded", "copied"])
def test_densify_gives_conv1d_back_for_transformers_to_save(tmp_path, tokens, how):
    """attn.c_proj is square: an nn.Linear's weight would be loaded transposed, and nobody would be told."""
    model = gpt2()
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    config = {"transformer.h.*": structmat.PixelflyConfig(block=8, ratio=0.5)}
    (surgery.replace_ if how == "replaced" else surgery.compress_)(model, config)
    if how == "loaded":
        surgery.save_file(model, tmp_path / "small.safetensors")
        model = gpt2()
        surgery.load_file(model, tmp_path / "small.safetensors")
    model = copy.deepcopy(model) if how == "copied" else model
    with torch.no_grad():
        expected = model(tokens).logits
        surgery.densify_(model)
        assert {name: t.shape for name, t in model.state_dict().items()} == shapes
        layer = model.transformer.h[1].attn.c_proj
        assert type(layer) is Conv1D and (layer.nx, layer.nf) == (32, 32) and "Conv1D(nf=32, nx=32)" in repr(model)
        assert not {"in_features", "matrix_batch", "conv1d"} & vars(layer).keys()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "dense")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense").eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        # And on from there: what was a Conv1D is found again as one.
        surgery.reproject_(again, 0.4, {"*.c_*": structmat.LowRankConfig(ratio=1)})
        surgery.reproject_(again, 0.3, {"*.c_*": structmat.LowRankConfig(ratio=1)})
        surgery.densify_(again)
        assert {name: t.shape for name, t in again.state_dict().items()} == shapes


def test_momentum_goes_on_in_a_conv1d(tokens):
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    surgery.replace_(model, {"*.c_proj": structmat.LowRankConfig(rank=4)})
    factors = [p for name, p in model.named_parameters() if ".c_proj.weight." in name]
    optimizer = torch.optim.SGD(factors, lr=1e-4, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    layer = model.transformer.h[0].mlp.c_proj
    left, right = layer.weight.left, layer.weight.right
    v, w = (optimizer.state[p]["momentum_buffer"] for p in (left, right))
    expected = (v @ right + left @ w).detach().mT
    with surgery.carry_optimizer(model, optimizer):
        surgery.densify_(model)
    weight = model.transformer.h[0].mlp.c_proj.weight
    assert weight.shape == (128, 32) and optimizer.param_groups[0]["params"][1] is weight
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_a_file(tmp_path, tokens, tied):
    model = gpt2(tie_word_embeddings=tied)
    surgery.compress_(model, structmat.MonarchConfig(nblocks=2, rank=3), filter_fn=lambda name, _: name != "lm_head")
    surgery.save_file(model, tmp_path / "gpt2.safetensors")
    torch.manual_seed(1)
    other = transformers.GPT2LMHeadModel(model.config).eval()
    assert surgery.load_file(other, tmp_path / "gpt2.safetensors") == ([], [])
    assert (other.lm_head.weight is other.transformer.wte.weight) == tied
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_replace_gives_a_model_that_trains(tokens):
    model = gpt2().train()
    surgery.replace_(model, {"*.c_*": structmat.BlockDiagonalConfig(nblocks=4)})
    model(tokens, labels=tokens).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.blocks.grad is not None


def test_bert(tokens):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **size)).eval()
    report = surgery.compress_(model, {"encoder.*": structmat.LowRankConfig(ratio=0.5)})
    assert len(report.compressed) == 6
    assert [row.name for row in report.skipped] == ["pooler.dense"]
    with torch.no_grad():
        assert model(tokens).last_hidden_state.shape == (2, 9, 32)
