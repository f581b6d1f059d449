"""Projection on chains of Kronecker-sparse patterns: exact where W is a product, certified where it is not."""

import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from structmat.chain import Chain, Pattern
from structmat.projection import project_monarch, splitting
from structmat.projection.butterfly import project_butterfly, split_error2
from structmat.projection.refine import permutation_candidates, refine, search_permutation
from structmat.projection.splitting import from_support, merge, merge_all, on_support

ORDERS = ["balanced", "left-to-right"]


def chain_of(*patterns):
    return Chain(tuple(Pattern(*p) for p in patterns))


CHAINS = {
    "dyadic": Chain.dyadic(16),
    "rank 2": Chain.dyadic(32, rank=2),
    "mixed radix": Chain.mixed_radix([2, 3, 2]),
    "rectangular": Chain.mixed_radix([(3, 2), (4, 5), (2, 2)]),
    "monarch": Chain.monarch(12, 20, 4, rank=2),
    "two": Chain.mixed_radix([(3, 4), (5, 2)]),
    "one": chain_of((1, 6, 5, 1)),
    "inside a support": chain_of((2, 2, 4, 6), (4, 4, 2, 3)),
    "diagonal blocks": chain_of((3, 2, 2, 4), (6, 2, 2, 2), (12, 2, 2, 1)),
    "ranks beyond the blocks": chain_of((1, 2, 12, 8), (4, 6, 6, 4), (8, 6, 4, 2), (16, 4, 2, 1)),
    "ranks beyond two factors": chain_of((1, 2, 6, 8), (2, 6, 10, 4), (4, 10, 6, 2), (8, 6, 2, 1)),
    "one row": Chain.mixed_radix([(1, 3), (1, 4), (1, 2)]),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_factors(chain, batch=(), dtype=torch.float64, seed=0):
    g = generator(seed)
    return tuple(torch.randn(*batch, *p, dtype=dtype, generator=g) / (p.b * p.c) ** 0.25 for p in chain)


def kronecker_sparse(values):
    """The dense matrix by the definition, an entry at a time."""
    a, b, c, d = values.shape
    W = torch.zeros(a * b * d, a * c * d, dtype=values.dtype)
    for A, o, i, D in itertools.product(range(a), range(b), range(c), range(d)):
        W[(A * b + o) * d + D, (A * c + i) * d + D] = values[A, o, i, D]
    return W


def dense(factors):
    return from_support(merge_all(factors))


def relative(factors, W):
    return ((dense(factors) - W).norm() / W.norm()).item()


def bit_reversal(n):
    return permutation_candidates(n, [2] * (n.bit_length() - 1))["digit reversal"]


def dft(n):
    return torch.fft.fft(torch.eye(n, dtype=torch.complex128))[:, bit_reversal(n)]


def dct(n):
    W = torch.from_numpy(scipy.fft.dct(np.eye(n), axis=0, norm="ortho"))
    return W[:, torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)))][:, bit_reversal(n)]


def hadamard(n):
    return torch.from_numpy(scipy.linalg.hadamard(n).astype(np.float64))


# ---------------------------------------------------------------- products
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_merge_is_the_product(name, dtype):
    chain = CHAINS[name]
    factors = random_factors(chain, dtype=dtype)
    product = kronecker_sparse(factors[0])
    for i, (right, merged) in enumerate(zip(factors[1:], itertools.accumulate(factors, merge), strict=False)):
        assert tuple(merged.shape) == tuple(chain.merged(0, i + 1))
        torch.testing.assert_close(kronecker_sparse(merged), product, rtol=1e-13, atol=1e-13)
        product = product @ kronecker_sparse(right)
    torch.testing.assert_close(dense(factors), product, rtol=1e-13, atol=1e-13)
    inside, outside = on_support(product, chain.merged(0, len(chain)))
    torch.testing.assert_close(inside, merge_all(factors), rtol=1e-13, atol=1e-13)
    assert outside.item() == 0


