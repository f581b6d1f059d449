"""What transformers asks of a model, of all M2 models: files, Auto classes, checkpointing, compilation, autocast."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers

import structmat
from structmat.models.m2 import (
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertModel,
    M2GPTForCausalLM,
    M2GPTModel,
    M2ViTForImageClassification,
    M2ViTModel,
)
from structmat.testing import relative_error

CASES = {
    "bert": (M2BertModel, transformers.AutoModel),
    "mlm": (M2BertForMaskedLM, transformers.AutoModelForMaskedLM),
    "classifier": (M2BertForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "gpt": (M2GPTModel, transformers.AutoModel),
    "lm": (M2GPTForCausalLM, transformers.AutoModelForCausalLM),
    "vit": (M2ViTModel, transformers.AutoModel),
    "images": (M2ViTForImageClassification, transformers.AutoModelForImageClassification),
}


#: What saving writes into a configuration.
WRITTEN = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@pytest.fixture(params=CASES)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, bert_config, gpt_config, vit_config, stir):
    cls, _ = CASES[kind]
    config = {"M2B": bert_config, "M2G": gpt_config, "M2V": vit_config}[cls.__name__[:3]]
    torch.manual_seed(0)
    return stir(cls(config(mlp_structure=structmat.MonarchConfig(nblocks=(2, 4)))).eval(), 0.3)


@pytest.fixture
def inputs(model, tokens):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))}
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def first(out):
    return out.logits if "logits" in out else out.last_hidden_state


def test_save_and_load(model, kind, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    cls, auto = CASES[kind]
    assert (tmp_path / "model.safetensors").exists()
    for loader in (cls, auto):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is cls and not any(info.values()), info
        ours, theirs = model.config.to_dict(), again.config.to_dict()
        assert all(theirs[key] == value for key, value in ours.items() if key not in WRITTEN)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        with torch.no_grad():
            assert relative_error(first(again(**inputs)), first(model(**inputs))) <= 1e-5
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_base_model_loads_from_a_model_with_a_head(gpt_config, tokens, tmp_path):
    model = M2GPTForCausalLM(gpt_config()).eval()
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is M2GPTModel
    assert relative_error(base(tokens)[0].detach(), model.model(tokens)[0].detach()) <= 1e-5


def test_missing_weights_are_drawn(bert_config, tmp_path):
    """A classifier on an encoder that was saved without one: its own weights are new, the others loaded."""
    model = M2BertForMaskedLM(bert_config())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = M2BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    assert 0.005 < again.classifier.weight.std() < 0.05 and again.classifier.bias.abs().max() == 0
    for name, value in model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_partly_missing_weights_keep_the_others(gpt_config, tmp_path):
    """Of a structured layer or a filter of which the file has a part, this part is loaded and the rest drawn."""
    model = M2GPTForCausalLM(gpt_config())
    state = model.state_dict()
    gone = ["model.layers.0.mlp.out.bias", "model.layers.0.mixer.long.skip", "model.layers.1.mixer.long.filter.z"]
    model.save_pretrained(
        tmp_path, state_dict={k: v for k, v in state.items() if k not in gone and k != "lm_head.weight"}
    )
    again = M2GPTForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in state.items():
        assert again[name].isfinite().all(), name
        assert name in gone or torch.equal(again[name], value), name
    assert torch.equal(again[gone[2]], state[gone[2]])  # positions are made as they were, the others drawn
    assert 0 < (again[gone[0]] - state[gone[0]]).abs().max() < 1


@pytest.mark.parametrize(
    "part", ["mlp.gate.weight", "mlp.out.weight", "mixer.long", "filter.mlps", "mixer.project.weight"]
)
def test_missing_weights_of_a_kind_are_drawn(gpt_config, stir, tmp_path, part):
    """Also factors, which are the parameters of a child of the layer that draws them."""
    model = stir(M2GPTForCausalLM(gpt_config()))
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if part not in k and "lm_head" not in k})
    torch.manual_seed(0)
    again = M2GPTForCausalLM.from_pretrained(tmp_path).state_dict()
    fresh = M2GPTForCausalLM(gpt_config()).state_dict()
    for name, value in state.items():
        if part not in name:
            assert torch.equal(again[name], value), name
        elif value.numel() > 60:
            assert 0.7 < again[name].std() / fresh[name].std() < 1.4, name


def test_an_empty_model_gets_its_weights(gpt_config, tokens):
    with torch.device("meta"):
        model = M2GPTForCausalLM(gpt_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights()
    assert model(tokens).logits.isfinite().all() and model.lm_head.weight is model.model.tokens.weight


def test_options_that_override_a_file(bert_config, tokens, tmp_path):
    M2BertModel(bert_config()).save_pretrained(tmp_path / "one")
    structure = structmat.MonarchConfig(nblocks=(2, 4))
    model = M2BertModel.from_pretrained(tmp_path / "one", mlp_structure=structure)
    model.save_pretrained(tmp_path / "two")
    again = M2BertModel.from_pretrained(tmp_path / "two").eval()
    assert isinstance(again.layers[0].mlp.gate.weight(), structmat.Monarch)
    assert relative_error(again(tokens)[0].detach(), model.eval()(tokens)[0].detach()) <= 1e-5
    with pytest.raises(ValueError, match="pooling must be 'cls' or 'mean', got 'max'"):
        M2BertModel.from_pretrained(tmp_path / "one", pooling="max")


def test_models_made_in_half_precision_spare_the_filters(gpt_config, tokens):
    model = transformers.AutoModelForCausalLM.from_config(gpt_config(), dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".filter." in name else torch.bfloat16), name
    assert model(tokens).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["mlm", "lm", "classifier"], indirect=True)
def test_resized_vocabulary(model, inputs, tmp_path):
    with torch.no_grad():
        before = first(model(**inputs))
        model.resize_token_embeddings(57)
        after = first(model(**inputs))
        assert torch.equal(after[..., : before.shape[-1]], before) and model.config.vocab_size == 57
        assert model.get_output_embeddings() is None or after.shape[-1] == 57
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert relative_error(first(type(model).from_pretrained(tmp_path)(**inputs)), after) <= 1e-4


def test_the_trainer_shifts_smoothed_labels():
    """It does so for the classes in this table; others' labels it compares with the logits of the token itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert M2GPTForCausalLM.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert transformers.AutoModelForCausalLM._model_mapping[transformers.GPT2Config] is transformers.GPT2LMHeadModel


