"""Kaleidoscope matrices beyond what the market checks."""

import pytest
import torch

from structmat import Butterfly, Diagonal, Kaleidoscope, KroneckerSparse, LowRank, Sum
from structmat.matrices._kaleidoscope_radices import admissible_size, palindrome
from structmat.matrices._kaleidoscope_stages import groups, kaleidoscope_stages
from structmat.testing import assert_close


def random(shape, width=1, expansion=1, dtype=torch.float64, seed=0, **kw):
    return Kaleidoscope.random(
        shape, width, expansion, dtype=dtype, generator=torch.Generator().manual_seed(seed), **kw
    )


def stages_of(K):
    return kaleidoscope_stages(tuple(f.values for f in K.factors), K.radices)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 12, 64, 256, 1000, 4096])
def test_product_in_few_stages(n, width):
    """2 w + 1 of them, one where the matrix is small: not 2 w log n."""
    K = random((n, n), width)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x
    for f in reversed(K.factors):
        expected = f.linear(expected)
    assert_close(K.linear(x), expected)
    merged = stages_of(K)
    assert len(merged) == (2 * width + 1 if len(groups(K.radices, width)) == 2 else 1)
    assert len(merged) == 1 if n <= 64 else len(merged) == 2 * width + 1 or (n, width) == (256, 1)
    assert 2 * sum(v.numel() for v in merged) <= K.flops


