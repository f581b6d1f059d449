"""Hugging Face's GPT-2 and BERT through replace_, and GPT-2's weights in structmat's GPT."""

from __future__ import annotations

import pytest
import torch

import structmat
from structmat import surgery
from structmat.models import GPT, convert_gpt2_state_dict

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "monarch": structmat.MonarchConfig(nblocks=4),
    "butterfly": structmat.ButterflyConfig(),
    "lowrank": structmat.LowRankConfig(ratio=0.25),
    "blockdiagonal": structmat.BlockDiagonalConfig(nblocks=4),
}


def gpt2(**kwargs):
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **kwargs}
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=50, **off)
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **size, **off))


@pytest.fixture
def tokens():
    return torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("make", [gpt2, bert])
def test_replace_train_and_densify(make, config, tokens):
    model = make()
    blocks = {"transformer.h.*": config, "bert.encoder.*": config}
    report = surgery.replace_(model, blocks)
    structured = [m for m in model.modules() if isinstance(m, structmat.nn.StructuredLinear)]
    assert len(report.compressed) == len(structured) == (8 if make is gpt2 else 12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert surgery.densify_(model).params_after == report.params_before
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_gpt2_made_on_the_meta_device(tokens):
    with torch.device("meta"):
        model = gpt2()
    surgery.replace_(model, {"transformer.h.*": structmat.MonarchConfig(nblocks=4)}, device="cpu")
    made = {name for name, p in model.named_parameters() if not p.is_meta}
    assert made == {name for name, _ in model.named_parameters() if ".c_" in name}
    layer = model.transformer.h[0].mlp.c_fc
    assert layer(torch.ones(2, 32)).isfinite().all()


@pytest.mark.parametrize("base", [False, True])
def test_gpt2_weights_in_gpt(tokens, base):
    theirs = gpt2().eval()
    state = (theirs.transformer if base else theirs).state_dict()
    ours = GPT(50, 16, dim=32, depth=2, heads=4).eval()
    assert ours.load_state_dict(convert_gpt2_state_dict(state)) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    surgery.compress_(ours, {"blocks.*": structmat.MonarchConfig(nblocks=4, ratio=0.5)})
    surgery.compress_(theirs, {"transformer.h.*": structmat.MonarchConfig(nblocks=4, ratio=0.5)})
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)


def test_older_files_and_wrong_ones():
    state = gpt2().state_dict()
    old = {
        **state,
        "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16),
        "transformer.h.0.attn.masked_bias": torch.ones(()),
    }
    assert convert_gpt2_state_dict(old).keys() == convert_gpt2_state_dict(state).keys()
    for name in ("transformer.h.0.attn.c_query.weight", "bert.encoder.weight", "transformer.h.x.ln_1.bias"):
        with pytest.raises(ValueError, match="is not a name of GPT-2's weights"):
            convert_gpt2_state_dict({name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"lm_head\.weight must be equal to wte.weight"):
        convert_gpt2_state_dict(gpt2(tie_word_embeddings=False).state_dict())
