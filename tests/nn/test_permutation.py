"""Learnable permutations: the family by its definition, the relaxation, and that descent finds members."""

import itertools
import math

import pytest
import torch

from structmat import Permutation
from structmat.nn import LearnablePermutation, parameter_groups
from structmat.testing import assert_close
from structmat.transforms import bit_reversal, even_odd, reversal


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def by_definition(items, choices):
    """Lists in, list out: choices[level] is one triple of booleans, or one for each block."""
    blocks = [list(items)]
    for level in choices:
        triples = list(level) if isinstance(level[0], tuple) else [level] * len(blocks)
        halves = []
        for block, (split, first, second) in zip(blocks, triples, strict=True):
            block = block[0::2] + block[1::2] if split else block
            half = len(block) // 2
            left, right = block[:half], block[half:]
            halves += [left[::-1] if first else left, right[::-1] if second else right]
        blocks = halves
    return [i for block in blocks for i in block]


def set_choices(layer, triples, size=200.0):
    with torch.no_grad():
        layer.logits.copy_((2 * torch.as_tensor(triples).to(layer.logits).reshape(-1, 3) - 1) * size)


TRIPLES = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize(("n", "shared", "size"), [(4, True, 8), (8, True, 64), (8, False, 512), (6, True, 8)])
def test_the_family_is_that_of_the_definition(n, shared, size):
    """All choices: hard, relaxed at probabilities 0 and 1, and lists of Python agree."""
    layer = LearnablePermutation(n, shared=shared, dtype=torch.float64)
    found = set()
    for flat in itertools.product(TRIPLES, repeat=len(layer.logits)):
        levels = flat if shared else [flat[(1 << k) - 1 : (2 << k) - 1] for k in range(layer.levels)]
        expected = by_definition(range(n), levels)
        set_choices(layer, flat)
        P = layer.permutation()
        assert P.perm.tolist() == expected
        assert_close(layer.to_dense(), P.to_dense(), 1e-14)
        found.add(tuple(expected))
    assert len(found) == size
    for member in (torch.arange(n), even_odd(n).perm, even_odd(n, reverse_odd=True).perm):
        assert tuple(member.tolist()) in found
    if n != 6:
        assert tuple(bit_reversal(n).perm.tolist()) in found
    assert tuple(reversal(n).perm.tolist()) not in found


@pytest.mark.parametrize(("n", "levels"), [(4, 1), (6, 1), (10, 1), (12, 2), (16, 3), (20, 2), (56, 3), (1024, 9)])
@pytest.mark.parametrize("shared", [True, False])
def test_odd_blocks_stop_the_levels(n, levels, shared):
    layer = LearnablePermutation(n, shared=shared, dtype=torch.float64)
    assert layer.levels == levels
    assert layer.logits.shape == (levels if shared else 2**levels - 1, 3)
    with torch.no_grad():
        layer.logits.normal_()
    choices = [[tuple(t) for t in (layer._choices(layer.logits, k) > 0).tolist()] for k in range(levels)]
    expected = by_definition(range(n), [level[0] if shared else level for level in choices])
    P = layer.permutation()
    assert isinstance(P, Permutation) and P.perm.tolist() == expected


@pytest.mark.parametrize("shared", [True, False])
def test_the_relaxation_is_doubly_stochastic_and_linear(shared):
    layer = LearnablePermutation(24, shared=shared, dtype=torch.float64)
    P = layer.to_dense()
    assert P.min() >= 0 and P.max() < 1
    ones = torch.ones(24, dtype=torch.float64)
    assert_close(P.sum(0), ones)
    assert_close(P.sum(1), ones)
    for dtype in (torch.float64, torch.complex128):
        for shape in [(24,), (0, 24), (5, 24), (2, 3, 24)]:
            x = torch.randn(shape, dtype=dtype)
            assert_close(layer(x), x @ P.mT.to(dtype))
    x = torch.randn(24, 3, dtype=torch.float64).mT
    assert_close(layer(x), x @ P.mT)