def test_large_sizes_are_cut_into_more_groups():
    K = random((1 << 16, 1 << 16))
    cuts = groups(K.radices, 1)
    assert len(cuts) == 3 and len(stages_of(K)) == 5
    assert [stop for _, stop in cuts[:-1]] == [start for start, _ in cuts[1:]]
    x = torch.randn(2, K.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x
    for f in reversed(K.factors):
        expected = f.linear(expected)
    assert_close(K.linear(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_merged_factors_once(dtype):
    half = random((256, 256), 2, dtype=torch.float32).to(dtype)
    exact = kaleidoscope_stages(tuple(f.values.double() for f in half.factors), half.radices)
    for got, want in zip(stages_of(half), exact, strict=True):
        assert got.dtype == dtype
        assert_close(got.double(), want, torch.finfo(dtype).eps / 2)


def test_structure():
    assert [admissible_size(n) for n in (1, 7, 11, 97, 1000, 1009, 1024)] == [1, 7, 12, 98, 1000, 1024, 1024]
    assert [palindrome(n) for n in (1, 7, 12, 1000)] == [(1,), (7,), (2, 3, 2), (2, 5, 2, 5, 5, 2)]
    K = random((4, 7), 3, 2)
    assert (K.size, K.radices, K.width, K.expansion, len(K.factors)) == (14, (2, 7), 3, 2.0, 12)
    assert random((5, 5), radices=[2, 2, 2]).expansion == 1.6
    dyadic = random((64, 64), 2)
    assert dyadic.num_params == 2 * 2 * 6 * 2 * 64
    assert Kaleidoscope(dyadic.factors).width == 2
    assert torch.equal(Kaleidoscope.identity(6, 2, 3).to_dense(), torch.eye(6))


def test_errors():
    with pytest.raises(ValueError, match="width must be at least 1"):
        Kaleidoscope.random((4, 4), 0)
    with pytest.raises(TypeError, match="expansion must be an integer"):
        Kaleidoscope.random((4, 4), 1, 1.5)  # pyright: ignore
    with pytest.raises(ValueError, match=r"radices must multiply to at least 1 \* 9 = 9, got \(2, 2, 2\)"):
        Kaleidoscope.random((9, 4), radices=[2, 2, 2])
    with pytest.raises(ValueError, match="factors must have the patterns"):
        Kaleidoscope(Butterfly.random((8, 8)).factors)
    with pytest.raises(ValueError, match="factors must have the patterns"):
        Kaleidoscope((*random((8, 8)).factors, *random((8, 8), radices=(4, 2)).factors))
    with pytest.raises(ValueError, match="uncropped"):
        random((8, 8), expansion=2).solve(torch.ones(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="uncropped"):
        random((11, 11)).inverse()
    with pytest.raises(ValueError, match="square"):
        random((4, 8)).logdet()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_inverse_transpose_and_determinant_are_kaleidoscopes(dtype):
    K = random((12, 12), 2, dtype=dtype)
    K = Kaleidoscope(tuple(KroneckerSparse(f.values + 0.1) for f in K.factors))
    D = K.to_dense()
    for got, want in ((K.inverse(), torch.linalg.inv(D)), (K.mT, D.mT), (K.H, D.mH), (2 * K, 2 * D)):
        assert isinstance(got, Kaleidoscope) and got.width == 2 and got.radices == K.radices
        assert_close(got.to_dense(), want, 1e-10)
        assert Kaleidoscope(got.factors).shape == K.shape
    assert_close(K.slogdet()[1], torch.linalg.slogdet(D)[1], 1e-10)


def test_widths_add_in_products():
    """Also where the matrices are cropped between."""
    A, B = random((5, 7), 1, radices=(2, 2, 3)), random((7, 6), 2, radices=(2, 2, 3), seed=1)
    product = A @ B
    assert isinstance(product, Kaleidoscope) and (product.width, product.shape, product.size) == (3, (5, 6), 12)
    assert_close(product.to_dense(), A.to_dense() @ B.to_dense())
    d = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scaled = A @ Diagonal(d) @ B
    assert isinstance(scaled, Kaleidoscope) and scaled.width == 3
    assert_close(scaled.to_dense(), A.to_dense() @ torch.diag(d) @ B.to_dense())
    scaled = Diagonal(d) @ B
    assert isinstance(scaled, Kaleidoscope) and scaled.width == 2
    assert_close(scaled.to_dense(), torch.diag(d) @ B.to_dense())
    other = random((7, 6), radices=(3, 2, 2))
    assert not isinstance(A @ other, Kaleidoscope)
    assert_close((A @ other).to_dense(), A.to_dense() @ other.to_dense())
    batch = random((3, 7, 7))
    assert isinstance(batch @ batch, Kaleidoscope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_sums(dtype, batch):
    terms = [random((*batch, 5, 7), w, 2, dtype, seed=w) for w in (1, 3, 2)]
    total = Kaleidoscope.sum(terms)
    assert (total.width, total.expansion, total.shape) == (3, 6.0, (*batch, 5, 7))
    assert_close(total.to_dense(), torch.stack([t.to_dense() for t in terms]).sum(0))
    assert Kaleidoscope.sum(terms[:1]) is terms[0]
    assert isinstance(terms[0] + terms[1], Sum)
    one = Kaleidoscope.sum([random((1, 1)), random((1, 1), 2)])
    assert one.radices == (2, 1) and one.width == 2
    total = Kaleidoscope.sum([t.requires_grad_() for t in terms])
    total.linear(torch.ones(7, dtype=dtype)).abs().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for term in terms for t in term.tensors())


def test_sums_of_what_does_not_fit():
    A = random((5, 7))
    with pytest.raises(ValueError, match="at least one"):
        Kaleidoscope.sum([])
    with pytest.raises(TypeError, match="got a LowRank"):
        Kaleidoscope.sum([A, LowRank.random((5, 7), 1, dtype=torch.float64)])  # pyright: ignore
    with pytest.raises(ValueError, match="terms must have one shape"):
        Kaleidoscope.sum([A, A.mT])
    with pytest.raises(ValueError, match="terms must have one radices"):
        Kaleidoscope.sum([A, random((5, 7), 1, 2)])
    with pytest.raises(TypeError, match="terms must have one dtype"):
        Kaleidoscope.sum([A, A.to(torch.float32)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("width", [1, 4])
def test_random_factors_are_orthogonal(width, dtype):
    Q = random((30, 30), width, dtype=dtype).to_dense() * 3**0.5
    assert_close(Q @ Q.mH, torch.eye(30, dtype=dtype), 1e-13)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1000, 1000), (11, 3)], ids=str)
def test_every_draw_has_the_output_variance_of_a_linear_layer(size, width):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [Kaleidoscope.random((size[1], size[0]), width, generator=generator).to_dense() for _ in range(3)]
    )
    variance = 3 * draws.square().sum(-1).mean(-1)
    exact = admissible_size(max(size)) in size  # all rows or all columns of an orthogonal matrix
    assert (variance - 1).abs().max() < (1e-4 if exact else 0.5)
    assert draws.mean().abs() < 0.05  # signs are random


def test_gradients_reach_every_number():
    K = random((256, 256), 2).requires_grad_()
    x = torch.randn(300, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (K.linear(x) - x).square().sum().backward()
    assert all((f.values.grad != 0).all() for f in K.factors)
