"""Attention over blocks against masked softmax in float64, for every backend."""

from __future__ import annotations

import copy

import pytest
import torch

import structmat
from structmat.models import GPT, BlockSparseAttention, VisionTransformer, model_summary
from structmat.testing import relative_error
from structmat_kernels.block_sparse import flat_butterfly_mask


def grids():
    random = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    big_bird = torch.eye(7).bool()
    big_bird[0] = big_bird[:, 0] = True
    return {
        "one": (torch.ones(1, 1).bool(), 3),
        "diagonal": (torch.eye(6).bool(), 1),
        "random": (random | torch.eye(5).bool(), 3),
        "global": (big_bird, 2),
        "butterfly": (flat_butterfly_mask(8, 8, max_stride=8), 4),
        "full": (torch.ones(3, 3).bool(), 5),
    }


every_grid = pytest.mark.parametrize(("grid", "block"), grids().values(), ids=grids().keys())


def qkv(length, d=4, grad=False):
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator, "dtype": torch.float64, "requires_grad": grad}
    return [torch.randn(2, 3, length, d, **options) for _ in range(3)]


def reference(q, k, v, grid, block, causal):
    """By definition: scores of forbidden pairs are minus infinity."""
    length = q.shape[-2]
    seen = torch.kron(grid.int(), torch.ones(block, block, dtype=torch.int)).bool()[:length, :length]
    seen = seen.tril() if causal else seen
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, int(seen.sum())


@every_grid
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "dense", "gather"])
def test_value_and_gradients(grid, block, causal, backend):
    attention = BlockSparseAttention(grid, block, causal, backend)
    inputs = qkv(attention.length, grad=True)
    out, (expected, pairs) = attention(*inputs), reference(*inputs, grid, block, causal)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, inputs, cotangent) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert attention.pairs(attention.length) == pairs


@every_grid
@pytest.mark.parametrize("causal", [False, True])
def test_a_shorter_sequence_uses_the_upper_left_part(grid, block, causal):
    attention = BlockSparseAttention(grid, block, causal)
    for length in range(1, attention.length):
        inputs = qkv(length)
        expected, pairs = reference(*inputs, grid, block, causal)
        torch.testing.assert_close(attention(*inputs), expected, rtol=1e-12, atol=1e-12)
        assert attention.pairs(length) == pairs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(("backend", "length"), [("gather", 64), ("dense", 64), ("dense", 51), ("dense", 3)])
def test_on_devices(backend, length, dtype, bound, causal, device):
    grid = flat_butterfly_mask(8, 8, max_stride=2)
    attention = BlockSparseAttention(grid, 8, causal, backend).to(device)
    inputs = [t.detach().to(device, dtype).requires_grad_() for t in qkv(length, d=16)]
    check(attention(*inputs), inputs, grid, 8, causal, bound)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("length", [256, 201, 77])
def test_flex_attention(length, dtype, bound, causal, device):
    """Compiled with gradients on a GPU; on a CPU flex_attention has no backward, and its compilation takes seconds."""
    grid = flat_butterfly_mask(8, 8, max_stride=4)
    attention = BlockSparseAttention(grid, 32, causal, "flex").to(device)
    train = device == "cuda"
    if train:
        torch.compiler.reset()
        attention = torch.compile(attention, fullgraph=True)
    inputs = [t.detach().to(device, dtype).requires_grad_(train) for t in qkv(length, d=16)]
    check(attention(*inputs), inputs, grid, 32, causal, bound)


def check(out, inputs, grid, block, causal, bound):
    """A device's output, and its gradients if it has any, against float64 on the CPU for the same numbers."""
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected, _ = reference(*exact, grid, block, causal)
    assert out.dtype == inputs[0].dtype and out.device == inputs[0].device
    assert relative_error(out.cpu(), expected) <= bound
    if out.requires_grad:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        got = torch.autograd.grad(out, inputs, cotangent.to(out.device))
        wanted = torch.autograd.grad(expected, exact, cotangent.double())
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a.cpu(), b) <= 2 * bound


