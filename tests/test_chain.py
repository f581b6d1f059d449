"""Patterns and chains: what can be chained, what a run merges to, and what is said where it cannot."""

import itertools

import pytest
import torch

from structmat import Butterfly, Chain, KroneckerSparse, Pattern
from structmat.testing import assert_close, dense_by_definition


def test_a_pattern_is_where_a_factor_may_be_nonzero():
    for sizes in ((1, 2, 3, 2), (3, 1, 2, 1), (2, 2, 1, 3), (1, 1, 1, 1)):
        pattern = Pattern(*sizes)
        a, b, c, d = sizes
        support = torch.kron(torch.eye(a), torch.kron(torch.ones(b, c), torch.eye(d)))
        dense = dense_by_definition(KroneckerSparse(torch.ones(sizes)))
        assert torch.equal(dense, support) and tuple(support.shape) == pattern.shape
        assert pattern.num_params == support.count_nonzero()
        assert torch.equal(dense_by_definition(KroneckerSparse(torch.ones(pattern.mT))), support.mT)


def test_chainable_means_that_the_product_has_a_pattern_and_blocks_of_one_rank():
    """By brute force over small patterns that meet: the rule against supports and ranks of random products."""
    torch.manual_seed(0)
    sizes, seen = (1, 2, 4), 0
    for left, right in itertools.product(map(Pattern._make, itertools.product(sizes, repeat=4)), repeat=2):
        if left.shape[1] != right.shape[0] or left.shape[1] > 8 or left.shape[0] > 8 or right.shape[1] > 8:
            continue
        rank = left.rank(right)
        if rank is None:
            continue
        seen += 1
        merged = left.merge(right)
        product = Butterfly((torch.randn(left).double(), torch.randn(right).double())).to_dense()
        support = dense_by_definition(KroneckerSparse(torch.ones(merged)))
        assert torch.equal((product != 0).float(), support), (left, right)
        # The columns and rows that meet in one block of the middle: their product has this rank.
        column = (dense_by_definition(KroneckerSparse(torch.ones(left)))[:, :1] != 0).squeeze(1)
        row = (dense_by_definition(KroneckerSparse(torch.ones(right)))[:1] != 0).squeeze(0)
        block = product[column][:, row]
        assert torch.linalg.matrix_rank(block) == min(rank, *block.shape), (left, right)
    assert seen > 50


def test_runs_merge_to_their_pattern():
    chain = Chain.mixed_radix([(2, 3), 2, (3, 2), 2])
    B = Butterfly.from_chain(chain, dtype=torch.float64)
    for start, stop in itertools.combinations(range(len(chain) + 1), 2):
        pattern = chain.merged(start, stop)
        part = dense_by_definition(Butterfly(B.factors[start:stop]))
        assert tuple(part.shape) == pattern.shape
        assert torch.equal(part != 0, dense_by_definition(KroneckerSparse(torch.ones(pattern))) != 0)
    assert chain.shape == (24, 24) and chain.ranks == (1, 1, 1)
    assert all(tuple(f.pattern) == tuple(p.mT) for f, p in zip(B.mT.factors, reversed(chain.patterns), strict=True))


def test_the_usual_chains():
    assert [tuple(p) for p in Chain.dyadic(8)] == [(1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)]
    two = Chain.dyadic(1024, 2)
    assert two.num_params == 65536 and set(two.ranks) == {2} and two.shape == (1024, 1024)
    assert tuple(two[0]) == (1, 4, 8, 256) and tuple(two[-1]) == (256, 8, 4, 1)
    assert set(Chain.dyadic(256, 4).ranks) == {4}
    assert Chain.mixed_radix([2, 2, 2, 5, 5, 5]).shape == (1000, 1000)
    assert Chain.mixed_radix([(3, 2), (4, 5), (2, 2)]).shape == (24, 20)
    monarch = Chain.monarch(12, 20, 4, 2)
    assert monarch.shape == (12, 20) and monarch.ranks == (2,)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([(1, 2, 2, 4), (2, 2, 2, 3)], "8 columns, the second 12 rows"),
        ([(2, 2, 2, 1), (1, 2, 2, 2)], "a = 2 must divide the second's a = 1"),
        ([(1, 2, 2, 2), (1, 1, 2, 4)], "second's d = 4 must divide the first's d = 2"),
        ([(1, 2, 2, 4), (4, 2, 2, 1)], "must be the same integer, the rank"),
        ([], "at least one pattern"),
        ([(1, 2, 0, 4)], "at least 1, got 0"),
    ],
)
def test_what_cannot_be_chained_says_why(patterns, message):
    with pytest.raises(ValueError, match=message):
        Chain(tuple(patterns))


def test_wrong_sizes_say_what_would_be_right():
    with pytest.raises(ValueError, match="power of two, got 12; for other sizes use"):
        Chain.dyadic(12)
    with pytest.raises(ValueError, match="4 rank\\^2 <= n = 8"):
        Chain.dyadic(8, 2)
    with pytest.raises(ValueError, match="nblocks must divide m = 12 and n = 20, got 8"):
        Chain.monarch(12, 20, 8)
    with pytest.raises(TypeError, match="must be an integer"):
        Chain(((1, 2, 2.0, 1),))
    with pytest.raises(ValueError, match="cannot be chained"):
        Pattern(1, 2, 2, 4).merge(Pattern(4, 2, 2, 1))


def test_a_product_of_a_chain_of_rank_one_fills_the_matrix():
    B = Butterfly.from_chain(Chain.mixed_radix([3, 2, 2]), dtype=torch.float64)
    assert (B.to_dense() != 0).all()
    assert_close(B.to_dense(), dense_by_definition(B))
