"""M2-BERT: sizes, padding, losses, checkpointing, compilation, bad configurations."""

import pytest
import torch
import torch.nn.functional as F

import structmat
from structmat.models.m2 import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertModel,
)
from structmat.testing import relative_error

PUBLISHED = {"80M": 80_267_328, "110M": 115_583_616, "260M": 259_133_760, "341M": 341_038_144}


@pytest.fixture
def bert(bert_config, stir):
    torch.manual_seed(0)
    return stir(M2BertModel(bert_config()).eval())


def test_parameter_counts_are_the_published_ones():
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            model = M2BertForMaskedLM(M2BertConfig.preset(name))
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert next(model.parameters()).is_meta


def embed(model, tokens, length, side):
    ids = torch.full((len(tokens), length), 9)
    mask = torch.zeros_like(ids)
    place = slice(0, tokens.shape[1]) if side == "right" else slice(length - tokens.shape[1], length)
    ids[:, place], mask[:, place] = tokens, 1
    with torch.no_grad():
        out = model(ids, mask)
    return out.last_hidden_state[:, place], out.pooler_output


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(bert_config, stir, tokens, side, pooling):
    """Acceptance: cosine >= 0.9999 between embeddings at paddings of 32 and 128 tokens. Here nearly every bit."""
    torch.manual_seed(0)
    model = stir(M2BertModel(bert_config(pooling=pooling)).eval())
    plain = embed(model, tokens, 20, side)
    for length in (32, 128):
        for got, expected in zip(embed(model, tokens, length, side), plain, strict=True):
            assert F.cosine_similarity(got, expected, dim=-1).min() >= 0.9999
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_legacy_padding_depends_on_it(bert_config, stir, tokens):
    model = stir(M2BertModel(bert_config(legacy_padding=True)).eval())
    pooled = [embed(model, tokens, length, "right")[1] for length in (32, 128)]
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_content_of_padding_changes_nothing(bert, tokens):
    mask = torch.ones_like(tokens)
    mask[:, 12:] = 0
    other = tokens.clone()
    other[:, 12:] = 3
    with torch.no_grad():
        one, two = bert(tokens, mask).last_hidden_state[:, :12], bert(other, mask).last_hidden_state[:, :12]
    assert torch.equal(one, two)
    assert not torch.equal(one, bert(tokens).last_hidden_state[:, :12])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(bert_config, stir, tokens, dtype):
    """One row is padding altogether, one has a hole."""
    mask = torch.ones_like(tokens)
    mask[0], mask[1, 8], mask[2, :5] = 0, 0, 0
    for pooling in ("cls", "mean"):
        bert = stir(M2BertModel(bert_config(pooling=pooling)).eval())
        with torch.no_grad():
            got, expected = bert(tokens, mask.to(dtype)), bert(tokens, mask)
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state) and got.pooler_output.isfinite().all()
        assert torch.equal(got.pooler_output, expected.pooler_output)


def test_every_output_depends_on_every_input(bert, tokens):
    x = bert.get_input_embeddings()(tokens[:1]).detach().requires_grad_()
    y = bert(inputs_embeds=x).last_hidden_state
    (gradient,) = torch.autograd.grad(y[0, 0].square().sum(), x)
    assert gradient.abs().amax(-1).min() > 0
    assert relative_error(y.detach(), bert(tokens[:1]).last_hidden_state.detach()) <= 1e-6


def test_a_causal_bert_is_causal(bert_config, stir, tokens):
    model = stir(M2BertModel(bert_config(bidirectional=False)).eval())
    other = tokens.clone()
    other[:, 10:] = 3
    with torch.no_grad():
        one, two = model(tokens).last_hidden_state, model(other).last_hidden_state
    assert (one[:, :10] - two[:, :10]).abs().max() <= 1e-5 * one.abs().max()
    assert (one[:, 10:] - two[:, 10:]).abs().amax(-1).min() > 1e-2


def test_outputs(bert, tokens):
    out = bert(tokens, token_type_ids=torch.zeros_like(tokens), position_ids=torch.arange(20)[None])
    plain = bert(tokens, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, plain.last_hidden_state) and out.hidden_states is None
    assert len(plain.hidden_states) == 3 and torch.equal(plain.hidden_states[-1], plain.last_hidden_state)
    last, pooled, states = bert(tokens, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, plain.last_hidden_state) and torch.equal(pooled, plain.pooler_output) and len(states) == 3
    assert not torch.equal(last, bert(tokens, token_type_ids=torch.ones_like(tokens)).last_hidden_state)


