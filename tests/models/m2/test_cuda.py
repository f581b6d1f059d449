"""The M2 models on a CUDA device: the values of the CPU, padding, generation, autocast, compilation, checkpointing."""

import pytest
import torch

from structmat.models.m2 import (
    M2BertConfig,
    M2BertModel,
    M2GPTConfig,
    M2GPTForCausalLM,
    M2ViTConfig,
    M2ViTForImageClassification,
)

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "hidden_dropout_prob": 0.0}


def error(found, wanted):
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return M2GPTForCausalLM(M2GPTConfig(vocab_size=50, max_position_embeddings=96, **SIZES)).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (3, 61), generator=torch.Generator().manual_seed(0))


def test_gpt_has_the_values_and_gradients_of_the_cpu(gpt, tokens):
    wanted = gpt(tokens, labels=tokens)
    expected = torch.autograd.grad(wanted.loss, list(gpt.parameters()))
    gpt = gpt.cuda()
    found = gpt(tokens.cuda(), labels=tokens.cuda())
    assert error(found.logits, wanted.logits) < 1e-5
    for g, e in zip(torch.autograd.grad(found.loss, list(gpt.parameters())), expected, strict=True):
        assert error(g, e) < 1e-3


@torch.no_grad()
def test_gpt_is_causal_and_generates_with_and_without_cache(gpt, tokens):
    gpt, tokens = gpt.cuda(), tokens.cuda()
    changed = tokens.clone()
    changed[:, 40:] = 7
    assert error(gpt(changed).logits[:, :40], gpt(tokens).logits[:, :40]) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(gpt.generate(tokens, **options), gpt.generate(tokens, use_cache=False, **options))


def test_gpt_trains_under_autocast_with_and_without_checkpointing(gpt, tokens):
    gpt, tokens = gpt.cuda().train(), tokens.cuda()

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            loss = gpt(tokens, labels=tokens).loss
        return loss, torch.autograd.grad(loss, list(gpt.parameters()))

    loss, plain = gradients()
    gpt.gradient_checkpointing_enable()
    again, recomputed = gradients()
    assert torch.isfinite(loss)
    assert error(again, loss) < 1e-3
    for a, b in zip(recomputed, plain, strict=True):
        assert torch.isfinite(a).all()
        assert error(a, b) < 2e-2


@torch.no_grad()
def test_bert_does_not_see_padding(tokens):
    torch.manual_seed(0)
    bert = M2BertModel(M2BertConfig(vocab_size=50, max_position_embeddings=128, **SIZES)).eval().cuda()
    padded = torch.zeros(3, 128, dtype=torch.long)
    padded[:, :61] = tokens
    alone = bert(tokens.cuda()).last_hidden_state
    together = bert(padded.cuda(), attention_mask=padded.cuda() > 0).last_hidden_state[:, :61]
    assert error(together, alone) < 1e-5


@torch.no_grad()
def test_vit_has_the_values_of_the_cpu():
    torch.manual_seed(0)
    config = M2ViTConfig(image_size=28, patch_size=4, num_channels=1, num_labels=10, **SIZES)
    vit, images = M2ViTForImageClassification(config).eval(), torch.randn(2, 1, 28, 28)
    assert error(vit.cuda()(images.cuda()).logits, vit.cpu()(images).logits) < 1e-5


def test_compiled_with_inductor(gpt, tokens):
    gpt, tokens = gpt.cuda().train(), tokens.cuda()
    compiled = torch.compile(lambda t: gpt(t, use_cache=False).logits, fullgraph=True)
    wanted, found = gpt(tokens, use_cache=False).logits, compiled(tokens)
    assert error(found, wanted) < 1e-4
    params = list(gpt.parameters())
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), params),
        torch.autograd.grad(wanted.square().sum(), params),
        strict=True,
    ):
        assert error(a, b) < 1e-3