def test_merge_of_batches_and_its_gradient():
    chain = CHAINS["rank 2"]
    left, right = random_factors(chain, (2, 3))[1:3]
    merged = merge(left, right)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(merged[i, j], merge(left[i, j], right[i, j]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merge(left[:, :1], right)[1, 2], merge(left[1, 0], right[1, 2]))
    small = [f.requires_grad_() for f in random_factors(Chain.monarch(4, 4, 2))]
    assert torch.autograd.gradcheck(merge, small)
    with pytest.raises(ValueError, match="cannot be chained"):
        merge(right, left)


# ---------------------------------------------------------------- exact
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [4, 32, 256, 1024])
def test_fast_transforms_are_recovered(n, order):
    cases = [(dft(n), Chain.dyadic(n)), (hadamard(n), Chain.dyadic(n))]
    if n >= 16:
        cases.append((dct(n), Chain.dyadic(n, rank=2)))
    for W, chain in cases:
        factors, lower, upper = project_butterfly(W, chain, order)
        assert relative(factors, W) <= 1e-13
        assert lower <= upper <= 1e-13 * W.norm()
        norms = torch.stack([f.norm() for f in factors])
        assert (norms.max() / norms.min() - 1).abs() <= 1e-12, "factors have equal norms"
    if n == 1024:
        assert sum(f.numel() for f in factors) == 65_536


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_random_members_are_recovered(name, dtype, order):
    W = dense(random_factors(CHAINS[name], (3,), dtype))
    factors, lower, upper = project_butterfly(W, CHAINS[name], order)
    assert relative(factors, W) <= 1e-13
    assert (lower <= upper).all()
    assert upper.max() <= 1e-13 * W.norm()


def test_a_thousand_by_mixed_radix():
    chain = Chain.mixed_radix([2, 2, 2, 5, 5, 5])
    W = dense(random_factors(chain))
    for order in ORDERS:
        assert relative(project_butterfly(W, chain, order)[0], W) <= 1e-12


def test_sparse_members_of_smaller_rank_are_recovered():
    for seed in range(20):
        chain = CHAINS["rank 2"] if seed % 2 else CHAINS["ranks beyond the blocks"]
        factors = [f * (torch.rand(f.shape, generator=generator(seed)) < 0.4) for f in random_factors(chain, seed=seed)]
        W = dense(factors)
        for order in ORDERS:
            assert relative(project_butterfly(W, chain, order)[0], W) <= 1e-13


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [256, 1024])
def test_a_noisy_butterfly_is_denoised(n, order):
    chain = Chain.dyadic(n)
    W = dense(random_factors(chain))
    noise = torch.randn(n, n, dtype=W.dtype, generator=generator(1))
    noise *= 0.01 * W.norm() / noise.norm()
    factors, lower, upper = project_butterfly(W + noise, chain, order)
    error = (dense(factors) - W - noise).norm()
    assert error <= 1.03 * noise.norm()
    assert lower <= error <= upper


@pytest.mark.parametrize("order", ORDERS)
def test_chunks_change_nothing(order, monkeypatch):
    for name, chain in CHAINS.items():
        W = torch.randn(3, *chain.shape, dtype=torch.complex128, generator=generator())
        whole = project_butterfly(W, chain, order)
        with monkeypatch.context() as patch:
            patch.setitem(splitting._CHUNK, "cpu", 16)
            pieces = project_butterfly(W, chain, order)
        torch.testing.assert_close(dense(pieces[0]), dense(whole[0]), rtol=1e-11, atol=1e-12, msg=name)
        torch.testing.assert_close(pieces[1:], whole[1:], rtol=1e-12, atol=0, msg=name)


