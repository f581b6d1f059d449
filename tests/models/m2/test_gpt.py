"""M2-GPT: causality, generation from a state, padding on the left."""

import copy

import pytest
import torch
import torch.nn.functional as F

import structmat
from structmat.models.m2 import M2Cache, M2GPTForCausalLM


@pytest.fixture
def gpt(gpt_config, stir):
    torch.manual_seed(0)
    return stir(M2GPTForCausalLM(gpt_config()).eval(), 0.5)


@pytest.fixture
def padded(tokens):
    """The tokens, the last two rows with padding of length 4 and 9 on the left."""
    ids, mask = tokens.clone(), torch.ones_like(tokens)
    for row, count in ((1, 4), (2, 9)):
        mask[row, :count] = 0
        ids[row, count:] = tokens[row, : tokens.shape[1] - count]
        ids[row, :count] = 7
    return ids, mask


def test_no_attention_and_no_dense_mlp(gpt):
    for name, module in gpt.named_modules():
        assert not isinstance(module, torch.nn.MultiheadAttention), name
        if ".mlp." in name and name.endswith((".gate", ".out")):
            assert isinstance(module, structmat.nn.StructuredLinear), name


@pytest.mark.parametrize("t", [0, 1, 7, 19])
def test_prefixes_do_not_change(gpt, tokens, t):
    other = tokens.clone()
    other[:, t:] = (other[:, t:] + 11) % 50
    with torch.no_grad():
        one, two = gpt(tokens).logits, gpt(other).logits
    assert (one[:, :t] - two[:, :t]).abs().sum() <= 1e-5 * max(one[:, :t].abs().sum(), 1)
    assert t == 0 or (one[:, :t] - two[:, :t]).abs().max() <= 1e-5
    assert (one[:, t:] - two[:, t:]).abs().amax(-1).min() > 1e-2


def test_no_gradient_from_later_inputs(gpt):
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    y = gpt.double()(inputs_embeds=x, use_cache=False).logits
    for t in (0, 5, 11):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        assert gradient[0, t + 1 :].abs().sum() <= 1e-12 * gradient.abs().sum()
        assert gradient[0, : t + 1].abs().amax(-1).min() > 0


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 8, 3]])
def test_states_give_the_outputs_of_the_whole(gpt, tokens, pieces):
    with torch.no_grad():
        whole, cache, got = gpt(tokens, use_cache=False), None, []
        assert whole.past_key_values is None
        for piece in tokens.split(pieces, 1):
            out = gpt(piece, past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache = out.past_key_values
            got.append(out.logits)
        assert cache.get_seq_length() == 20
    assert (torch.cat(got, 1) - whole.logits).abs().max() <= 1e-5 * whole.logits.abs().max()


def test_training_returns_no_state(gpt, tokens):
    assert gpt.train()(tokens).past_key_values is None
    assert gpt.eval()(tokens).past_key_values is not None
    gpt.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert gpt(tokens, use_cache=True).past_key_values is None


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_layer_norm_stands_at_the_end(gpt_config, tokens, use_cache):
    with torch.no_grad():
        last = M2GPTForCausalLM(gpt_config()).eval().model(tokens, use_cache=use_cache).last_hidden_state
    assert last.mean(-1).abs().max() <= 1e-5 and (last.var(-1, correction=0) - 1).abs().max() <= 0.1


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("left", [False, True])
def test_generation_with_cache_equals_without(gpt, tokens, padded, how, left):
    ids, mask = padded if left else (tokens, None)
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **how}
    cached, calls = gpt.generate(ids, use_cache=True, **how), []
    assert torch.equal(cached, gpt.generate(ids, use_cache=False, **how))
    assert cached.shape[1] == 32
    gpt.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    gpt.generate(ids, use_cache=True, **how)
    assert calls == [20] + [1] * 11  # the prefix is read once


def test_sampled_generation_with_cache_equals_without(gpt, tokens):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(gpt.generate(tokens, max_new_tokens=10, do_sample=True, use_cache=use_cache, pad_token_id=0))
    assert torch.equal(*results)


def test_left_padding_changes_nothing(gpt, tokens, padded):
    ids, mask = padded
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    together = gpt.generate(ids, attention_mask=mask, **how)
    for row, count in ((0, 0), (1, 4), (2, 9)):
        alone = tokens[row : row + 1, : 20 - count]
        assert torch.equal(together[row, count:], gpt.generate(alone, **how)[0])
        with torch.no_grad():
            wide, narrow = gpt(ids, mask).logits[row, count:], gpt(alone).logits[0]
        assert (wide - narrow).abs().max() <= 1e-5 * narrow.abs().max()


