"""The candidates for permutations of columns, and the search among them."""

import scipy.fft
import scipy.linalg
import torch

from structmat.chain import Chain, Pattern
from structmat.projection.butterfly import project_butterfly
from structmat.projection.refine import permutation_candidates, search_permutation


def test_candidates_are_permutations_of_the_known_families():
    for n, radices in ((1, []), (2, [2]), (12, [2, 2, 3]), (16, [2, 2, 2, 2]), (7, [7])):
        candidates = permutation_candidates(n, radices)
        assert next(iter(candidates)) == "identity"
        assert torch.equal(candidates["identity"], torch.arange(n))
        for perm in candidates.values():
            assert torch.equal(perm.sort()[0], torch.arange(n))
        assert len({tuple(p.tolist()) for p in candidates.values()}) == len(candidates)
    names = permutation_candidates(12, [2, 2, 3])
    assert names["reversal"].tolist() == list(range(11, -1, -1))
    assert names["even then reversed odd"].tolist() == [0, 2, 4, 6, 8, 10, 11, 9, 7, 5, 3, 1]
    assert names["stride 4"].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    reversed_digits = [a + 2 * b + 4 * c for a in range(2) for b in range(2) for c in range(3)]
    assert names["digit reversal"].tolist() == reversed_digits
    product = names["even then reversed odd * digit reversal"]
    assert torch.equal(product, names["even then reversed odd"][names["digit reversal"]])


def test_the_permutation_of_fast_transforms_is_found(tools):
    identity = torch.eye(64, dtype=torch.float64)
    cosine = torch.from_numpy(scipy.fft.dct(identity.numpy(), axis=0, norm="ortho"))
    cases = [
        (torch.fft.fft(torch.eye(64, dtype=torch.complex128)), Chain.dyadic(64)),
        (torch.fft.fft(torch.eye(60, dtype=torch.complex128)), Chain.mixed_radix([2, 3, 2, 5])),
        (tools.hadamard(64), Chain.dyadic(64)),
        (cosine, Chain.dyadic(64, rank=2)),
    ]
    for W, chain in cases:
        perm, lower = search_permutation(W, chain)
        assert lower <= 1e-13 * W.norm()
        assert tools.relative(project_butterfly(W[:, perm], chain)[0], W[:, perm]) <= 1e-13


def test_the_search_returns_the_smallest_bound(tools):
    chain = Chain.mixed_radix([2, 3, 2])
    W = torch.randn(2, 12, 12, dtype=torch.float64, generator=tools.generator())
    perm, lower = search_permutation(W, chain)
    torch.testing.assert_close(lower, project_butterfly(W[..., perm], chain)[1], rtol=1e-11, atol=0)
    bounds = [project_butterfly(W[..., p], chain)[1].norm() for p in permutation_candidates(12, [2, 3, 2]).values()]
    torch.testing.assert_close(lower.norm(), torch.stack(bounds).min(), rtol=1e-11, atol=0)


def test_patterns_of_a_transpose_are_no_chain():
    """Refinement goes back by rows, for the mirrored patterns cannot be chained."""
    first, second = Chain.dyadic(4)
    assert second.mT.rank(first.mT) is None
    assert Pattern(*first).rank(second) == 1