# ---------------------------------------------------------------- certificate
def discarded(W, left, right):
    """What the best product of two factors misses, from the dense matrix and the patterns alone."""
    whole, rank, tails = left.merge(right), left.rank(right), []
    support = kronecker_sparse(torch.ones(tuple(whole))) != 0
    tails.append(W[~support].abs().numpy())
    L, R = kronecker_sparse(torch.ones(tuple(left))) != 0, kronecker_sparse(torch.ones(tuple(right))) != 0
    groups = {}
    for k in range(L.shape[1]):  # inner indices of the same rows and columns are those of one block
        groups.setdefault((tuple(L[:, k].tolist()), tuple(R[k].tolist())), []).append(k)
    for (rows, cols), inner in groups.items():
        block = W[torch.tensor(rows)][:, torch.tensor(cols)].numpy()
        assert len(inner) == rank
        tails.append(scipy.linalg.svdvals(block)[rank:])
    return np.linalg.norm(np.concatenate(tails))


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_bounds_are_the_discarded_singular_values(name, dtype):
    chain = CHAINS[name]
    W = torch.randn(*chain.shape, dtype=dtype, generator=generator())
    _, outside = on_support(W, chain.merged(0, len(chain)))
    errors = [discarded(W, chain.merged(0, i), chain.merged(i, len(chain))) for i in range(1, len(chain))]
    _, lower, upper = project_butterfly(W, chain)
    for split, expected in enumerate(errors, 1):
        inside = split_error2(on_support(W, chain.merged(0, len(chain)))[0][None], chain, split)
        np.testing.assert_allclose(np.hypot(inside.sqrt().item(), outside.item()), expected, rtol=1e-11, atol=1e-13)
    total = sum(e**2 - outside.item() ** 2 for e in errors) + outside.item() ** 2
    np.testing.assert_allclose(lower.item(), max(errors, default=outside.item()), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(upper.item(), total**0.5, rtol=1e-11, atol=1e-13)


def kinds(chain, dtype, count, seed):
    """Random, graded, noisy, exact, structured and low-rank matrices: a batch of each."""
    g, (m, n) = generator(seed), chain.shape
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    noise = torch.randn(count, m, n, dtype=dtype, generator=g)
    exact = dense(random_factors(chain, (count,), dtype, seed))
    scales = torch.logspace(0, -8, count, dtype=torch.float64)[:, None, None]
    yield "random", noise
    yield "graded rows", noise * torch.exp(-i * torch.rand(count, 1, 1, generator=g, dtype=torch.float64))
    yield (
        "graded spectrum",
        torch.linalg.qr(noise)[0] @ (2.0 ** -torch.arange(min(m, n)).to(dtype)[:, None] * noise[:, : min(m, n)]),
    )
    yield "noisy", exact + scales * noise * exact.norm() / noise.norm()
    yield "exact", exact
    yield "cosines", torch.cos(torch.rand(count, 1, 1, generator=g, dtype=torch.float64) * i * j).to(dtype)
    yield "Cauchy", (1 / (i + j + torch.rand(count, 1, 1, generator=g, dtype=torch.float64))).to(dtype)
    yield "sparse", noise * (torch.rand(count, m, n, generator=g) < 0.2)
    yield "ones", torch.ones(count, m, n, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_lower_is_at_most_the_error_is_at_most_upper(name, dtype, order):
    """On 648 matrices of nine kinds, real and complex, in both orders; and the projection of the product is itself."""
    chain = CHAINS[name]
    for kind, W in kinds(chain, dtype, 6, seed=len(name)):
        factors, lower, upper = project_butterfly(W, chain, order)
        product = dense(factors)
        size = torch.linalg.matrix_norm(W)
        error = torch.linalg.matrix_norm(product - W)
        slack = 1e-13 * size
        assert (lower <= error * (1 + 1e-11) + slack).all(), kind
        assert (error <= upper * (1 + 1e-11) + slack).all(), kind
        again = dense(project_butterfly(product, chain, order)[0])
        assert (torch.linalg.matrix_norm(again - product) <= 1e-12 * size).all(), f"{kind}: not idempotent"


@pytest.mark.parametrize("seed", range(4))
def test_no_search_passes_the_lower_bound(seed):
    """Gradient descent from the projection: its error goes down, never below the bound."""
    chain = Chain.dyadic(8)
    W = torch.randn(8, 8, dtype=torch.float64, generator=generator(seed))
    factors, lower, _ = project_butterfly(W, chain)
    leaves = [f.clone().requires_grad_() for f in factors]
    optimizer = torch.optim.LBFGS(leaves, max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (dense(leaves) - W).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (dense(leaves) - W).norm()
    assert lower * (1 - 1e-12) <= found <= (dense(factors) - W).norm()


@pytest.mark.parametrize("order", ORDERS)
def test_two_factors_are_the_monarch_optimum(order):
    for (m, n, k), rank in itertools.product([(16, 16, 4), (12, 20, 4), (30, 18, 6)], [1, 2]):
        W = torch.randn(m, n, dtype=torch.float64, generator=generator())
        factors, lower, upper = project_butterfly(W, Chain.monarch(m, n, k, rank), order)
        *_, lost = project_monarch(W, l=k, s=m // k, r=k * rank, k=k, q=k * rank, p=n // k)
        error = (dense(factors) - W).norm()
        for value in (lower, upper, error):
            torch.testing.assert_close(value, lost, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- as a function
@pytest.mark.parametrize("name", CHAINS)
def test_scaling_scales_the_product(name):
    chain = CHAINS[name]
    W = torch.randn(*chain.shape, dtype=torch.complex128, generator=generator())
    factors, lower, upper = project_butterfly(W, chain)
    for c in (-3.7, 2j, 1e-9, 1e150, 1e-200, 1e300):
        scaled, low, high = project_butterfly(c * W, chain)
        assert all(torch.isfinite(f).all() for f in scaled)
        torch.testing.assert_close(dense(scaled) / c, dense(factors), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(low / abs(c), lower, rtol=1e-11, atol=0)
        torch.testing.assert_close(high / abs(c), upper, rtol=1e-11, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHAINS)
def test_batches_are_projected_one_by_one(name, order):
    chain = CHAINS[name]
    W = torch.cat([w[:2] for _, w in kinds(chain, torch.float64, 2, seed=5)]).unflatten(0, (2, -1))
    W = torch.cat((W, torch.zeros_like(W[:, :1])), 1)
    factors, lower, upper = project_butterfly(W, chain, order)
    assert [tuple(f.shape) for f in factors] == [(2, W.shape[1], *p) for p in chain]
    assert lower.shape == upper.shape == W.shape[:2]
    for i, j in itertools.product(range(2), range(W.shape[1])):
        single, low, high = project_butterfly(W[i, j], chain, order)
        expected = dense(single)
        torch.testing.assert_close(dense([f[i, j] for f in factors]), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lower[i, j], low, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(upper[i, j], high, rtol=1e-11, atol=1e-13)
    empty, lower, _ = project_butterfly(W[:0], chain, order)
    assert empty[0].shape == (0, W.shape[1], *chain[0])
    assert lower.shape == (0, W.shape[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 1e-6), (torch.complex64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_low_precision_is_decomposed_in_double_and_rounded_once(dtype, rounding, order):
    for name, chain in CHAINS.items():
        W = torch.randn(*chain.shape, dtype=torch.complex64 if dtype.is_complex else None, generator=generator())
        W = W.to(dtype)
        wide = W.to(torch.complex128 if dtype.is_complex else torch.float64)
        factors, lower, upper = project_butterfly(W, chain, order)
        expected, low, high = project_butterfly(wide, chain, order)
        for factor, value in zip(factors, expected, strict=True):
            assert factor.dtype == dtype
            assert torch.equal(factor, value.to(dtype)), name
        torch.testing.assert_close(lower, low)
        torch.testing.assert_close(upper, high)
        product = dense([f.to(wide.dtype) for f in factors])
        assert (product - dense(expected)).norm() <= rounding * wide.norm()
    exact = dft(64).to(torch.complex64)
    factors, _, upper = project_butterfly(exact, Chain.dyadic(64), order)
    assert relative(factors, exact) <= 1e-6
    assert upper <= 1e-6 * exact.norm()


def test_strided_input_and_no_gradient():
    W = torch.randn(16, 32, dtype=torch.float64, generator=generator())[:, ::2].T.requires_grad_()
    factors, _, _ = project_butterfly(W, Chain.dyadic(16))
    assert not any(f.requires_grad for f in factors)
    torch.testing.assert_close(dense(factors), dense(project_butterfly(W.detach().contiguous(), Chain.dyadic(16))[0]))
    conjugated = torch.randn(16, 16, dtype=torch.complex128, generator=generator()).mH
    expected = project_butterfly(conjugated.resolve_conj().contiguous(), Chain.dyadic(16))[0]
    torch.testing.assert_close(dense(project_butterfly(conjugated, Chain.dyadic(16))[0]), dense(expected))


def test_errors_name_what_is_wrong():
    chain = Chain.dyadic(8)
    with pytest.raises(ValueError, match=r"must have shape \(\*batch, 8, 8\), got \(8, 4\)"):
        project_butterfly(torch.ones(8, 4), chain)
    with pytest.raises(TypeError, match="floating point or complex"):
        project_butterfly(torch.ones(8, 8, dtype=torch.int64), chain)
    with pytest.raises(TypeError, match=r"must be a structmat\.Chain"):
        project_butterfly(torch.ones(8, 8), [(1, 8, 8, 1)])  # pyright: ignore
    with pytest.raises(ValueError, match="order must be"):
        project_butterfly(torch.ones(8, 8), chain, "middle-out")
    for bad in (torch.nan, torch.inf):
        W = torch.ones(8, 8)
        W[3, 4] = bad
        for call in (project_butterfly, search_permutation):
            with pytest.raises(ValueError, match="NaN or infinite"):
                call(W, chain)
    factors = project_butterfly(torch.ones(8, 8), chain)[0]
    with pytest.raises(ValueError, match="factors must be 3"):
        refine(torch.ones(8, 8), factors[:2], chain, 1)
    with pytest.raises(ValueError, match=r"factors\[1\] must have shape"):
        refine(torch.ones(8, 8), (factors[0], factors[0], factors[2]), chain, 1)
    with pytest.raises(ValueError, match="product of the radices"):
        permutation_candidates(8, [2, 2])


# ---------------------------------------------------------------- refinement
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_refinement_never_makes_it_worse(name, dtype):
    chain = CHAINS[name]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for kind, W in kinds(chain, wide, 4, seed=1):
        W = W.to(dtype)
        for start in (project_butterfly(W, chain)[0], tuple(f.to(dtype) for f in random_factors(chain, (4,), wide, 3))):
            before = torch.linalg.matrix_norm(dense([f.to(wide) for f in start]) - W.to(wide))
            previous = before
            for sweeps in (0, 1, 3):
                factors, error = refine(W, start, chain, sweeps)
                assert all(f.dtype == dtype and f.shape == s.shape for f, s in zip(factors, start, strict=True))
                actual = torch.linalg.matrix_norm(dense([f.to(wide) for f in factors]) - W.to(wide))
                slack = 1e-13 * torch.linalg.matrix_norm(W.to(wide))
                torch.testing.assert_close(error, actual, rtol=1e-10, atol=slack.max().item())
                assert (error <= before + slack).all(), kind
                if dtype in (torch.float64, torch.complex128):
                    assert (error <= previous + slack).all(), kind
                previous = error


def test_refinement_ends_where_the_gradient_is_zero():
    chain = Chain.dyadic(16)
    W = torch.randn(3, 16, 16, dtype=torch.float64, generator=generator())
    start, lower, _ = project_butterfly(W, chain)
    factors, error = refine(W, start, chain, sweeps=500)
    assert (error < 0.995 * torch.linalg.matrix_norm(dense(start) - W)).all()
    assert (lower <= error).all()
    leaves = [f.requires_grad_() for f in factors]
    gradients = torch.autograd.grad((dense(leaves) - W).square().sum(), leaves)
    assert max(g.abs().max() for g in gradients) <= 1e-4
    _, low = refine(1e200 * W[0], [f[0] for f in start], chain, 20)
    torch.testing.assert_close(low / 1e200, refine(W[0], [f[0] for f in start], chain, 20)[1], rtol=1e-8, atol=0)


def test_one_pass_gives_the_least_squares_optimum():
    """Where all but one factor are right, one pass finds that one."""
    chain = CHAINS["rank 2"]
    truth = random_factors(chain)
    W = dense(truth)
    for i, pattern in enumerate(chain):
        start = list(truth)
        start[i] = torch.randn(tuple(pattern), dtype=torch.float64, generator=generator(9))
        assert refine(W, start, chain, 1)[1] <= 1e-12 * W.norm()


# ---------------------------------------------------------------- permutations
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


def test_the_permutation_of_fast_transforms_is_found():
    identity = torch.eye(64, dtype=torch.float64)
    cosine = torch.from_numpy(scipy.fft.dct(identity.numpy(), axis=0, norm="ortho"))
    cases = [
        (torch.fft.fft(torch.eye(64, dtype=torch.complex128)), Chain.dyadic(64)),
        (torch.fft.fft(torch.eye(60, dtype=torch.complex128)), Chain.mixed_radix([2, 3, 2, 5])),
        (hadamard(64), Chain.dyadic(64)),
        (cosine, Chain.dyadic(64, rank=2)),
    ]
    for W, chain in cases:
        perm, lower = search_permutation(W, chain)
        assert lower <= 1e-13 * W.norm()
        assert relative(project_butterfly(W[:, perm], chain)[0], W[:, perm]) <= 1e-13


def test_the_search_returns_the_smallest_bound():
    chain = Chain.mixed_radix([2, 3, 2])
    W = torch.randn(2, 12, 12, dtype=torch.float64, generator=generator())
    perm, lower = search_permutation(W, chain)
    torch.testing.assert_close(lower, project_butterfly(W[..., perm], chain)[1], rtol=1e-11, atol=0)
    bounds = [project_butterfly(W[..., p], chain)[1].norm() for p in permutation_candidates(12, [2, 3, 2]).values()]
    torch.testing.assert_close(lower.norm(), torch.stack(bounds).min(), rtol=1e-11, atol=0)


def test_patterns_of_a_transpose_are_no_chain():
    """Refinement goes back by rows, for the mirrored patterns cannot be chained."""
    first, second = Chain.dyadic(4)
    assert second.mT.rank(first.mT) is None
    assert Pattern(*first).rank(second) == 1
