"""Block-sparse matrices beyond the market: tables, projection, configs, sizes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat as sm
from structmat import layouts

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.data())
def test_any_layout(data):
    """Products, transposes and dense entries of any mask, cut or not, joined by the kernels or not."""
    mb, nb = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    bo, bi = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    m = data.draw(st.integers((mb - 1) * bo + 1 if mb > 1 else bo, mb * bo))
    n = data.draw(st.integers((nb - 1) * bi + 1 if nb > 1 else bi, nb * bi))
    g = generator(data.draw(st.integers(0, 1000)))
    mask = torch.rand(mb, nb, generator=g) < data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    layout = layouts.Layout(mask, (bo, bi), (m, n), data.draw(st.sampled_from([None, (1, 1), (2, 3)])))
    values = torch.randn(2, layout.nnz, bo, bi, dtype=F64, generator=g)
    A = sm.BlockSparse(values, layout)
    dense = torch.zeros(2, mb * bo, nb * bi, dtype=F64)
    for k, (i, j) in enumerate(zip(layout.rows.tolist(), layout.columns.tolist(), strict=True)):
        dense[:, i * bo : (i + 1) * bo, j * bi : (j + 1) * bi] = values[:, k]
    dense = dense[:, :m, :n]
    assert A.layout == layout
    assert torch.equal(A.to_dense(), dense)
    assert A.mT.layout == layout.mT
    assert torch.equal(A.mT.to_dense(), dense.mT)
    assert torch.equal(A.mT.mT.places, A.places)
    x, y = torch.randn(2, 3, n, dtype=F64, generator=g), torch.randn(2, 3, m, dtype=F64, generator=g)
    torch.testing.assert_close(A.linear(x), x @ dense.mT)
    torch.testing.assert_close(A.mT.linear(y), y @ dense)
    torch.testing.assert_close(A._linear_mT(y), y @ dense)
    # The tables of the transpose are those that its layout would give.
    assert torch.equal(A.mT.places, sm.BlockSparse(A.mT.values, layout.mT).places)
    again = sm.BlockSparse(A.mT.values, A.mT.places, *(getattr(A.mT, name) for name in A._static))
    assert torch.equal(again.to_dense(), dense.mT)


def test_projection_is_w_itself_on_the_blocks():
    W = torch.randn(2, 11, 13, dtype=F64, generator=generator())
    layout = layouts.bigbird((11, 13), (2, 3))
    A = sm.BlockSparse.from_dense(W, layout)
    assert torch.equal(A.to_dense(), torch.where(layout.entries(), W, 0))
    _, lost = sm.BlockSparse._project(W, layout)
    torch.testing.assert_close(lost, (W - A.to_dense()).norm(dim=(-2, -1)))
    again = sm.BlockSparse.from_dense(A.to_dense(), layout)
    assert torch.equal(again.to_dense(), A.to_dense())


def test_top_k_is_certified():
    W = torch.randn(48, 64, generator=generator())
    errors = []
    for ratio in (0.05, 0.1, 0.3, 0.7, 1.0):
        found = sm.project(W, sm.BlockSparseConfig(block=8, ratio=ratio))
        assert abs(found.error - found.bound) < 1e-6
        assert found.matrix.num_params <= ratio * 48 * 64
        for pattern in ("flat_butterfly", "banded"):
            try:
                other = sm.project(W, sm.BlockSparseConfig(block=8, ratio=ratio, pattern=pattern))
            except sm.BudgetError as error:
                assert "at least" in str(error)
                continue
            assert other.matrix.num_params <= ratio * 48 * 64
            assert other.error >= found.error - 1e-7
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_variance_by_row():
    """Every row that has blocks gets the same variance; with empty rows, the mean is what was asked for."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    layout = layouts.Layout(mask, (4, 8), (15, 30))
    A = sm.BlockSparse.random((500, 15, 30), layout, generator=generator(), dtype=F64)
    variance = A.to_dense().square().sum(-1).mean(0)  # of outputs of N(0, 1) inputs
    filled = torch.tensor([1.0] * 8 + [0.0] * 4 + [1.0] * 3, dtype=F64)
    assert (variance[filled == 0] == 0).all()
    expected = 15 / 11 / 3
    assert ((variance[filled == 1] / expected - 1).abs() < 0.1).all()


