"""The output gradients' moments against torch.autograd.grad of the kept outputs, and transformers' models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structmat
from structmat import Moments, surgery


def close(actual, expected, tol=1e-12):
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)
    assert actual.shape == expected.shape and error <= tol, error


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def watched(model, names, run, loss_of):
    """Inputs and output gradients of each call of the named layers, by autograd from the outputs themselves."""
    seen = {name: [] for name in names}
    handles = []
    for name in names:
        keep = lambda _, args, y, name=name: seen[name].append((args[0].detach().clone(), y))  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    result = run(model)
    for handle in handles:
        handle.remove()
    outputs = [y for name in names for _, y in seen[name]]
    found = iter(torch.autograd.grad(loss_of(result), outputs, allow_unused=True))
    return {name: [(x, next(found)) for x, _ in seen[name]] for name in names}


def check(calibration, seen, tol=1e-12, mask=None):
    """Against all calls of the layers."""
    keep = (lambda t: t.flatten(0, -2)) if mask is None else (lambda t: t[mask])
    for name in seen:
        x, g = (torch.cat([keep(call[i]).double() for call in seen[name]]) for i in (0, 1))
        expected = Moments.of(x, g)
        assert calibration[name].count == len(x), name
        for key in ("inputs", "mean", "outputs"):
            close(getattr(calibration[name], key), getattr(expected, key), tol)


class Net(nn.Module):
    """In-place operations on outputs, a repeated layer, a structure that the gradient must cross, an embedding."""

    def __init__(self, frozen):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.first, self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.double().requires_grad_(not frozen)

    def forward(self, tokens):
        x = self.embedding(tokens)
        y = self.first(x).relu_()
        y = self.twice(y).mul_(2)
        y = self.twice(y).tanh() + x
        return self.last(y)


@pytest.mark.parametrize("frozen", [False, True])
def test_against_autograd(frozen):
    model, plain = Net(frozen), Net(False)
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))

    def loss_fn(y, batch):
        return F.cross_entropy(y.flatten(0, 1), batch.flatten() % 4, reduction="none")

    calibration = surgery.calibrate(model, tokens.split([1, 3]), gradients=True, loss_fn=loss_fn)
    assert repr(calibration) == "Calibration(3 layers, 20 to 40 inputs, with gradients)"
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    names = ["first", "twice", "last"]
    # relu_ and mul_ change the kept outputs in place: their gradients are taken from modules that do not.
    plain.forward = lambda t: _out_of_place(plain, t)
    check(calibration, watched(plain, names, lambda m: m(tokens), lambda y: loss_fn(y, tokens).sum()))


def _out_of_place(net, tokens):
    x = net.embedding(tokens)
    y = net.twice(net.first(x).relu()) * 2
    return net.last(net.twice(y).tanh() + x)


def test_independent_of_the_split_and_summed_or_not():
    x = rand(12, 6)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    whole = surgery.calibrate(model, [x], gradients=True, loss_fn=lambda y, _: y.square())
    for batches in (x.split(1), x.split(5)):
        got = surgery.calibrate(model, batches, gradients=True, loss_fn=lambda y, _: y.square().sum())
        for name in whole:
            close(got[name].outputs, whole[name].outputs)
    summed = [surgery.calibrate(model, [t], gradients=True, loss_fn=lambda y, _: y.square()) for t in x.split([3, 9])]
    for name in whole:
        close((summed[0] + summed[1])[name].outputs, whole[name].outputs)


def test_complex_and_convolution():
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.complex128))
    x = rand(7, 3, dtype=torch.complex128)
    got = surgery.calibrate(model, [x], gradients=True, loss_fn=lambda y, _: y.abs().square())
    # The change of the loss with a change of the outputs is Re(g^H dy): for |y|^2 the gradient is 2 y.
    y = 2 * model(x).detach()
    close(got["1"].outputs, y.mT @ y.conj() / 7)

    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    image = rand(2, 3, 5, 6)
    got = surgery.calibrate(model, [image], gradients=True, loss_fn=lambda y, _: y.square())
    y = 2 * model(image).detach().movedim(1, -1)
    close(got["2"].outputs, Moments.of(y, y).outputs)


def test_layers_that_no_gradient_reaches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.cut = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.cut(x)
            return self.used(x), self.unused(x)

    calibration = surgery.calibrate(Model(), [torch.ones(4, 3)], gradients=True, loss_fn=lambda y, _: y[0])
    assert calibration.without_gradients == ("unused", "cut") and calibration["used"].outputs is not None
    assert calibration["unused"].outputs is None
    assert "gradients of all but 2" in repr(calibration)
    assert surgery.calibrate(Model(), [torch.ones(4, 3)]).without_gradients == ()


def test_checkpointed_layers_are_counted_once():
    class Model(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return torch.utils.checkpoint.checkpoint(lambda t: self[1](t).tanh(), x, use_reentrant=False)

    model, x = Model(nn.Linear(3, 3), nn.Linear(3, 4)).double(), rand(5, 3)
    expected = surgery.calibrate(nn.Sequential(*model, nn.Tanh()), [x], gradients=True, loss_fn=lambda y, _: y.square())
    got = surgery.calibrate(model, x.split([2, 3]), gradients=True, loss_fn=lambda y, _: y.square())
    for name in "01":
        assert got[name].count == 5
        close(got[name].outputs, expected[name].outputs)


def test_errors():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.ones(4, 3)
    with pytest.raises(ValueError, match="gradients need a loss: give loss_fn"):
        surgery.calibrate(model, [x], gradients=True)
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got a float"):
        surgery.calibrate(model, [x], gradients=True, loss_fn=lambda *_: 1.0)
    with pytest.raises(ValueError, match=r"the loss of batch 1 \(counted from 0\) is NaN"):
        surgery.calibrate(model, [x, x], gradients=True, loss_fn=iter_losses([1.0, float("nan")]))
    for loss in (lambda y, _: y.detach(), lambda y, _: torch.ones((), requires_grad=True)):
        with pytest.raises(ValueError, match=r"the loss of batch 0 .* depends on no layer"):
            surgery.calibrate(model, [x], gradients=True, loss_fn=loss)
    with pytest.raises(ValueError, match="the output gradients of 0 have NaN or infinite entries in batch 0"):
        surgery.calibrate(model, [x], gradients=True, loss_fn=lambda y, _: (y - y.detach()).abs().sqrt() * 0)
    assert not model[0]._forward_hooks and model[0].weight.requires_grad and model[0].weight.grad is None


def iter_losses(factors):
    found = iter(factors)
    return lambda y, _: y * next(found)


# ---------------------------------------------------------------- transformers
transformers = pytest.importorskip("transformers")
LOWRANK = structmat.LowRankConfig(rank=1)
TOKENS = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(7) < torch.tensor([[7], [3], [5], [7]])


def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    return transformers.BertForMaskedLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50)
    )


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=50, num_local_experts=3, head_dim=8,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(sizes):
    labels = TOKENS.masked_fill(~MASK, -100)
    parts = (t.split(sizes) for t in (TOKENS, MASK.long(), labels))
    return [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(*parts, strict=True)]


@pytest.mark.parametrize("make", [bert, gpt2, llama, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype).train()
    calibration = surgery.calibrate(model, batches([1, 3]), gradients=True)
    names = [name for name in calibration if name != "lm_head"]
    assert {"bert": 12 + 1, "gpt2": 8, "llama": 14, "mixtral": 8}[make.__name__] <= len(names)
    # Tied heads are left alone by compress_, and so here.
    assert ("lm_head" in calibration) == (make is mixtral) and calibration.without_gradients == ()
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
    if dtype == torch.bfloat16:
        assert calibration[names[0]].inputs.dtype == torch.float64
        return
    assert set(calibration.shapes) == {r.name for r in surgery.compress_(model, LOWRANK, dry_run=True).compressed}
    model.eval()

    shift = int(make is not bert)
    labels = TOKENS.masked_fill(~MASK, -100)[:, shift:].flatten()

    def loss(logits):
        return F.cross_entropy(logits[:, : logits.shape[1] - shift].flatten(0, 1), labels, reduction="sum")

    whole = batches([4])[0]
    check(calibration, watched(model, names, lambda m: m(**whole).logits, loss), 1e-4, MASK)
    if make in (llama, mixtral):
        attention = "model.layers.0.self_attn."
        assert calibration[attention + "q_proj"].inputs is calibration[attention + "v_proj"].inputs
        if make is llama:
            assert (
                calibration["model.layers.0.mlp.gate_proj"].inputs is calibration["model.layers.0.mlp.up_proj"].inputs
            )


def test_encoding_of_a_tokenizer_moves_and_masks():
    model = bert()
    encoding = transformers.BatchEncoding({"input_ids": TOKENS, "attention_mask": MASK.long()})
    calibration = surgery.calibrate(model, [encoding])
    assert {m.count for m in calibration.values()} == {int(MASK.sum())}
    assert encoding["input_ids"] is TOKENS
