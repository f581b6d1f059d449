"""Tiny M2 models, and state dicts as the m2 repository saves them."""

import pytest
import torch

pytest.importorskip("transformers")

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "filter_width": 8,
}


@pytest.fixture
def size():
    return dict(SIZE)


@pytest.fixture
def bert_config():
    from structmat.models.m2 import M2BertConfig

    def make(**kwargs):
        return M2BertConfig(**{"vocab_size": 50, "max_position_embeddings": 160, **SIZE, **kwargs})

    return make


@pytest.fixture
def gpt_config():
    from structmat.models.m2 import M2GPTConfig

    def make(**kwargs):
        return M2GPTConfig(**{"vocab_size": 50, "max_position_embeddings": 64, **SIZE, **kwargs})

    return make


@pytest.fixture
def vit_config():
    from structmat.models.m2 import M2ViTConfig

    def make(**kwargs):
        sizes = {"image_size": (12, 8), "patch_size": 4, "num_channels": 2, "num_labels": 5}
        return M2ViTConfig(**{**sizes, **SIZE, **kwargs})

    return make


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def stir():
    """Larger random parameters: at its initial values a model hardly mixes, and tests would see nothing."""

    def apply(model, scale=1.0, seed=3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                fan = parameter.shape[-1] if parameter.ndim > 1 else 4
                parameter.add_((scale * noise / fan**0.5).to(parameter))
        return model

    return apply


@pytest.fixture
def released_state():
    """Random weights with the names and shapes of the released code."""

    def make(
        d=16, hidden=24, layers=2, blocks=4, length=32, vocab=50, features=5, width=8,
        bidirectional=True, residual=True, additions=False, head="mlm", prefix="model.", seed=7,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape, scale=0.5):
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        state = {}

        def affine(name, *shape):
            state[f"{name}.weight"], state[f"{name}.bias"] = rand(*shape, scale=shape[-1] ** -0.5), rand(shape[0])

        def norm(name):
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + rand(d), rand(d)

        state["bert.embeddings.position_ids"] = torch.arange(length)[None]
        for name, rows in (("word", vocab), ("position", length), ("token_type", 2)):
            state[f"bert.embeddings.{name}_embeddings.weight"] = rand(rows, d)
        norm("bert.embeddings.LayerNorm")
        for i in range(layers):
            at = f"bert.encoder.layer.{i}.attention"
            for filter_name in ("filter_fn", "filter_fn2") if residual else ("filter_fn",):
                f = f"{at}.{filter_name}"
                state[f"{f}.bias"] = rand(d)
                state[f"{f}.pos_emb.z"] = rand(1, length, features)
                state[f"{f}.pos_emb.t"] = torch.linspace(0, 1, length, dtype=torch.float64)[None, :, None]
                state[f"{f}.modulation.deltas"] = rand(1, 1, d, scale=3)
                freq = 1 + rand(1, width)
                for net in ("implicit_filter", "implicit_filter_rev") if bidirectional else ("implicit_filter",):
                    affine(f"{f}.{net}.0", width, features)
                    for j in (1, 3, 5):
                        state[f"{f}.{net}.{j}.freq"] = freq
                    affine(f"{f}.{net}.2", width, width)
                    affine(f"{f}.{net}.4", width, width)
                    state[f"{f}.{net}.6.weight"] = rand(d, width, scale=0.2)
            affine(f"{at}.in_linear", 3 * d, d)
            affine(f"{at}.out_linear", d, d)
            affine(f"{at}.short_filter", 3 * d, 1, 3)
            if additions:
                norm(f"{at}.layernorm")
            mlp = f"bert.encoder.layer.{i}.mlp"
            state[f"{mlp}.gated_layers.weight"] = rand(blocks, 2 * hidden // blocks, d // blocks)
            state[f"{mlp}.wo.weight"] = rand(blocks, d // blocks, hidden // blocks)
            state[f"{mlp}.wo.bias"] = rand(d)
            norm(f"{mlp}.layernorm")
        if head == "mlm":
            affine("cls.predictions.transform.dense", d, d)
            norm("cls.predictions.transform.LayerNorm")
            state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
            state["cls.predictions.decoder.bias"] = rand(vocab)
        else:
            affine("bert.pooler.dense", d, d)
            affine("classifier", 3, d)
        return {prefix + name: value for name, value in state.items()}

    return make