def test_sums_keep_the_class_where_tables_are_shared():
    A = sm.BlockSparse.random((8, 8), 0.5, block=2, dtype=F64)
    assert isinstance(A + 2 * A, sm.BlockSparse)
    assert isinstance(A + A.mT, sm.Sum)
    torch.testing.assert_close((A + 2 * A).to_dense(), 3 * A.to_dense())


def test_state_dict_brings_the_layout():
    """The tables of a pattern found in a matrix load into a module made with a random one."""
    W = torch.randn(24, 40, generator=generator())
    config = sm.BlockSparseConfig(block=4, ratio=0.2)
    source = sm.nn.StructuredLinear(sm.project(W, config).matrix)
    target = sm.nn.StructuredLinear(config.random((24, 40)))
    assert target.weight().layout != source.weight().layout
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 40, generator=generator(1))
    assert torch.equal(target(x), source(x))
    assert target.weight().layout == source.weight().layout


@pytest.mark.parametrize(
    "config",
    [
        sm.BlockSparseConfig(block=(4, 8), density=0.3),
        sm.BlockSparseConfig(block=4, pattern="banded", ratio=0.3),
        sm.BlockSparseConfig(block=4, pattern="flat_butterfly", max_params=500),
        sm.PixelflyConfig(),
        sm.PixelflyConfig(block=(4, 8), max_stride=2, rank=3),
        sm.PixelflyConfig(block=8, ratio=0.4, split="rule"),
    ],
    ids=repr,
)
def test_configs(config):
    assert sm.config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    W = torch.randn(64, 96, generator=generator())
    found = sm.project(W, config)
    assert found.matrix.num_params == config.num_params(64, 96)
    if config.budget(64, 96) is not None:
        assert found.matrix.num_params <= config.budget(64, 96)


LAYOUT = layouts.full((8, 8), 4)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: sm.BlockSparse(torch.ones(3, 4, 4), LAYOUT), ValueError, r"\(\*batch, 4, 4, 4\)"),
        (lambda: sm.BlockSparse(torch.ones(4, 4, 4).int(), LAYOUT), TypeError, "values"),
        (lambda: sm.BlockSparse(torch.ones(4, 4, 4), "full"), TypeError, "places"),
        (lambda: sm.BlockSparse(torch.ones(4, 4, 4), torch.zeros(3).int(), 8, 8, 1, 1, 2, 2), ValueError, "places"),
        (lambda: sm.BlockSparse(torch.ones(4, 4, 4), torch.zeros(30).int()), TypeError, "nrows"),
        (lambda: sm.BlockSparse.from_dense(torch.ones(8, 9), LAYOUT), ValueError, "layout must have W's shape"),
        (lambda: sm.BlockSparse.from_dense(torch.ones(8, 8), 2.0, 4), ValueError, "density"),
        (lambda: sm.BlockSparse.from_dense(torch.ones(8, 8), 0.5), ValueError, "block must be at most"),
        (lambda: sm.BlockSparse.random((8, 9), LAYOUT), ValueError, "layout must have the shape"),
        (lambda: sm.BlockSparseConfig(), ValueError, "exactly one"),
        (lambda: sm.BlockSparseConfig(pattern="stars", ratio=0.5), ValueError, "pattern"),
        (lambda: sm.BlockSparseConfig(density=2), ValueError, "density"),
        (lambda: sm.BlockSparseConfig(block=4, ratio=0.001).resolve(8, 8), sm.BudgetError, "at least 16"),
        (
            lambda: sm.BlockSparseConfig(block=4, pattern="banded", density=0.01).resolve(16, 16),
            ValueError,
            "density must be at least 0.25",
        ),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