@pytest.mark.parametrize("kind", ["lm"], indirect=True)
def test_exports_for_any_length(model, inputs):
    model.config.use_cache = False
    length = torch.export.Dim("length", min=3, max=64)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={"input_ids": {1: length}, "attention_mask": {1: length}}
    ).module()
    for n in (3, 13, 64):
        tokens = torch.arange(3 * n).view(3, n) % 50
        mask = (torch.arange(n) < torch.tensor([[1], [n // 2], [n]])).long()
        given = {"input_ids": tokens, "attention_mask": mask}
        with torch.no_grad():
            assert relative_error(first(program(**given)), first(model(**given))) <= 1e-4


@pytest.mark.parametrize("kind", ["gpt", "vit", "classifier"], indirect=True)
def test_every_dropout_is_applied(kind, model, inputs):
    """After the embedding, in both MLPs, and after both parts of a pre-norm block; before the classifier its own."""
    calls = []
    config = type(model.config)(**{**model.config.to_dict(), "hidden_dropout_prob": 0.25, "classifier_dropout": 0.5})
    net = type(model)(config).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    net(**inputs)
    assert sorted(calls) == ([0.25] * 3 + [0.5] if kind == "classifier" else [0.25] * 7)
    if kind == "gpt":
        calls.clear()
        net(**inputs, use_cache=True)
        assert len(calls) == 7


def test_gradient_checkpointing(model, inputs):
    model.train()
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for enable in (False, True):
        net = copy.deepcopy(model)
        calls = []
        if enable:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in net.modules():
            if type(layer).__name__ in ("M2Block", "M2BertLayer"):
                layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        first(net(**inputs)).square().mean().backward()
        assert len(calls) == 2 * (1 + enable)  # two layers, each a second time where recomputed
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) <= 1e-6, name


@pytest.mark.parametrize("kind", ["mlm", "lm"], indirect=True)
def test_compiles_in_one_graph(model, inputs):
    torch._dynamo.reset()
    del model.model.layers[1:]  # half the time
    extra = {"use_cache": False} if "gpt" in model.config.model_type else {}

    def gradients(run):
        out = first(run(**inputs, **extra))
        return [out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()), allow_unused=True)]

    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for one, two in zip(got, gradients(model), strict=True):
        assert (one is None) == (two is None)
        assert one is None or relative_error(one, two) <= 1e-4


def test_autocast(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        out = first(model(**inputs))
        out.float().square().mean().backward()
    assert relative_error(out.detach().float(), first(model(**inputs)).detach()) <= 0.1
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32), (
            name
        )


def test_generation_under_autocast(gpt_config, tokens):
    model = M2GPTForCausalLM(gpt_config()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (3, 24)


def test_bfloat16_weights(model, inputs, tmp_path):
    """Filters stay in float32: their positions and frequencies need it."""
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".filter." in name else torch.bfloat16), name
    expected = first(model(**inputs)).detach()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    out = first(half(**inputs)).detach()
    assert out.dtype == torch.bfloat16 and relative_error(out.float(), expected) <= 0.1
    first(half(**inputs)).float().square().mean().backward()


def test_hidden_states(model, inputs):
    out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert model(**inputs).hidden_states is None
    last = model(**inputs, output_hidden_states=True, return_dict=False)[-1]
    assert all(torch.equal(a, b) for a, b in zip(last, out.hidden_states, strict=True))


def test_meta_device(kind, model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_transformers_is_imported_with_m2_only(gpt_config, tmp_path):
    """And a new process that loads a model before it has made one gets it: transformers patches torch meanwhile."""
    M2GPTModel(gpt_config()).save_pretrained(tmp_path)
    code = (
        "import sys, structmat; assert 'transformers' not in sys.modules\n"
        "assert 'M2GPTModel' in dir(structmat.models); assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    structmat.models.M2GPTModel\n"
        "except ImportError as error:\n    print(error)\n"
        "del sys.modules['transformers']\n"
        "from structmat.models import M2GPTModel\n"
        "print(M2GPTModel is structmat.models.m2.M2GPTModel, hasattr(structmat.models, 'M2'))\n"
        f"print(M2GPTModel.from_pretrained({str(tmp_path)!r}).num_parameters())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith("structmat.models.M2GPTModel needs transformers") and out[1] == "True False"
    assert int(out[2]) > 0
