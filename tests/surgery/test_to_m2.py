"""An M2-BERT made of transformers' BERT."""

import pytest
import torch

import structmat
from structmat import surgery

transformers = pytest.importorskip("transformers")
m2 = pytest.importorskip("structmat.models.m2")

KINDS = {
    "BertModel": "M2BertModel",
    "BertForMaskedLM": "M2BertForMaskedLM",
    "BertForSequenceClassification": "M2BertForSequenceClassification",
}


def bert(kind, **kwargs):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=40, num_labels=3, **size, **kwargs)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: nothing would be seen of them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_the_layers_is_kept(kind, tokens):
    old = bert(kind)
    new = surgery.to_m2(old)
    assert type(new).__name__ == KINDS[kind] and not new.training
    theirs, ours = getattr(old, "bert", old), getattr(new, "model", new)
    with torch.no_grad():
        states = new(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[0], theirs.embeddings(tokens), rtol=0, atol=1e-5)
        if theirs.pooler is not None:
            assert torch.equal(ours._pool(states[-1], None), theirs.pooler(states[-1]))
        if kind == "BertForMaskedLM":
            torch.testing.assert_close(new.head(states[-1]), old.cls(states[-1]), rtol=0, atol=1e-5)
            assert new.head.decoder.weight is ours.embeddings.tokens.weight
            assert new.head.decoder.weight is not old.cls.predictions.decoder.weight
        if kind == "BertForSequenceClassification":
            assert torch.equal(new.classifier.weight, old.classifier.weight)
            assert new.config.num_labels == 3


def test_no_attention_is_left_and_the_new_model_trains(tokens):
    old = bert("BertForMaskedLM").train()
    new = surgery.to_m2(old, mlp_structure=structmat.MonarchConfig(nblocks=4))
    assert new.training and isinstance(new.model.layers[0].mlp.gate.weight(), structmat.Monarch)
    assert not any("ttention" in type(module).__name__ for module in new.modules())
    before = {name: value.clone() for name, value in old.state_dict().items()}
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = new(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in old.state_dict().items())


def test_options_and_dtype(tokens, tmp_path):
    new = surgery.to_m2(bert("BertForMaskedLM").double(), max_position_embeddings=24, num_hidden_layers=1)
    assert new.dtype == torch.float64 and new.config.max_position_embeddings == 24 and len(new.model.layers) == 1
    new.save_pretrained(tmp_path)
    again = m2.M2BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(tokens).logits, new(tokens).logits)


def test_half_precision_spares_the_filters(tokens):
    new = surgery.to_m2(bert("BertModel").bfloat16())
    for name, tensor in new.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".filter." in name else torch.bfloat16), name
    assert new(tokens).last_hidden_state.dtype == torch.bfloat16


def test_mlps_by_projection(tokens):
    """The other way: the BERT stays a BERT, and its trained MLPs become structured."""
    for config, kind in (
        (structmat.MonarchConfig(nblocks=4), structmat.Monarch),
        (structmat.BlockDiagonalConfig(nblocks=4), structmat.BlockDiagonal),
    ):
        model = bert("BertForMaskedLM")
        patterns = {"*.intermediate.dense": config, "*.layer.*.output.dense": config}
        report = surgery.compress_(model, patterns, filter_fn=lambda name, _: ".attention." not in name)
        assert len(report.compressed) == 4
        assert all(0 < row.error < 1 for row in report.compressed)
        layer = model.bert.encoder.layer[1]
        assert isinstance(layer.intermediate.dense.weight(), kind) and isinstance(layer.output.dense.weight(), kind)
        assert isinstance(layer.attention.output.dense, torch.nn.Linear)
        assert model(tokens).logits.isfinite().all()


def test_errors():
    with pytest.raises(TypeError, match=r"model must be one of transformers' BertModel, .* got Linear"):
        surgery.to_m2(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="is_decoder=True"):
        surgery.to_m2(bert("BertModel", is_decoder=True))
    with pytest.raises(ValueError, match="hidden_act='gelu', as M2-BERT has, got 'relu'"):
        surgery.to_m2(bert("BertModel", hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_size must be the BERT's, 32, got 64"):
        surgery.to_m2(bert("BertModel"), hidden_size=64)
    with pytest.raises(ValueError, match="num_labels must be the BERT's, 3, got 5"):
        surgery.to_m2(bert("BertForSequenceClassification"), num_labels=5)
    with pytest.raises(TypeError, match="M2BertConfig has no option 'mlp_strucure'"):
        surgery.to_m2(bert("BertModel"), mlp_strucure=None)
    with pytest.raises(ValueError, match="max_position_embeddings must be at most the BERT's, 40, got 41"):
        surgery.to_m2(bert("BertModel"), max_position_embeddings=41)