def test_losses(bert_config, tokens):
    model = M2BertForMaskedLM(bert_config()).eval()
    labels = torch.where(torch.arange(20) % 4 == 0, tokens, -100)
    out = model(tokens, labels=labels)
    expected = F.cross_entropy(out.logits[labels != -100], tokens[labels != -100])
    torch.testing.assert_close(out.loss, expected)
    cases = (
        ({"num_labels": 4}, torch.tensor([0, 3, 1]), F.cross_entropy),
        ({"num_labels": 1}, torch.randn(3), lambda x, y: F.mse_loss(x[:, 0], y)),
        ({"num_labels": 4}, torch.rand(3, 4), F.binary_cross_entropy_with_logits),
        ({"num_labels": 4, "problem_type": "regression"}, torch.rand(3, 4), F.mse_loss),
    )
    for options, labels, loss in cases:
        classifier = M2BertForSequenceClassification(bert_config(**options)).eval()
        out = classifier(tokens, labels=labels)
        torch.testing.assert_close(out.loss, loss(out.logits, labels))


@pytest.mark.parametrize(
    "structure", [None, structmat.MonarchConfig(nblocks=4), structmat.BlockDiagonalConfig(nblocks=3)]
)
def test_structures(bert_config, tokens, structure):
    model = M2BertForMaskedLM(bert_config(mlp_structure=structure, projection_structure=structure))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    expected = torch.nn.Linear if structure is None else structmat.nn.StructuredLinear
    layer = model.model.layers[0]
    assert {type(m) for m in (layer.mlp.gate, layer.mlp.out, layer.mixer.project, layer.mixer.out)} == {expected}
    if isinstance(structure, structmat.MonarchConfig):
        assert isinstance(layer.mlp.gate.weight(), structmat.Monarch)


def test_initial_values(bert_config):
    torch.manual_seed(0)
    model = M2BertForMaskedLM(bert_config(hidden_size=64, vocab_size=500, initializer_range=0.05))
    inner, layer = model.model.embeddings, model.model.layers[0]
    assert inner.tokens.weight[0].abs().max() == 0 and abs(inner.tokens.weight[1:].std() - 0.05) < 0.002
    assert abs(layer.mixer.project.weight.std() - 0.05) < 0.002 and layer.mixer.project.bias.abs().max() == 0
    assert abs(layer.mlp.gate.weight().blocks.std() - (3 * 16) ** -0.5) < 0.01
    assert model.head.decoder.weight is inner.tokens.weight and (layer.norm.weight == 1).all()
    free = M2BertForMaskedLM(bert_config(hidden_size=64, initializer_range=None)).model.layers[0].mixer.project
    assert abs(free.weight.std() - (3 * 64) ** -0.5) < 0.005


BAD = [
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"num_hidden_layers": 2.0}, TypeError, "num_hidden_layers must be an integer"),
    ({"hidden_dropout_prob": 1.0}, ValueError, r"hidden_dropout_prob must be a number in \[0, 1\), got 1\.0"),
    ({"filter_features": 4}, ValueError, "filter_features must be odd"),
    ({"filter_features": 1}, ValueError, "filter_features must be at least 3"),
    ({"filter_frequency": 0.0}, ValueError, "filter_frequency must be positive"),
    ({"residual_long_conv": 1}, TypeError, "residual_long_conv must be True or False"),
    ({"initializer_range": -1.0}, ValueError, "initializer_range must be positive or None"),
    ({"pooling": "max"}, ValueError, "pooling must be 'cls' or 'mean', got 'max'"),
    ({"pad_token_id": 50}, ValueError, r"pad_token_id must be None or in 0\.\.49, got 50"),
    ({"mlp_structure": 4}, TypeError, "mlp_structure must be a structmat config, its dictionary or None, got int"),
    ({"mlp_structure": {"structure": "magic"}}, ValueError, "unknown structure 'magic'"),
    (
        {"mlp_structure": structmat.BlockDiagonalConfig(nblocks=17)},
        ValueError,
        "mlp_structure does not exist for a layer from 16 to 48 features: nblocks must be at most",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_configurations(bert_config, options, error, message):
    with pytest.raises(error, match=message):
        bert_config(**options)


def test_bad_inputs(bert, tokens):
    with pytest.raises(ValueError, match="one of 80M, 110M, 260M, 341M, got '1B'"):
        M2BertConfig.preset("1B")
    with pytest.raises(ValueError, match=r"has 161 tokens, more than config\.max_position_embeddings = 160"):
        bert(torch.ones(1, 161, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token, got none"):
        bert(tokens[:, :0])
    with pytest.raises(ValueError, match="inputs_embeds must have hidden_size 16 at the end, got 17"):
        bert(inputs_embeds=torch.ones(3, 20, 17))
    for name in ("token_type_ids", "position_ids"):
        with pytest.raises(ValueError, match=rf"{name} must have shape \(3, 20\), got \(3, 19\)"):
            bert(tokens, **{name: tokens[:, :19]})
    with pytest.raises(ValueError, match="exactly one"):
        bert(tokens, inputs_embeds=torch.ones(3, 20, 16))
    with pytest.raises(ValueError, match=r"input_ids must have shape \(batch, length\), got \(20,\)"):
        bert(tokens[0])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 20\), got \(1, 20\)"):
        bert(tokens, torch.ones(1, 20))
