"""Layouts: named patterns, their values, algebra and drawings."""

import pickle

import matplotlib as mpl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structmat import BlockSparse, Butterfly, Kaleidoscope, layouts
from structmat.layouts import Layout

NAMED = {
    "flat_butterfly": layouts.flat_butterfly,
    "block_diagonal": layouts.block_diagonal,
    "banded": layouts.banded,
    "dilated": layouts.dilated,
    "global_": layouts.global_,
    "bigbird": layouts.bigbird,
    "random": lambda shape, block: layouts.random(shape, block, 0.3),
    "full": layouts.full,
}


def test_density_of_the_flat_butterfly():
    assert layouts.flat_butterfly((1024, 1024), 32, 4, cells=16).density == 3 / 16
    for grid in (1, 2, 8, 32):
        for t in range(grid.bit_length()):
            layout = layouts.flat_butterfly((grid * 4, grid * 4), 4, 1 << t)
            assert layout.density == (t + 1) / grid
            # Rectangular: cells of two by three blocks.
            wide = layouts.flat_butterfly((grid * 8, grid * 12), 4, 1 << t, cells=grid)
            assert wide.density == (t + 1) / grid
            assert torch.equal(wide.mask, layout.mask.repeat_interleave(2, 0).repeat_interleave(3, 1))