def test_compiles_whole_and_moves():
    attention = BlockSparseAttention(flat_butterfly_mask(4, 4, max_stride=2), 4, causal=True)
    inputs = qkv(16)
    expected = attention(*inputs)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    assert attention.state_dict() == {}
    # Memory without values is filled again: the mask is structure.
    moved = copy.deepcopy(attention).to("meta").to_empty(device="cpu")
    assert torch.equal(moved(*inputs), expected)
    assert attention.to(torch.bfloat16).mask.dtype == torch.bool


def test_models_with_a_mask():
    mask = flat_butterfly_mask(4, 4, max_stride=2)
    torch.manual_seed(0)
    size = {"dim": 16, "depth": 2, "heads": 2, "structure": structmat.MonarchConfig(nblocks=2)}
    gpt = GPT(11, 16, attention_mask=mask, **size)
    tokens = torch.randint(11, (2, 16))
    gpt(tokens).sum().backward()
    assert all(p.grad is not None for p in gpt.parameters())
    assert gpt.generate(tokens[:, :3], 20).shape == (2, 23)
    dense = GPT(11, 16, **size)
    dense.load_state_dict(gpt.state_dict())
    # A token sees its own block, as in the dense model, and not that two blocks before it.
    torch.testing.assert_close(gpt(tokens)[:, :4], dense(tokens)[:, :4])
    assert not torch.allclose(gpt(tokens)[:, 12:], dense(tokens)[:, 12:], atol=1e-4)
    full = GPT(11, 16, attention_mask=torch.ones(4, 4).bool(), **size)
    full.load_state_dict(gpt.state_dict())
    torch.testing.assert_close(full(tokens), dense(tokens))
    flops = [{r.name: r.flops for r in model_summary(m, tokens).rows}["blocks.0.attention"] for m in (gpt, dense)]
    assert flops == [4 * 2 * 16 * (4 * 10 + 2 * 16), 4 * 2 * 16 * 136]
    vit = VisionTransformer(16, 4, 3, class_token=False, attention_mask=mask, **size)
    assert vit(torch.ones(2, 3, 16, 16)).shape == (2, 3)
    with torch.device("meta"):
        meta = GPT(11, 16, attention_mask=mask, **size)
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    meta.to_empty(device="cpu").load_state_dict(gpt.state_dict())
    assert torch.equal(meta(tokens), gpt(tokens))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockSparseAttention(torch.ones(2, 2), 4), TypeError, "mask must be boolean, got torch.float32"),
        (lambda: BlockSparseAttention(torch.eye(2, device="meta").bool(), 4), ValueError, "mask must have values"),
        (lambda: BlockSparseAttention(torch.ones(2, 3).bool(), 4), ValueError, r"shape \(g, g\), got \(2, 3\)"),
        (lambda: BlockSparseAttention(torch.ones(0, 0).bool(), 4), ValueError, r"shape \(g, g\)"),
        (lambda: BlockSparseAttention(torch.zeros(2, 2).bool(), 4), ValueError, r"rows \[0, 1\] have none"),
        (lambda: BlockSparseAttention(torch.eye(3).bool().flip(0), 4, True), ValueError, r"not in rows \[0, 2\]"),
        (lambda: BlockSparseAttention(torch.eye(2).bool(), 0), ValueError, "block_size must be at least 1"),
        (lambda: BlockSparseAttention(torch.eye(2).bool(), 4, backend="fast"), ValueError, "backend must be"),
        (
            lambda: BlockSparseAttention(torch.eye(2).bool(), 4)(*qkv(9)),
            ValueError,
            "covers 8 positions, 2 blocks of 4",
        ),
        (
            lambda: BlockSparseAttention(torch.eye(3).bool().flip(0), 4)(*qkv(5)),
            ValueError,
            r"queries of blocks \[0\] see no key of a sequence of 5 positions",
        ),
        (
            lambda: BlockSparseAttention(torch.eye(2).bool(), 4, backend="gather")(*qkv(7)),
            ValueError,
            "needs sequences of length 8, got 7",
        ),
        (
            lambda: GPT(5, 9, dim=4, depth=1, heads=1, attention_mask=torch.eye(4).bool()),
            ValueError,
            "divides the 9 positions",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
