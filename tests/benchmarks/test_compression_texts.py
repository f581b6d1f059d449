"""Texts to heal on: long ones in parts, documents held out, windows that a model writes itself."""

import pytest
import torch
from harness import language_model
from harness.language_model import news, own_windows, token_windows


class Words:
    """A tokenizer of words with the space before them, of one text or several."""

    def __call__(self, text, return_tensors=None, **_):
        texts = [text] if isinstance(text, str) else text
        found = [[len(word) for word in t.replace(" ", "| ").split("|") if word] for t in texts]
        return {"input_ids": torch.tensor(found) if return_tensors else found}


@pytest.mark.parametrize("part", [3, 10, 57])
def test_parts_have_the_tokens_of_the_whole(monkeypatch, part):
    text = " ".join("x" * (1 + i % 7) for i in range(200))
    whole = token_windows(Words(), text, 20, 5, seed=3)
    monkeypatch.setattr(language_model, "_PART", part)
    assert torch.equal(token_windows(Words(), text, 20, 5, seed=3), whole)


def test_held_documents_are_not_among_the_others():
    pytest.importorskip("gensim")
    held, others = news(judged=False, held=True), news(judged=False, held=False)
    assert others + held == news(judged=False) and len(held.splitlines()) == 20 and len(others.splitlines()) == 280


def test_a_model_goes_on_with_prompts():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **size)).eval()
    prompts = torch.randint(40, (5, 4), generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    windows = own_windows(model, prompts, 12, seed=2, batch=2)
    assert windows.shape == (5, 12) and torch.equal(windows[:, :4], prompts)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own_windows(model, prompts, 12, seed=2, batch=2), windows)
    assert not torch.equal(own_windows(model, prompts, 12, seed=3, batch=2), windows)