@pytest.mark.parametrize("grid", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cls", [Butterfly, Kaleidoscope])
def test_flat_butterfly_is_the_union_of_butterfly_factors(cls, grid):
    """Of a butterfly's factors, or of a kaleidoscope's two runs of them; in blocks, and stretched to rectangles."""
    supports = {}
    for factor in cls.random((grid, grid), dtype=torch.float64).factors:
        a, _, _, d = factor.values.shape  # d: the distance of what a block joins
        assert a * d * 2 == max(grid, 2)
        supports.setdefault(d, torch.zeros(grid, grid, dtype=torch.bool)).logical_or_(factor.to_dense() != 0)
    union = torch.eye(grid, dtype=torch.bool)
    for t in range(grid.bit_length()):
        for d in supports:
            union = union | supports[d] if 2 * d == 1 << t else union
        layout = layouts.flat_butterfly((grid * 3, grid * 2), (3, 2), 1 << t)
        assert torch.equal(layout.mask, union)
        assert torch.equal(layout.entries(), union.repeat_interleave(3, 0).repeat_interleave(2, 1))
        wide = layouts.flat_butterfly((grid * 6, grid * 4), (3, 1), 1 << t, cells=grid)
        assert torch.equal(wide.entries(), union.repeat_interleave(6, 0).repeat_interleave(4, 1))
        member = BlockSparse.random((grid * 3, grid * 2), layout).to_dense() != 0
        assert not (member & ~layout.entries()).any()
    assert union.sum() == grid * grid.bit_length()


def test_1024_in_blocks_of_32_stretched_from_16_cells():
    """The issue's figure: stride 4 on 16 x 16 cells of 2 x 2 blocks stores exactly 3/16."""
    layout = layouts.flat_butterfly((1024, 1024), 32, max_stride=4, cells=16)
    assert layout.grid == (32, 32)
    assert layout.density == 3 / 16
    assert layout.num_params * 16 == 3 * 1024 * 1024
    assert torch.equal(layout.mask.sum(0), torch.full((32,), 6))
    assert torch.equal(layout.mask.sum(1), torch.full((32,), 6))


def test_other_grids_take_the_nearest_stretching():
    layout = layouts.flat_butterfly((12, 14), (4, 2), 2)  # 3 x 7: two cells, of 2 and 1 rows, of 4 and 3 columns
    assert layout.grid == (3, 7)
    assert layout.density == 1  # two cells at stride 2 are full
    diagonal = layouts.flat_butterfly((12, 14), (4, 2), 1)
    assert str(diagonal) == "████···\n████···\n····███"


@given(st.data())
def test_properties(data):
    name = data.draw(st.sampled_from(sorted(NAMED)))
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bo, bi = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    layout = NAMED[name]((m, n), (bo, bi))
    again = NAMED[name]((m, n), (bo, bi))
    assert layout == again
    assert hash(layout) == hash(again)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout.grid == (-(-m // bo), -(-n // bi))
    assert layout.mT.mT == layout
    assert torch.equal(layout.mT.entries(), layout.entries().T)
    assert layout | layout == layout
    assert layout.entries().shape == (m, n)
    assert len(layout.rows) == len(layout.columns) == layout.nnz
    assert layout.mask[layout.rows, layout.columns].all()
    tables = layout.tables()
    assert (tables.shape, tables.block, tables.nnz) == (layout.shape, layout.block, layout.nnz)
    assert torch.equal(tables.tables.rows.long(), layout.rows)
    if name not in ("random", "global_"):  # these two may leave rows empty
        assert layout.mask.any(1).all()
        assert layout.mask.any(0).all()
    if name in ("flat_butterfly", "banded", "dilated", "block_diagonal") and m == n and bo == bi:
        assert torch.equal(layout.mask, layout.mask.T)


def test_bands_and_global_blocks():
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    assert torch.equal(layouts.banded((9, 9), 1, 2).mask, (i - j).abs() <= 2)
    assert torch.equal(layouts.dilated((9, 9), 1, 2, 3).mask, ((i - j).abs() <= 6) & ((i - j) % 3 == 0))
    assert torch.equal(layouts.global_((9, 9), 1, 2).mask, (i < 2) | (j < 2))
    assert layouts.block_diagonal((8, 8), 1) == layouts.flat_butterfly((8, 8), 1, 1)
    big = layouts.bigbird((64, 64), 4, 1, 1, 2, seed=3)
    base = layouts.banded((64, 64), 4) | layouts.global_((64, 64), 4)
    assert big | base == big
    assert big != base
    assert big != layouts.bigbird((64, 64), 4, 1, 1, 2, seed=4)


def test_random_and_top_k_have_the_asked_number():
    assert layouts.random((64, 64), 8, 0.25).nnz == 16
    assert layouts.random((64, 64), 8, 1e-9).nnz == 1
    assert layouts.random((64, 64), 8, 0.25, seed=1) != layouts.random((64, 64), 8, 0.25)
    W = torch.randn(3, 50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = layouts.top_k(W, (8, 4), 0.3)
    norms = torch.zeros(7, 8, dtype=torch.float64)
    for i in range(7):
        for j in range(8):
            norms[i, j] = W[:, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4].norm()
    assert layout.nnz == round(0.3 * 56)
    assert norms[layout.mask].min() >= norms[~layout.mask].max()
    tiny = layouts.top_k(1e-200 * W, (8, 4), 0.3)
    assert tiny == layout


@pytest.mark.parametrize("name", NAMED)
def test_the_default_device_changes_nothing(name):
    expected = NAMED[name]((24, 40), 4)
    with torch.device("meta"):
        layout = NAMED[name]((24, 40), 4)
        tables = layout.tables()
        again = BlockSparse(torch.empty(layout.nnz, 4, 4, device="cpu"), layout).layout
    assert layout == expected and again == expected
    assert torch.equal(tables.table, expected.tables().table)


def test_kron_is_the_support_of_the_kronecker_product():
    a = layouts.dilated((6, 4), (1, 1), 1, 2)
    b = layouts.banded((8, 12), (2, 3), 0)
    expected = torch.kron(a.entries().int(), b.entries().int()).bool()
    assert torch.equal(layouts.kron(a, b).entries(), expected)
    coarse = layouts.block_diagonal((6, 4), (2, 2))
    expected = torch.kron(coarse.entries().int(), b.entries().int()).bool()
    assert torch.equal(layouts.kron(coarse, b).entries(), expected)
    with pytest.raises(ValueError, match="divide"):
        layouts.kron(a, layouts.full((7, 12), (2, 3)))


def test_drawings():
    layout = layouts.flat_butterfly((4096, 4096), 16, 2)  # 256 x 256 blocks: four to a character
    drawing = str(layout).splitlines()
    assert len(drawing) == 64
    assert {len(row) for row in drawing} == {64}
    assert set("".join(drawing)) == {"▒", "·"}
    assert repr(layouts.banded((7, 5), (2, 3), 0)) == "Layout(shape=(7, 5), block=(2, 3), nnz=4, density=0.5)"
    mpl.use("Agg")
    ax = layouts.banded((7, 5), (2, 3), 0).plot()
    assert ax.get_xlim() == (0, 5)
    assert ax.get_ylim() == (7, 0)
    assert "0.5" in ax.get_title()


MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Layout(MASK.int(), 2), TypeError, "bool"),
        (lambda: Layout(MASK[0], 2), ValueError, r"\(mb, nb\)"),
        (lambda: Layout(MASK, 2, (9, 6)), ValueError, r"mask must have \(5, 3\)"),
        (lambda: Layout(MASK, 0), ValueError, "block must be at least 1"),
        (lambda: Layout(MASK, 2.0), TypeError, "block must be an integer"),
        (lambda: layouts.full((8, 8), 16), ValueError, "block must be at most"),
        (lambda: layouts.flat_butterfly((64, 64), 8, 3), ValueError, "power of two from 1 to 8"),
        (lambda: layouts.flat_butterfly((64, 64), 8, 16), ValueError, "power of two from 1 to 8"),
        (lambda: layouts.flat_butterfly((64, 64), 8, 2, cells=6), ValueError, "cells"),
        (lambda: layouts.flat_butterfly((64, 64), 8, 2, cells=16), ValueError, "cells"),
        (lambda: layouts.random((8, 8), 2, 1.5), ValueError, "density"),
        (lambda: layouts.top_k(torch.zeros(8, 8), 2, 0), ValueError, "density"),
        (lambda: layouts.top_k(torch.full((8, 8), torch.nan), 2, 0.5), ValueError, "NaN"),
        (lambda: layouts.full((8, 8), 2) | layouts.full((8, 8), 4), ValueError, "one shape and block"),
        (lambda: layouts.banded((8, 8), 2, -1), ValueError, "width"),
    ],
)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
