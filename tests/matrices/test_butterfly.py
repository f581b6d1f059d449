"""Butterfly and Kronecker-sparse matrices beyond what the market checks."""

import math

import pytest
import torch
import torch.nn.functional as F

from structmat import Butterfly, Chain, Diagonal, KroneckerSparse, Monarch
from structmat.matrices import _merge
from structmat.matrices._merge import PASS, PASS_IEEE, _ieee, merge, merged_stages, product_flops, stages
from structmat.testing import assert_close, dense_by_definition


def random_butterfly(chain, dtype=torch.float64, seed=0, batch=()):
    return Butterfly.from_chain(chain, batch, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_fourier_matrix():
    """Cooley and Tukey's factors, written down, make the discrete Fourier transform of any size."""
    for radices in ([2, 2, 2, 2], [2, 3, 5], [5, 3, 2], [7]):
        n = math.prod(radices)
        factors, size = [], n
        order = torch.arange(n)
        for p in radices:  # decimation in time: size -> p interleaved transforms of size / p
            m = size // p
            k, j, o = (torch.arange(s, dtype=torch.float64) for s in (m, p, p))
            angle = -2 * math.pi * j[None, :, None] * (k[None, None] + m * o[:, None, None]) / size  # (o, j, k)
            block = torch.polar(torch.ones_like(angle), angle)
            factors.append(KroneckerSparse(block.expand(n // size, p, p, m).contiguous()))
            order = order.view(n // size, m, p).transpose(1, 2).reshape(-1)
            size = m
        B = Butterfly(tuple(factors))
        dft = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
        assert_close(B.to_dense(), dft[:, order], 1e-13)


@pytest.mark.parametrize("n", [2, 4, 64, 512, 4096])
def test_product_in_few_stages(n):
    B = random_butterfly(Chain.dyadic(n))
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x
    for f in reversed(B.factors):
        expected = f.linear(expected)
    assert_close(B.linear(x), expected)
    runs = stages(B.patterns)
    assert len(runs) == (1 if n <= 64 else 2)
    assert [stop for _, stop in runs[:-1]] == [start for start, _ in runs[1:]] and runs[-1][1] == len(B.factors)
    assert B.flops == product_flops(B.patterns) >= 2 * sum(v.numel() for v in merged_stages(B._values()))


def test_dear_multiplications_take_more_stages_of_smaller_blocks():
    chain = tuple(Chain.dyadic(4096))
    assert [stop - start for start, stop in stages(chain, PASS)] == [6, 6]
    assert [stop - start for start, stop in stages(chain, PASS_IEEE)] == [3, 3, 3, 3]
    assert product_flops(chain, PASS_IEEE) < product_flops(chain, PASS)


@pytest.mark.parametrize("n", [1, 12, 64, 100])
def test_merged_is_the_same_matrix(n):
    for dtype in (torch.float64, torch.complex64, torch.bfloat16):
        B = Butterfly.random((2, n, n), nblocks=2, dtype=dtype, generator=torch.Generator().manual_seed(n))
        x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        M = B.merged()
        assert len(M.factors) <= len(stages(B.patterns)) <= len(B.factors)
        assert_close(M.linear(x), B.linear(x))
        assert len(stages(M.patterns)) == len(M.factors)  # a product merges no more
    cropped = Butterfly.random((7, 11), pad=True, dtype=torch.float64)
    assert_close(cropped.merged().to_dense(), cropped.to_dense())


@pytest.mark.parametrize("values", [[(1, 4, 8, 16), (8, 16, 4, 1)], [(16, 8, 4, 1), (1, 4, 8, 16)], [(2, 4, 8, 16)]])
def test_many_rows_go_through_all_stages_a_few_at_a_time(values, monkeypatch):
    monkeypatch.setattr(_merge, "CACHED", 2048)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(p, generator=generator, dtype=torch.float64) for p in values]
    columns = values[-1].shape[0] * math.prod(values[-1].shape[2:])
    x = torch.randn(3, 50, columns - 1, generator=generator, dtype=torch.float64)
    y = _merge.stage_product(x, values, 60)
    assert_close(y, _merge._stage_product(x, values, 60))
    x.requires_grad_()
    assert_close(_merge.stage_product(x, values, 60).detach(), y)


def test_compilation_asks_for_the_precision():
    assert torch.compile(lambda x: x * _ieee(), fullgraph=True, backend="eager")(torch.ones(2)).tolist() == [1, 1]


def test_two_stages_are_a_monarch_matrix():
    B = random_butterfly(Chain.dyadic(4096), torch.float32)
    left, right = merged_stages(B._values())
    assert left.shape == (1, 64, 64, 64) and right.shape == (64, 64, 64, 1)
    M = Monarch(left[0].movedim(-1, 0), right[..., 0])
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(2))
    assert_close(B.linear(x), M.linear(x).double())


def test_merges_in_both_directions():
    down = random_butterfly(Chain.mixed_radix([2, 3, 2, 2]))
    for B in (down, Butterfly(tuple(reversed(Butterfly.identity(24, [2, 3, 2, 2])._scale(torch.tensor(1.0)).factors)))):
        values, whole = list(B._values()), dense_by_definition(B)
        while len(values) > 1:
            values = [merge(values[0], values[1]), *values[2:]]
        assert_close(dense_by_definition(KroneckerSparse(values[0])).to(whole.dtype), whole)
    two = random_butterfly(Chain.dyadic(64, 2))
    assert len(stages(two.mT.patterns)) == len(stages(two.patterns)) and two.mT.flops == two.flops
    growing = tuple(torch.randn(p, dtype=torch.float64) for p in ((4, 2, 2, 1), (2, 2, 2, 2), (1, 2, 2, 4)))
    B = Butterfly(growing)
    assert stages(B.patterns) == ((0, 3),)
    assert_close(B.to_dense(), dense_by_definition(B))
    with pytest.raises(ValueError, match="a = 4 must divide"):
        B.chain  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_merged_factors_once(dtype):
    B = random_butterfly(Chain.dyadic(256), torch.float32)
    half = B.to(dtype)
    exact = [v.double() for v in merged_stages(tuple(v.double() for v in half._values()))]
    for got, want in zip(merged_stages(half._values()), exact, strict=True):
        assert got.dtype == dtype
        assert_close(got.double(), want, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("increasing", [True, False])
def test_twiddles_of_torch_butterfly(increasing):
    """The product by the definition of the package's own reference: level after level on pairs at a stride."""
    n, levels = 16, 4
    twiddle = torch.randn(3, levels, n // 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, up = torch.eye(n, dtype=torch.float64), increasing
    for block in twiddle:
        for level in range(levels):
            stride = 1 << (level if up else levels - 1 - level)
            pairs = block[level].view(n // (2 * stride), stride, 2, 2).permute(0, 2, 3, 1)
            y = (pairs * y.view(n, n // (2 * stride), 1, 2, stride)).sum(3).reshape(n, n)
        up = not up
    assert_close(Butterfly.from_twiddle(twiddle, increasing).to_dense(), y.mT)
    assert_close(Butterfly.from_twiddle(twiddle[None], increasing).to_dense(), y.mT)
    with pytest.raises(ValueError, match="twiddle must have shape"):
        Butterfly.from_twiddle(twiddle[:, :3])


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (1000, 1000), (97, 30), (1, 12), (60, 1)])
@pytest.mark.parametrize("pad", [False, True])
def test_fresh_outputs_have_the_variance_of_a_linear_layer(shape, pad):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, shape[1], generator=generator)
    draws = 200 if shape[0] * shape[1] < 10_000 else 20
    found = [Butterfly.random(shape, pad=pad, generator=generator).linear(x).square().mean() for _ in range(draws)]
    variance = torch.stack(found).mean().item()
    assert abs(3 * variance - 1) < 0.1, variance


def test_structure_is_exact_where_it_can_be():
    assert Butterfly.structure(1000, 1000).shape == (1000, 1000)
    assert [p.b for p in Butterfly.structure(1000, 1000)] == [5, 5, 5, 2, 2, 2]
    assert Butterfly.structure(8, 64).num_params == 224
    assert Butterfly.structure(10, 12, pad=True).shape == (16, 16)
    with pytest.raises(ValueError, match=r"radices must multiply to the 12 x 12 matrix's sizes, got \(8, 8\)"):
        Butterfly.structure(12, 12, [2, 2, 2])
    with pytest.raises(ValueError, match="radices or pad, not both"):
        Butterfly.structure(12, 12, [3, 4], pad=True)


def test_identity_inverse_and_determinant():
    eye = Butterfly.identity(12, [3, 2, 2], dtype=torch.float64)
    assert torch.equal(eye.to_dense(), torch.eye(12, dtype=torch.float64))
    with pytest.raises(ValueError, match="radices must be square"):
        Butterfly.identity(6, [(2, 3), (3, 2)])
    noise = random_butterfly(eye.chain)
    both = zip(eye.factors, noise.factors, strict=True)
    B = Butterfly(tuple(KroneckerSparse(a.values + 0.2 * b.values) for a, b in both))
    inverse = B.inverse()
    assert isinstance(inverse, Butterfly) and inverse.num_params == B.num_params
    assert_close(inverse.to_dense(), torch.linalg.inv(B.to_dense()), 1e-11)
    assert_close(B.logdet(), torch.logdet(B.to_dense()), 1e-11)
    with pytest.raises(ValueError, match="uncropped"):
        Butterfly(B.factors, 11, 11).solve(torch.ones(11, dtype=torch.float64))
    with pytest.raises(ValueError, match="square blocks in every factor"):
        random_butterfly(Chain.mixed_radix([(2, 3), (3, 2)])).inverse()


def test_closed_products_of_kronecker_sparse_matrices():
    K = KroneckerSparse.random((12, 18), 2, 3, dtype=torch.float64)
    D = Diagonal(torch.rand(18, dtype=torch.float64))
    for product, dense in (
        (K @ D, K.to_dense() @ D.to_dense()),
        (Diagonal(torch.rand(12, dtype=torch.float64).mul_(0).add_(2)) @ K, 2 * K.to_dense()),
        (K @ KroneckerSparse.random((18, 6), 2, 3, dtype=torch.float64), None),
        (K + K, 2 * K.to_dense()),
    ):
        assert isinstance(product, KroneckerSparse)
        if dense is not None:
            assert_close(product.to_dense(), dense)
    other = KroneckerSparse.random((18, 6), 2, 3, dtype=torch.float64)
    assert_close((K @ other).to_dense(), K.to_dense() @ other.to_dense())
    W = torch.randn(2, 12, 18, dtype=torch.float64)
    nearest = KroneckerSparse.from_dense(W, 2, 3)
    support = dense_by_definition(KroneckerSparse(torch.ones(2, 2, 3, 3))).double()
    assert torch.equal(nearest.to_dense(), W * support)
    with pytest.raises(ValueError, match="a d must divide"):
        KroneckerSparse.from_dense(W, 5, 1)


def test_factors_that_do_not_fit():
    a, b = torch.ones(1, 2, 2, 4), torch.ones(2, 2, 2, 3)
    with pytest.raises(ValueError, match="factors 0 and 1 must meet"):
        Butterfly((a, b))
    with pytest.raises(TypeError, match=r"factor 1 has dtype torch\.float64"):
        Butterfly((a, torch.ones(2, 2, 2, 2, dtype=torch.float64)))
    with pytest.raises(ValueError, match="factor 1 has batch"):
        Butterfly((a, torch.ones(3, 2, 2, 2, 2)))
    with pytest.raises(TypeError, match="non-empty tuple"):
        Butterfly(())
    with pytest.raises(ValueError, match="nrows must be at most 8"):
        Butterfly((a,), nrows=9)


def test_gradients_reach_every_factor_through_the_merge():
    B = random_butterfly(Chain.dyadic(256), torch.float32).requires_grad_()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(5))
    before = [f.values.detach().clone() for f in B.factors]
    optimizer = torch.optim.SGD([f.values for f in B.factors], lr=0.1)
    F.mse_loss(B.linear(x), x).backward()
    optimizer.step()
    for f, old in zip(B.factors, before, strict=True):
        assert (f.values != old).all()