def test_a_level_is_the_convex_combination_of_its_choices():
    """All 8 permutations of n = 4 with the products of their probabilities."""
    layer = LearnablePermutation(4, dtype=torch.float64)
    p = layer.probabilities()[0]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for triple in TRIPLES:
        weight = math.prod((q if taken else 1 - q).item() for q, taken in zip(p, triple, strict=True))
        perm = torch.tensor(by_definition(range(4), [triple]))
        expected += weight * Permutation(perm, torch.float64).to_dense()
    assert_close(layer.to_dense(), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("n", [16, 32])
def test_bit_reversal_is_learned_from_samples(n, shared, gumbel):
    layer, P = LearnablePermutation(n, shared=shared, gumbel=gumbel), bit_reversal(n)
    assert not torch.equal(layer.permutation().perm, P.perm)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(200):
        x = torch.randn(64, n)
        loss = (layer(x) - P.linear(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(layer.permutation().perm, P.perm)


@pytest.mark.parametrize("shared", [True, False])
def test_entropy(shared):
    layer = LearnablePermutation(16, shared=shared, dtype=torch.float64)
    p = layer.probabilities()
    assert_close(layer.entropy(), -(p * p.log() + (1 - p) * (1 - p).log()).sum())
    assert torch.autograd.gradcheck(lambda _: layer.entropy(), layer.logits)
    with torch.no_grad():
        layer.logits.zero_()
    assert_close(layer.entropy(), torch.tensor(layer.logits.numel() * math.log(2), dtype=torch.float64))
    set_choices(layer, torch.rand(layer.logits.shape) < 0.5)
    assert layer.entropy() < 1e-60
    layer.reset_parameters()
    hard, optimizer = layer.permutation().perm, torch.optim.Adam(layer.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        layer.entropy().backward()
        optimizer.step()
    assert layer.entropy() < 1e-2
    assert torch.equal(layer.permutation().perm, hard)  # each choice goes to where it leans
    assert_close(layer.to_dense(), layer.permutation().to_dense(), 1e-2)


def test_every_logit_has_a_gradient():
    layer = LearnablePermutation(32, shared=False, dtype=torch.float64)
    layer(torch.randn(9, 32, dtype=torch.float64)).square().mean().backward()
    assert (layer.logits.grad != 0).all()
    small = LearnablePermutation(8, shared=False, dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: small(x), (x, small.logits))


def test_gumbel_draws_in_training_only():
    layer = LearnablePermutation(8, gumbel=True, temperature=0.5)
    x = torch.randn(8)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert_close(layer.probabilities(), torch.sigmoid(layer.logits / 0.5))
    layer.train()
    with torch.no_grad():
        layer.logits.fill_(1.0)
    drawn = torch.stack([layer.probabilities() for _ in range(2000)])
    assert abs((drawn > 0.5).float().mean().item() - torch.sigmoid(torch.tensor(1.0)).item()) < 0.02
    layer.temperature = 1e-3
    hard = layer.probabilities()
    assert ((hard < 1e-3) | (hard > 1 - 1e-3)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_autocast_and_compilation(dtype):
    layer = LearnablePermutation(16, shared=False, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    exact = layer(x)
    torch.compiler.reset()
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), exact)
    low = layer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert_close(low, exact, 3e-2 if dtype == torch.bfloat16 else 5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
    draws = torch.vmap(layer)(x.float())
    assert_close(draws, layer(x.float()))
    twin = LearnablePermutation(16, shared=False)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.permutation().perm, layer.permutation().perm)


def test_logits_are_not_decayed():
    layer = LearnablePermutation(8)
    decayed, others = parameter_groups(layer, 0.1)
    assert decayed["params"] == [] and others["params"][0] is layer.logits


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        *((lambda n=n: LearnablePermutation(n), ValueError, f"even and at least 4.*got {n}") for n in (2, 3, 7)),
        (lambda: LearnablePermutation(1), ValueError, "n must be even"),
        (lambda: LearnablePermutation(8.0), TypeError, "n must be an integer"),
        (lambda: LearnablePermutation(8, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: LearnablePermutation(8, dtype=torch.complex64), TypeError, "dtype must be floating point"),
        (lambda: LearnablePermutation(8)(torch.ones(2, 9)), ValueError, "size 8"),
        (lambda: LearnablePermutation(8)(torch.ones(8).double()), TypeError, "dtype"),
        (lambda: LearnablePermutation(8)(torch.ones(8, dtype=torch.int64)), TypeError, "floating point"),
        (lambda: LearnablePermutation(8)(torch.ones(8, device="meta")), ValueError, "on meta"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_the_cosine_transforms_permutation_takes_two_layers():
    n = 8
    first, second = LearnablePermutation(n, dtype=torch.float64), LearnablePermutation(n, dtype=torch.float64)
    set_choices(first, [(True, False, True), (False, False, False)])
    set_choices(second, [(True, False, False), (True, False, False)])
    x = torch.randn(3, n, dtype=torch.float64)
    wanted = even_odd(n, reverse_odd=True).perm[bit_reversal(n).perm]
    assert_close(second(first(x)), x[:, wanted])
    reached = set()
    for flat in itertools.product(TRIPLES, repeat=2):
        set_choices(first, flat)
        reached.add(tuple(first.permutation().perm.tolist()))
    assert tuple(wanted.tolist()) not in reached
