"""Released weights: their names, and the released outputs, worked out here by dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F

import structmat
from structmat.models.m2 import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    convert_m2_state_dict,
    export_m2_state_dict,
)
from structmat.testing import relative_error

VARIANTS = [
    {},
    {"residual": False},
    {"bidirectional": False},
    {"additions": True},
    {"residual": False, "bidirectional": False, "additions": True, "prefix": ""},
]


class Released:
    """The released encoder, evaluated one output at a time from its state dict."""

    def __init__(self, state):
        self.state = {name.removeprefix("model."): value for name, value in state.items()}

    def __getitem__(self, name):
        return self.state[name]

    def affine(self, name, x):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name, x, eps=1e-12):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def blocks(self, name, x):
        return x @ torch.block_diag(*self[f"{name}.weight"]).T

    def taps(self, name, net, length):
        h = self[f"{name}.pos_emb.z"][0, :length]
        for j in (0, 2, 4):
            h = torch.sin(self[f"{name}.{net}.{j + 1}.freq"] * self.affine(f"{name}.{net}.{j}", h))
        decay = torch.exp(-self[f"{name}.pos_emb.t"][0, :length] * self[f"{name}.modulation.deltas"][0].abs())
        return h @ self[f"{name}.{net}.6.weight"].T * decay

    def convolve(self, name, u):
        length = u.shape[1]
        ahead = self.taps(name, "implicit_filter", length)
        behind = None
        if f"{name}.implicit_filter_rev.0.weight" in self.state:
            behind = self.taps(name, "implicit_filter_rev", length)
        y = self[f"{name}.bias"] * u
        for t in range(length):
            for s in range(length):
                if s <= t:
                    y[:, t] += ahead[t - s] * u[:, s]
                elif behind is not None:
                    y[:, t] += behind[s - t - 1] * u[:, s]
        return y

    def mixer(self, name, x):
        if f"{name}.layernorm.weight" in self.state:
            x = self.norm(f"{name}.layernorm", x, eps=1e-5)
        p, w = self.affine(f"{name}.in_linear", x), self[f"{name}.short_filter.weight"][:, 0]
        short = self[f"{name}.short_filter.bias"].expand_as(p).clone()
        for back in range(3):
            short[:, back:] += w[:, 2 - back] * p[:, : p.shape[1] - back]
        x1, x2, v = short.split(x.shape[-1], -1)
        y = self.convolve(f"{name}.filter_fn", v * x1) * x2
        if f"{name}.filter_fn2.bias" in self.state:
            y = y + self.convolve(f"{name}.filter_fn2", x)
        return self.affine(f"{name}.out_linear", y)

    def encoder(self, ids):
        at = "bert.embeddings"
        x = self[f"{at}.word_embeddings.weight"][ids] + self[f"{at}.token_type_embeddings.weight"][0]
        x = self.norm(f"{at}.LayerNorm", x + self[f"{at}.position_embeddings.weight"][: ids.shape[1]])
        layers = 1 + max(int(name.split(".")[3]) for name in self.state if ".layer." in name)
        for i in range(layers):
            layer = f"bert.encoder.layer.{i}"
            h = self.mixer(f"{layer}.attention", x)
            gated, rest = self.blocks(f"{layer}.mlp.gated_layers", h).chunk(2, -1)
            active = gated * 0.5 * (1 + torch.erf(gated / math.sqrt(2)))
            m = self.blocks(f"{layer}.mlp.wo", active * rest) + self[f"{layer}.mlp.wo.bias"]
            x = self.norm(f"{layer}.mlp.layernorm", m + h)
        return x

    def logits(self, ids):
        h = F.gelu(self.affine("cls.predictions.transform.dense", self.encoder(ids)))
        return self.affine("cls.predictions.decoder", self.norm("cls.predictions.transform.LayerNorm", h))


def load(state, cls=M2BertForMaskedLM, **kwargs):
    config, weights = convert_m2_state_dict(state, **kwargs)
    model = cls(config).double()
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_outputs(released_state, variant):
    state = released_state(**variant)
    model = load(state, legacy_padding=True)
    ids = torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0  # which the released model does not look at
    with torch.no_grad():
        assert relative_error(model(ids, mask).logits, Released(state).logits(ids)) <= 1e-12
        masked = load(state)(ids, mask).logits
    assert relative_error(masked[0], Released(state).logits(ids)[0]) <= 1e-12
    alone = Released(state).logits(ids[1:, :13])
    assert relative_error(masked[1:, :13], alone) <= 1e-12


def test_released_classifier_with_both_poolings(released_state):
    state = released_state(head="classifier")
    ids, mask = torch.arange(1, 25).view(2, 12), torch.ones(2, 12)
    mask[1, 7:] = 0
    hidden, net = Released(state).encoder(ids), Released(state)
    mean = torch.stack([hidden[0].mean(0), hidden[1, :7].mean(0)])
    for pooling, pooled in (("cls", hidden[:, 0]), ("mean", mean)):
        expected = net.affine("classifier", net.affine("bert.pooler.dense", pooled).tanh())
        model = load(state, M2BertForSequenceClassification, pooling=pooling, legacy_padding=True)
        with torch.no_grad():
            assert relative_error(model(ids, mask).logits, expected) <= 1e-12


@pytest.mark.parametrize("variant", [*VARIANTS, {"head": "classifier"}])
def test_there_and_back(released_state, variant):
    state = released_state(**variant)
    cls = M2BertForSequenceClassification if "head" in variant else M2BertForMaskedLM
    again = export_m2_state_dict(load(state, cls))
    theirs = {"model." + name.removeprefix("model."): value for name, value in state.items()}
    assert again.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(again[name], value), name


def test_dense_mlp_and_wrapped_checkpoint(released_state):
    state = released_state()
    for i in range(2):
        for part in ("gated_layers", "wo"):
            name = f"model.bert.encoder.layer.{i}.mlp.{part}.weight"
            state[name] = torch.block_diag(*state[name])
    blocks = load(released_state())
    dense = load({"state": {"model": state}, "rng": []})
    assert dense.config.mlp_structure is None
    ids = torch.arange(20).view(2, 10)
    assert relative_error(dense(ids).logits, blocks(ids).logits) <= 1e-12


def test_w_mod_multiplies_the_frequencies(released_state):
    state = released_state()
    model = load(state, w_mod=3, legacy_padding=True)
    ids = torch.arange(20).view(2, 10)
    for name in list(state):
        if name.endswith(".freq"):
            state[name] = 3 * state[name]
    with torch.no_grad():
        assert relative_error(model(ids).logits, Released(state).logits(ids)) <= 1e-12


@pytest.mark.parametrize(("dim", "hidden", "blocks"), [(16, 23, 4), (14, 23, 5), (14, 25, 5)])
def test_padded_blocks_need_the_size(dim, hidden, blocks):
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": 1, "filter_width": 8}
    structure = structmat.BlockDiagonalConfig(nblocks=blocks)
    model = M2BertForMaskedLM(M2BertConfig(vocab_size=50, mlp_structure=structure, **sizes)).double().eval()
    state, ids = export_m2_state_dict(model), torch.arange(20).view(2, 10)
    again = load(state, intermediate_size=hidden)
    with torch.no_grad():
        assert relative_error(again(ids).logits, model(ids).logits) <= 1e-12
    if dim % blocks:
        with pytest.raises(ValueError, match="intermediate_size must be given: 5 blocks do not divide hidden_size 14"):
            convert_m2_state_dict(state)
    with pytest.raises(ValueError, match=r"mlp\.wo\.weight has shape"):
        convert_m2_state_dict(state, intermediate_size=hidden + 8)


def test_positions_of_the_filters_are_loaded(released_state):
    state = released_state()
    model = load(state)
    theirs = state["model.bert.encoder.layer.1.attention.filter_fn2.pos_emb.z"]
    assert torch.equal(model.model.layers[1].mixer.residual.filter.z, theirs)


@pytest.mark.parametrize("length", [32, 64, 80])
def test_longer_maximum_length(released_state, length):
    state = released_state()
    model = load(state, max_position_embeddings=length, legacy_padding=True)
    rows = -(-length // 32)
    for name in list(state):
        if name.endswith("position_embeddings.weight"):
            state[name] = torch.cat([state[name]] * rows)[:length]
        elif name.endswith("pos_emb.z"):
            state[name] = torch.cat([state[name]] * rows, 1)[:, :length]
        elif name.endswith("pos_emb.t"):
            state[name] = torch.linspace(0, 1, length, dtype=torch.float64)[None, :, None]
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(model(ids).logits, Released(state).logits(ids)) <= 1e-12


def test_published_names_and_sizes():
    """The names and shapes that issue 7 lists, of the model of 80 million parameters."""
    with torch.device("meta"):
        state = export_m2_state_dict(M2BertForMaskedLM(M2BertConfig.preset("80M")))
    at = "model.bert.encoder.layer.11."
    shapes = {
        "attention.filter_fn2.bias": (768,),
        "attention.filter_fn.pos_emb.z": (1, 128, 5),
        "attention.filter_fn.implicit_filter.0.weight": (128, 5),
        "attention.filter_fn.implicit_filter.5.freq": (1, 128),
        "attention.filter_fn.implicit_filter_rev.6.weight": (768, 128),
        "attention.filter_fn2.modulation.deltas": (1, 1, 768),
        "attention.in_linear.weight": (2304, 768),
        "attention.short_filter.weight": (2304, 1, 3),
        "mlp.gated_layers.weight": (4, 1536, 192),
        "mlp.wo.weight": (4, 192, 768),
    }
    for name, shape in shapes.items():
        assert tuple(state[at + name].shape) == shape, name
    assert tuple(state["model.cls.predictions.decoder.weight"].shape) == (30528, 768)


def test_errors_name_what_is_wrong(released_state):
    state = released_state()
    del state["model.bert.encoder.layer.1.mlp.wo.bias"]
    state["model.bert.encoder.layer.1.attention.Wqkv.weight"] = torch.ones(3)
    state["model.bert.embeddings.LayerNorm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"missing: bert\.encoder\.layer\.1\.mlp\.wo\.bias; unknown: .*Wqkv") as info:
        convert_m2_state_dict(state)
    assert "LayerNorm.weight has shape (3,), not (16,)" in str(info.value)
    state = released_state()
    state["model.bert.encoder.layer.0.attention.filter_fn.implicit_filter.3.freq"] = torch.ones(1, 8)
    with pytest.raises(ValueError, match=r"implicit_filter\.3\.freq must be equal"):
        convert_m2_state_dict(state)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight' is missing"):
        convert_m2_state_dict({})
    with pytest.raises(ValueError, match=r"missing: bert\.encoder\.layer\.0\.attention\.layernorm\.weight"):
        convert_m2_state_dict(released_state(), mixer_norm=True)
    with pytest.raises(TypeError, match="M2BertConfig has no option 'legacy_paddding'"):
        convert_m2_state_dict(released_state(), legacy_paddding=True)
    with pytest.raises(ValueError, match="at least that of the checkpoint, 32, got 16"):
        convert_m2_state_dict(released_state(), max_position_embeddings=16)
    with pytest.raises(TypeError, match="must be an M2-BERT with a head, got M2BertModel"):
        export_m2_state_dict(load(released_state()).model)
    config = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for option, message in (
        ({"filter_depth": 2}, "filter_depth must be 3, as in the m2 repository, got 2"),
        ({"mlp_structure": structmat.MonarchConfig(nblocks=2)}, "dense or block-diagonal MLPs only"),
    ):
        with pytest.raises(ValueError, match=message):
            export_m2_state_dict(M2BertForMaskedLM(M2BertConfig(**config, **option)))
    state = released_state()
    state["model.cls.predictions.decoder.weight"] = state["model.cls.predictions.decoder.weight"] + 1
    assert not convert_m2_state_dict(state)[0].tie_word_embeddings
