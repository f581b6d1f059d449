"""healing_loss is its formula, sorts what models return, and leaves padded positions out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from structmat import surgery

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=GENERATOR, dtype=dtype)


def relative(student, teacher):
    return ((student - teacher).abs() ** 2).mean() / ((teacher - teacher.mean()).abs() ** 2).mean()


def divergence(student, teacher, T):
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    return T**2 * (p * (p.log() - q.log())).sum(-1).mean()


def test_it_is_its_formula_under_a_mask():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    keep = mask.bool()
    dense = {
        "logits": randn(2, 5, 7),
        "hidden_states": (randn(2, 5, 4), 100 * randn(2, 5, 4)),
        "pooler_output": randn(2, 4),
    }
    small = {
        "loss": randn(()),
        "logits": randn(2, 5, 7).requires_grad_(),
        "hidden_states": (randn(2, 5, 4), 100 * randn(2, 5, 4)),
        "pooler_output": randn(2, 4),
        "attentions": (randn(2, 1, 5, 5),),
    }
    loss = surgery.healing_loss(small, dense, mask, hidden_weight=0.5, output_weight=3.0, temperature=2.0)
    pairs = zip(small["hidden_states"], dense["hidden_states"], strict=True)
    hidden = sum(relative(s[keep], t[keep]) for s, t in pairs) / 2
    heads = divergence(small["logits"][keep], dense["logits"][keep], 2.0)
    heads = (heads + relative(small["pooler_output"], dense["pooler_output"])) / 2
    torch.testing.assert_close(loss, 0.5 * hidden + 3 * heads, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(loss, small["logits"])[0]
    assert (gradient[~keep] == 0).all() and (gradient[keep] != 0).any()


def test_padded_positions_may_hold_anything():
    mask = torch.tensor([[True, True, False]])
    dense, small = randn(1, 3, 4), randn(1, 3, 4)
    clean = surgery.healing_loss(small, dense, mask)
    small[0, 2] = float("nan")
    assert surgery.healing_loss(small, dense, mask) == clean
    assert surgery.healing_loss(small.flatten(0, 1), dense.flatten(0, 1), mask) == clean


@pytest.mark.parametrize("head", [None, "kl", "mse"])
def test_which_outputs_are_logits(head):
    small, dense = randn(6, 3), randn(6, 3)
    kl, mse = divergence(small, dense, 1.0), relative(small, dense)
    plain = surgery.healing_loss(small, dense, head=head)
    named = surgery.healing_loss({"logits": small}, {"logits": dense}, head=head)
    torch.testing.assert_close(plain, kl if head == "kl" else mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(named, mse if head == "mse" else kl, rtol=1e-12, atol=0)
    one = surgery.healing_loss({"logits": small[:, :1]}, {"logits": dense[:, :1]})
    torch.testing.assert_close(one, relative(small[:, :1], dense[:, :1]), rtol=1e-12, atol=0)


def test_what_one_model_alone_returns_is_left_out_and_nothing_counts_twice():
    state, other = randn(2, 3, 4), randn(2, 3, 4)
    both = {"hidden_states": (randn(2, 3, 4), state), "last_hidden_state": state}
    small = {"hidden_states": (both["hidden_states"][0], other), "last_hidden_state": other, "extra": randn(2)}
    torch.testing.assert_close(surgery.healing_loss(small, both), relative(other, state) / 2, rtol=1e-12, atol=0)
    alone = surgery.healing_loss({"last_hidden_state": other}, {"last_hidden_state": state, "logits": randn(2, 3)})
    torch.testing.assert_close(alone, relative(other, state), rtol=1e-12, atol=0)
    nested = surgery.healing_loss((small["extra"], [other]), (small["extra"], [state]))
    torch.testing.assert_close(nested, relative(other, state), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.complex128])
def test_dtypes(dtype):
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    small, dense = randn(5, 3, dtype=drawn).to(dtype), randn(5, 3, dtype=drawn).to(dtype)
    loss = surgery.healing_loss(small, dense)
    assert loss.dtype == (torch.float64 if dtype == torch.complex128 else torch.float32)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    hand = [torch.view_as_real(t.to(wide)) if dtype.is_complex else t.to(wide) for t in (small, dense)]
    assert abs(loss.item() / relative(*hand).item() - 1) < 1e-5


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1])
def test_a_constant_state_is_measured_by_its_square(value):
    dense = torch.full((1000, 3), value)
    expected = 0.01 / (value**2 or 1.0)
    assert surgery.healing_loss(dense + 0.1, dense).item() == pytest.approx(expected, rel=1e-4)


def test_one_number():
    assert surgery.healing_loss(torch.ones(1, 1), torch.full((1, 1), 2.0)).item() == 0.25
    x = torch.ones(3, 4, requires_grad=True)
    assert torch.autograd.grad(surgery.healing_loss(x, torch.zeros(3, 4)), x)[0].isfinite().all()


def test_refusals():
    a = torch.ones(2, 3)
    for kind, words, args, options in [
        (ValueError, "output has shape", (a, a[:1]), {}),
        (ValueError, "nothing in common", ({"x": a}, {"y": a}), {}),
        (ValueError, "nothing in common", (a, a), {"output_weight": 0.0}),
        (ValueError, "both 0", (a, a), {"output_weight": 0.0, "hidden_weight": 0.0}),
        (ValueError, "temperature must be", (a, a), {"temperature": 0.0}),
        (ValueError, "hidden_weight must be", (a, a), {"hidden_weight": -1.0}),
        (ValueError, "head must be one of", (a, a), {"head": "ce"}),
        (ValueError, "keeps no position", (a, a, torch.zeros(2)), {}),
        (ValueError, "no entries to match", (a[:0], a[:0]), {}),
        (TypeError, "mask must be", (a, a, [1, 1]), {}),
        (TypeError, "compressed_outputs holds no tensor", ({"x": torch.ones(2, dtype=torch.int64)}, a), {}),
        (TypeError, "dense_outputs must be a tensor", (a, 3.0), {}),
    ]:
        with pytest.raises(kind, match=words):
            surgery.healing_loss(*args, **options)


def test_logits_of_bfloat16_are_compared_in_float32():
    dense = randn(4, 1000).bfloat16()
    small = dense + (0.1 * randn(4, 1000)).bfloat16()
    wide = F.kl_div(small.double().log_softmax(-1), dense.double().log_softmax(-1), reduction="none", log_target=True)
    got = surgery.healing_loss({"logits": small}, {"logits": dense})
    assert got.item() == pytest.approx(wide.sum(-1).mean().item(), rel=1e-3)
