"""Projection on chains of Kronecker-sparse patterns: exact where W is a product, and how it behaves as a function."""

import itertools

import pytest
import torch

from structmat.chain import Chain
from structmat.projection import bases
from structmat.projection.butterfly import project_butterfly
from structmat.projection.refine import permutation_candidates, refine, search_permutation
from structmat.projection.splitting import merge, merge_all, on_support


# ---------------------------------------------------------------- products
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_merge_is_the_product(tools, name, dtype):
    chain = tools.chains[name]
    factors = tools.random_factors(chain, dtype=dtype)
    product = tools.kronecker_sparse(factors[0])
    for i, (right, merged) in enumerate(zip(factors[1:], itertools.accumulate(factors, merge), strict=False)):
        assert tuple(merged.shape) == tuple(chain.merged(0, i + 1))
        torch.testing.assert_close(tools.kronecker_sparse(merged), product, rtol=1e-13, atol=1e-13)
        product = product @ tools.kronecker_sparse(right)
    torch.testing.assert_close(tools.dense(factors), product, rtol=1e-13, atol=1e-13)
    inside, outside = on_support(product, chain.merged(0, len(chain)))
    torch.testing.assert_close(inside, merge_all(factors), rtol=1e-13, atol=1e-13)
    assert outside.item() == 0


