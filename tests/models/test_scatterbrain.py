"""Attention on a mask plus positive random features, against its definition in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from structmat.models import GPT, BlockSparseAttention, ScatterbrainAttention
from structmat.testing import relative_error
from structmat_kernels.block_sparse import flat_butterfly_mask

GLOBAL = torch.eye(5).bool()
GLOBAL[0] = GLOBAL[:, 0] = True
GRIDS = {
    "one": (torch.ones(1, 1).bool(), 3),
    "diagonal": (torch.eye(6).bool(), 1),
    "butterfly": (flat_butterfly_mask(8, 8, max_stride=4), 2),
    "global": (GLOBAL, 3),
    "full": (torch.ones(3, 3).bool(), 5),
}
every_grid = pytest.mark.parametrize(("grid", "block"), GRIDS.values(), ids=GRIDS.keys())


def qkv(length, dtype=torch.float64, d=4, scale=1.0, grad=False):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, length, d, generator=generator, dtype=torch.float64) for _ in range(3))
    return [t.to(dtype).requires_grad_(grad) for t in (scale * q, scale * k, v)]


def reference(attention, q, k, v):
    """By definition, entry by entry; scores and logarithms of features are kept until the sums."""
    q, k, v = (t.double() for t in (q, k, v))
    (n, d), w = q.shape[-2:], attention.directions.double()
    i = torch.arange(n)
    near = attention.grid[i[:, None] // attention.block_size, i // attention.block_size]
    q, k = q / d**0.25, k / d**0.25
    a, b = (x @ w.mT - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    estimate = torch.logsumexp(a[..., :, None, :] + b[..., None, :, :], -1) - math.log(len(w))
    logits = torch.where(near, q @ k.mT, estimate)
    if attention.causal:
        logits = logits.masked_fill(i > i[:, None], -torch.inf)
    return logits.softmax(-1) @ v


@every_grid
@pytest.mark.parametrize("causal", [False, True])
def test_value_and_gradients_at_all_lengths(grid, block, causal):
    attention = ScatterbrainAttention(grid, block, 4, 7, causal)
    for length in range(1, attention.length + 1):
        inputs = qkv(length, grad=True)
        out, expected = attention(*inputs), reference(attention, *inputs)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        got, wanted = (torch.autograd.grad(y, inputs, cotangent) for y in (out, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_full_mask_is_softmax_attention(causal):
    attention = ScatterbrainAttention(torch.ones(4, 4).bool(), 4, 4, 3, causal)
    inputs = qkv(16)
    torch.testing.assert_close(attention(*inputs), F.scaled_dot_product_attention(*inputs, is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 12.0])
def test_scores_of_any_size_in_float32(causal, scale):
    """Scores of several hundred; in a causal row keys of the future, however large, leave no trace."""
    attention = ScatterbrainAttention(flat_butterfly_mask(8, 8, max_stride=2), 4, 8, 16, causal)
    inputs = qkv(32, torch.float32, 8, scale, grad=True)
    out, expected = attention(*inputs), reference(attention, *inputs)
    # Scores of hundreds have errors of 1e-5 in float32, and so have the weights.
    assert ((out - expected).norm() / expected.norm()).item() < (1e-4 if scale > 1 else 5e-6)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    if causal:
        q, k, v = (t.detach().clone() for t in inputs)
        k[..., -1, :] *= 40
        v[..., -1, :] = 1e6
        torch.testing.assert_close(attention(q, k, v)[..., :-1, :], out[..., :-1, :].detach())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("length", [64, 51, 3])
def test_on_devices(length, dtype, bound, causal, device):
    """Outputs and gradients on a device against float64 on the CPU for the same numbers."""
    attention = ScatterbrainAttention(flat_butterfly_mask(8, 8, max_stride=2), 8, 16, 24, causal)
    exact = [t.to(dtype).double().requires_grad_() for t in qkv(length, d=16, scale=0.5)]
    expected = reference(attention, *exact)
    inputs = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    out = attention.to(device)(*inputs)
    assert out.dtype == dtype and out.device == inputs[0].device
    assert relative_error(out.cpu(), expected) <= bound
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = torch.autograd.grad(out, inputs, cotangent.to(device))
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a.cpu(), b) <= 2 * bound


def test_estimates_are_unbiased_and_better_than_the_mask_alone():
    """More features are nearer to softmax attention, and both are nearer than forgetting what is far."""
    mask, inputs = flat_butterfly_mask(8, 8, max_stride=2), qkv(64, d=16, scale=0.4)
    exact = F.scaled_dot_product_attention(*inputs)

    def error(out):
        return ((out - exact).norm() / exact.norm()).item()

    few, many = ([error(ScatterbrainAttention(mask, 8, 16, f, seed=s)(*inputs)) for s in range(4)] for f in (16, 1024))
    alone = error(BlockSparseAttention(mask, 8)(*inputs))
    assert max(many) < 0.1 and max(many) < min(few) and max(few) < alone
    q, k, _ = (t / 16**0.25 for t in inputs)
    kernels = []
    for s in range(200):
        w = ScatterbrainAttention(mask, 8, 16, 64, seed=s).directions.double()
        phi = [torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / 8 for x in (q, k)]
        kernels.append(phi[0] @ phi[1].mT)
    mean, target = torch.stack(kernels).mean(0), torch.exp(q @ k.mT)
    assert ((mean - target).norm() / target.norm()).item() < 0.05


def test_in_a_model_compiled_moved_and_in_low_precision():
    torch.manual_seed(0)
    gpt = GPT(11, 16, dim=16, depth=1, heads=2, attention_mask=torch.eye(4).bool())
    core = ScatterbrainAttention(torch.eye(4).bool(), 4, 8, 32, causal=True)
    keys = gpt.state_dict().keys()
    gpt.blocks[0].attention.core = core
    assert gpt.state_dict().keys() == keys
    tokens = torch.randint(11, (2, 16))
    gpt(tokens).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())
    assert gpt.generate(tokens[:, :3], 9).shape == (2, 12)
    inputs = qkv(16, torch.float32, 8)
    expected = core(*inputs)
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    moved = copy.deepcopy(core).to("meta").to_empty(device="cpu")
    assert torch.equal(moved(*inputs), expected)
    assert torch.equal(copy.deepcopy(core).to(torch.bfloat16).directions, core.directions)
    low = core(*(t.bfloat16() for t in inputs))
    assert low.dtype == torch.bfloat16 and ((low - expected).norm() / expected.norm()).item() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert core(*inputs).dtype == torch.bfloat16
    assert "features=32" in repr(core)


def test_errors():
    with pytest.raises(ValueError, match="features must be at least 1"):
        ScatterbrainAttention(torch.eye(2).bool(), 4, 8, 0)
    with pytest.raises(TypeError, match="mask must be boolean"):
        ScatterbrainAttention(torch.eye(2), 4, 8, 2)
    attention = ScatterbrainAttention(torch.eye(2).bool(), 4, 8, 2)
    with pytest.raises(ValueError, match="heads of size 8, got 4"):
        attention(*qkv(8))
    with pytest.raises(ValueError, match="covers 8 positions"):
        attention(*qkv(9, d=8))
