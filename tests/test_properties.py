"""Hypothesis: random classes, structures, sizes and batches against the dense definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat as sm
from structmat.testing import assert_close, dense_by_definition
from structmat.testing.strategies import batches, block_sparse, layouts, matrices, monarch, pixelfly, sizes


def wide(t):
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


@given(matrices(), st.integers(0, 5), st.integers(0, 2**16))
def test_products_equal_the_definition(A, tokens, seed):
    D = dense_by_definition(A.to(torch.complex128 if A.dtype.is_complex else torch.float64))
    x = torch.randn(tokens, A.shape[-1], dtype=A.dtype, generator=torch.Generator().manual_seed(seed))
    y = torch.randn(tokens, A.shape[-2], dtype=A.dtype, generator=torch.Generator().manual_seed(seed))
    assert_close(A.linear(x), wide(x) @ D.mT)
    assert_close(A.mT.linear(y), wide(y) @ D)
    assert_close(A.to_dense(), D)
    assert_close(A.diagonal(), D.diagonal(dim1=-2, dim2=-1))


@given(batches(), sizes(), sizes(), st.data())
def test_projection_is_idempotent_and_no_worse_than_zero(batch, m, n, data):
    k, l = data.draw(st.integers(1, n)), data.draw(st.integers(1, m))
    W = torch.randn(*batch, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m * n))
    M = sm.Monarch.from_dense(W, (k, l))
    D = dense_by_definition(M)
    size = W.norm()
    assert (W - D).norm() <= W.norm() * (1 + 1e-12)
    assert (dense_by_definition(sm.Monarch.from_dense(D, (k, l))) - D).norm() <= 1e-12 * size
    # The residual of a projection on a cone is orthogonal to the projection.
    assert ((W - D) * D).sum().abs() <= 1e-12 * size.square()


@given(monarch(16))
def test_a_monarch_is_its_own_projection(M):
    l, s, r, k, q, p = M.sizes
    if s != -(-M.shape[-2] // l) or p != -(-M.shape[-1] // k):
        return
    D = dense_by_definition(M.to(torch.complex128 if M.dtype.is_complex else torch.float64))
    from structmat.projection import project_monarch

    left, right, lost = project_monarch(D, l, s, r, k, q, p)
    again = dense_by_definition(sm.Monarch(left, right, *M.shape[-2:]))
    assert (again - D).norm() <= 1e-12 * D.norm().clamp_min(1e-300)
    assert (lost <= 1e-12 * D.norm().clamp_min(1)).all()


@given(layouts())
def test_layouts_are_values(layout):
    assert layout.mT.mT == layout == layout | layout
    assert hash(layout) == hash(layout.mT.mT)
    support = torch.zeros(layout.shape, dtype=torch.bool)
    for i, j in zip(layout.rows.tolist(), layout.columns.tolist(), strict=True):
        support[i * layout.block[0] : (i + 1) * layout.block[0], j * layout.block[1] : (j + 1) * layout.block[1]] = True
    assert torch.equal(layout.entries(), support)
    assert len(str(layout).split("\n")) == layout.grid[0]


@given(st.one_of(block_sparse(), pixelfly(12)))
def test_block_sparse_and_pixelfly_are_their_own_projections(A):
    D = A.to_dense()
    if isinstance(A, sm.BlockSparse):
        assert torch.equal(sm.BlockSparse.from_dense(D, A.layout).to_dense(), D)
        return
    found = sm.Pixelfly.from_dense(D, A.layout, A.rank)
    masked = torch.where(A.layout.entries(), 0, wide(D)).norm()
    assert (wide(found.to_dense()) - wide(D)).norm() <= masked * (1 + 1e-9) + 1e-5 * wide(D).norm()
    # On the blocks nothing is lost, but for the rounding of the sum.
    inside = A.layout.entries()
    assert_close(found.to_dense()[..., inside], wide(D)[..., inside], 1e-4 if D.real.dtype == torch.float32 else 1e-9)