def test_merge_of_batches_and_its_gradient(tools):
    chain = tools.chains["rank 2"]
    left, right = tools.random_factors(chain, (2, 3))[1:3]
    merged = merge(left, right)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(merged[i, j], merge(left[i, j], right[i, j]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merge(left[:, :1], right)[1, 2], merge(left[1, 0], right[1, 2]))
    small = [f.requires_grad_() for f in tools.random_factors(Chain.monarch(4, 4, 2))]
    assert torch.autograd.gradcheck(merge, small)
    with pytest.raises(ValueError, match="cannot be chained"):
        merge(right, left)


# ---------------------------------------------------------------- exact
@pytest.mark.parametrize("n", [4, 32, 256, 1024])
def test_fast_transforms_are_recovered(tools, n, order):
    cases = [(tools.dft(n), Chain.dyadic(n)), (tools.hadamard(n), Chain.dyadic(n))]
    if n >= 16:
        cases.append((tools.dct(n), Chain.dyadic(n, rank=2)))
    for W, chain in cases:
        factors, lower, upper = project_butterfly(W, chain, order)
        assert tools.relative(factors, W) <= 1e-13
        assert lower <= upper <= 1e-13 * W.norm()
        norms = torch.stack([f.norm() for f in factors])
        assert (norms.max() / norms.min() - 1).abs() <= 1e-12, "factors have equal norms"
    if n == 1024:
        assert sum(f.numel() for f in factors) == 65_536


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_random_members_are_recovered(tools, name, dtype, order):
    W = tools.dense(tools.random_factors(tools.chains[name], (3,), dtype))
    factors, lower, upper = project_butterfly(W, tools.chains[name], order)
    assert tools.relative(factors, W) <= 1e-13
    assert (lower <= upper).all()
    assert upper.max() <= 1e-13 * W.norm()


def test_a_thousand_by_mixed_radix(tools):
    chain = Chain.mixed_radix([2, 2, 2, 5, 5, 5])
    W = tools.dense(tools.random_factors(chain))
    for order in ("balanced", "left-to-right"):
        assert tools.relative(project_butterfly(W, chain, order)[0], W) <= 1e-12


def test_sparse_members_of_smaller_rank_are_recovered(tools):
    for seed in range(20):
        chain = tools.chains["rank 2"] if seed % 2 else tools.chains["ranks beyond the blocks"]
        factors = [
            f * (torch.rand(f.shape, generator=tools.generator(seed)) < 0.4)
            for f in tools.random_factors(chain, seed=seed)
        ]
        W = tools.dense(factors)
        for order in ("balanced", "left-to-right"):
            assert tools.relative(project_butterfly(W, chain, order)[0], W) <= 1e-13


@pytest.mark.parametrize("n", [256, 1024])
def test_a_noisy_butterfly_is_denoised(tools, n, order):
    chain = Chain.dyadic(n)
    W = tools.dense(tools.random_factors(chain))
    noise = torch.randn(n, n, dtype=W.dtype, generator=tools.generator(1))
    noise *= 0.01 * W.norm() / noise.norm()
    factors, lower, upper = project_butterfly(W + noise, chain, order)
    error = (tools.dense(factors) - W - noise).norm()
    assert error <= 1.03 * noise.norm()
    assert lower <= error <= upper


def test_chunks_change_nothing(tools, order, monkeypatch):
    for name, chain in tools.chains.items():
        W = torch.randn(3, *chain.shape, dtype=torch.complex128, generator=tools.generator())
        whole = project_butterfly(W, chain, order)
        with monkeypatch.context() as patch:
            patch.setitem(bases._CHUNK, "cpu", 16)
            pieces = project_butterfly(W, chain, order)
        torch.testing.assert_close(tools.dense(pieces[0]), tools.dense(whole[0]), rtol=1e-11, atol=1e-12, msg=name)
        torch.testing.assert_close(pieces[1:], whole[1:], rtol=1e-12, atol=0, msg=name)


# ---------------------------------------------------------------- as a function
def test_scaling_scales_the_product(tools, name):
    chain = tools.chains[name]
    W = torch.randn(*chain.shape, dtype=torch.complex128, generator=tools.generator())
    factors, lower, upper = project_butterfly(W, chain)
    for c in (-3.7, 2j, 1e-9, 1e150, 1e-200, 1e300):
        scaled, low, high = project_butterfly(c * W, chain)
        assert all(torch.isfinite(f).all() for f in scaled)
        torch.testing.assert_close(tools.dense(scaled) / c, tools.dense(factors), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(low / abs(c), lower, rtol=1e-11, atol=0)
        torch.testing.assert_close(high / abs(c), upper, rtol=1e-11, atol=0)


def test_batches_are_projected_one_by_one(tools, name, order):
    chain = tools.chains[name]
    W = torch.cat([w[:2] for _, w in tools.kinds(chain, torch.float64, 2, seed=5)]).unflatten(0, (2, -1))
    W = torch.cat((W, torch.zeros_like(W[:, :1])), 1)
    factors, lower, upper = project_butterfly(W, chain, order)
    assert [tuple(f.shape) for f in factors] == [(2, W.shape[1], *p) for p in chain]
    assert lower.shape == upper.shape == W.shape[:2]
    for i, j in itertools.product(range(2), range(W.shape[1])):
        single, low, high = project_butterfly(W[i, j], chain, order)
        expected = tools.dense(single)
        torch.testing.assert_close(tools.dense([f[i, j] for f in factors]), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lower[i, j], low, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(upper[i, j], high, rtol=1e-11, atol=1e-13)
    empty, lower, _ = project_butterfly(W[:0], chain, order)
    assert empty[0].shape == (0, W.shape[1], *chain[0])
    assert lower.shape == (0, W.shape[1])


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 1e-6), (torch.complex64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_low_precision_is_decomposed_in_double_and_rounded_once(tools, dtype, rounding, order):
    for name, chain in tools.chains.items():
        W = torch.randn(*chain.shape, dtype=torch.complex64 if dtype.is_complex else None, generator=tools.generator())
        W = W.to(dtype)
        wide = W.to(torch.complex128 if dtype.is_complex else torch.float64)
        factors, lower, upper = project_butterfly(W, chain, order)
        expected, low, high = project_butterfly(wide, chain, order)
        for factor, value in zip(factors, expected, strict=True):
            assert factor.dtype == dtype
            assert torch.equal(factor, value.to(dtype)), name
        torch.testing.assert_close(lower, low)
        torch.testing.assert_close(upper, high)
        product = tools.dense([f.to(wide.dtype) for f in factors])
        assert (product - tools.dense(expected)).norm() <= rounding * wide.norm()
    exact = tools.dft(64).to(torch.complex64)
    factors, _, upper = project_butterfly(exact, Chain.dyadic(64), order)
    assert tools.relative(factors, exact) <= 1e-6
    assert upper <= 1e-6 * exact.norm()


def test_strided_input_and_no_gradient(tools):
    W = torch.randn(16, 32, dtype=torch.float64, generator=tools.generator())[:, ::2].T.requires_grad_()
    factors, _, _ = project_butterfly(W, Chain.dyadic(16))
    assert not any(f.requires_grad for f in factors)
    torch.testing.assert_close(
        tools.dense(factors), tools.dense(project_butterfly(W.detach().contiguous(), Chain.dyadic(16))[0])
    )
    conjugated = torch.randn(16, 16, dtype=torch.complex128, generator=tools.generator()).mH
    expected = project_butterfly(conjugated.resolve_conj().contiguous(), Chain.dyadic(16))[0]
    torch.testing.assert_close(tools.dense(project_butterfly(conjugated, Chain.dyadic(16))[0]), tools.dense(expected))


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