def test_generation_from_embeddings(gpt, tokens):
    embeds = gpt.get_input_embeddings()(tokens)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = gpt.generate(tokens, **how)[:, 20:]
    assert torch.equal(gpt.generate(inputs_embeds=embeds, **how), expected)
    assert torch.equal(gpt.generate(inputs_embeds=embeds, attention_mask=torch.ones(3, 20), **how), expected)
    assert torch.equal(gpt.generate(tokens, inputs_embeds=embeds, **how)[:, 20:], expected)


def test_generation_goes_on_from_a_state(gpt, tokens):
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cache = gpt(tokens[:, :15]).past_key_values
    assert torch.equal(gpt.generate(tokens, past_key_values=cache, **how), gpt.generate(tokens, **how))


def test_a_conversation_goes_on_from_what_generation_returns(gpt, tokens):
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = gpt.generate(tokens, return_dict_in_generate=True, **how)
    longer = torch.cat([out.sequences, tokens[:, :3]], 1)
    how["attention_mask"] = torch.ones_like(longer)  # a 0 that was generated is no padding
    assert torch.equal(gpt.generate(longer, past_key_values=out.past_key_values, **how), gpt.generate(longer, **how))


@pytest.mark.parametrize("length", [20, 10])
def test_generation_needs_a_token_behind_the_state(gpt, tokens, length):
    with torch.no_grad():
        cache = gpt(tokens).past_key_values
    with pytest.raises(ValueError, match="at least one token behind the 20 that the cache has seen"):
        gpt.generate(tokens[:, :length], past_key_values=cache, max_new_tokens=2, pad_token_id=0)


def test_generation_stops_at_the_end_of_texts(gpt, tokens):
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = gpt.generate(tokens, **how)
    end = int(free[0, 23])
    stopped = gpt.generate(tokens, eos_token_id=end, **how)
    first = free[0, 20:].tolist().index(end)
    assert stopped[0, 20 : 21 + first].tolist() == free[0, 20 : 21 + first].tolist()
    assert (stopped[0, 21 + first :] == 0).all()


def test_a_copy_of_a_state_goes_its_own_way(gpt, tokens):
    with torch.no_grad():
        cache = gpt(tokens[:, :10], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        gpt(tokens[:, 15:18], past_key_values=other)
        got = gpt(tokens[:, 10:], past_key_values=cache).logits
        whole = gpt(tokens).logits[:, 10:]
    assert (got - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_loss_is_that_of_the_successors(gpt, tokens):
    labels = tokens.clone()
    labels[:, 15:] = -100
    out = gpt(tokens, labels=labels)
    expected = F.cross_entropy(out.logits[:, :14].reshape(-1, 50), tokens[:, 1:15].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(gpt(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    pair = gpt(tokens, labels=labels, return_dict=False, use_cache=False)
    assert len(pair) == 2 and torch.equal(pair[0], out.loss)


def test_errors(gpt, tokens):
    with pytest.raises(ValueError, match=r"has 65 tokens, more than config\.max_position_embeddings = 64"):
        gpt(torch.ones(1, 65, dtype=torch.long))
    cache = gpt(tokens).past_key_values
    with pytest.raises(ValueError, match="has 70 tokens"):
        gpt(torch.ones(3, 50, dtype=torch.long), past_key_values=cache)
    with pytest.raises(RuntimeError, match="a state holds no graph"):
        gpt(tokens, past_key_values=cache)
    assert cache.get_seq_length() == 20
    with torch.no_grad(), pytest.raises(ValueError, match="past_key_values must have 2 layers, got 3"):
        gpt(tokens, past_key_values=M2Cache(3))
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        gpt.generate(tokens[:1], prompt_lookup_num_tokens=3, max_new_tokens=5, pad_token_id=0)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        gpt()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 20\), got \(3, 19\)"):
        gpt(tokens, torch.ones(3, 19))
    with pytest.raises(TypeError, match="must be an M2Cache, got tuple"):
        gpt(tokens, past_key_values=())
    with pytest.raises(ValueError, match="logits_to_keep must be 0"):
        gpt(tokens, labels=tokens, logits_to_keep=3)
    assert M2Cache(2).get_seq_length() == 0
