"""Layouts of blocks: their tables, super-blocks and masks; and the errors of layouts and products."""

import pytest
import torch

from structmat_kernels.block_sparse import BlockLayout, block_sparse, flat_butterfly_mask


def test_tables(layout):
    mb, nb = layout.grid
    coarse = layout.super_tables
    for t, grid in [(layout.tables, (mb, nb))] + ([(coarse, None)] if coarse else []):
        rows, columns = t.rows.long(), t.columns.long()
        height, width = grid or (t.row_offsets.shape[0] - 1, t.column_offsets.shape[0] - 1)
        order = rows * width + columns
        assert torch.equal(order, order.sort().values) and order.unique().shape == order.shape
        assert torch.equal(t.row_offsets.diff().long(), torch.bincount(rows, minlength=height))
        assert torch.equal(t.column_offsets.diff().long(), torch.bincount(columns, minlength=width))
        assert torch.equal(t.csc_rows, t.rows[t.csc_positions.long()])
        by_column = columns[t.csc_positions.long()] * height + t.csc_rows
        assert torch.equal(by_column, by_column.sort().values)
    if coarse:
        qo, qi = layout.coarsening
        members = coarse.members.reshape(-1, qo, qi)
        held = members[members >= 0].sort().values
        assert torch.equal(held, torch.arange(layout.nnz, dtype=torch.int32))
        place, a, b = (members >= 0).nonzero(as_tuple=True)
        number = members[place, a, b].long()
        assert torch.equal(coarse.rows[place] * qo + a, layout.tables.rows[number])
        assert torch.equal(coarse.columns[place] * qi + b, layout.tables.columns[number])


def test_super_blocks_are_chosen_where_they_pay(random_mask):
    def chosen(mask, block):
        return BlockLayout.from_mask(mask, block).coarsening

    full = torch.ones(8, 8, dtype=torch.bool)
    assert chosen(full, 32) == (4, 4) and chosen(full, 64) == (2, 2) and chosen(full, 128) == (1, 1)
    assert chosen(torch.kron(random_mask(8, 8), torch.ones(4, 4)).bool(), 32) == (4, 4)
    assert chosen(torch.eye(16, dtype=torch.bool), 32) == (1, 1)
    assert chosen(random_mask(64, 64, 1 / 8), 64) == (1, 1)
    assert chosen(torch.zeros(2, 2, dtype=torch.bool), 32) == (1, 1)


def test_flat_butterfly_mask():
    mask = flat_butterfly_mask(8, 8)
    i = torch.arange(8)
    expected = torch.stack([(i[:, None] ^ i) == s for s in (0, 1, 2, 4)]).any(0)
    assert torch.equal(mask, expected)
    assert torch.equal(flat_butterfly_mask(8, 8, max_stride=1), torch.eye(8, dtype=torch.bool))
    assert torch.equal(flat_butterfly_mask(4, 4, max_stride=2), torch.kron(torch.eye(2), torch.ones(2, 2)).bool())
    stretched = flat_butterfly_mask(4, 8, max_stride=4)
    assert torch.equal(stretched, flat_butterfly_mask(8, 8, max_stride=4).reshape(4, 2, 8).any(1))
    for mb, nb in ((1, 1), (3, 7), (12, 5), (1, 9)):
        m = flat_butterfly_mask(mb, nb)
        assert m.shape == (mb, nb) and m.any(0).all() and m.any(1).all()
    with pytest.raises(ValueError, match="max_stride must be a power of two from 1 to 8"):
        flat_butterfly_mask(8, 5, max_stride=6)


def test_errors(sparse, random_mask):
    mask = random_mask(3, 4)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        BlockLayout.from_mask(mask.int(), 16)
    with pytest.raises(ValueError, match=r"mask must be \(mb, nb\)"):
        BlockLayout.from_mask(mask[0], 16)
    with pytest.raises(ValueError, match="block must be positive"):
        BlockLayout.from_mask(mask, (0, 16))
    with pytest.raises(ValueError, match="shape must be within"):
        BlockLayout.from_mask(mask, 16, shape=(32, 64))
    with pytest.raises(ValueError, match="super-blocks of at most 128"):
        BlockLayout.from_mask(mask, 64, coarsening=4)
    layout = BlockLayout.from_mask(mask, 16)
    assert layout == layout and hash(layout) != hash(layout.to("cpu"))
    x, values, u, v, bias, _ = sparse.operands(layout, 3, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(\*batch, tokens, 64\)"):
        block_sparse(x[:, :-1], values, layout)
    with pytest.raises(ValueError, match="values must be"):
        block_sparse(x, values[1:], layout)
    with pytest.raises(ValueError, match="u and v must be given together"):
        block_sparse(x, values, layout, u=u)
    with pytest.raises(ValueError, match=r"u must be \(\*batch, 48, r\)"):
        block_sparse(x, values, layout, u=u[1:], v=v)
    with pytest.raises(ValueError, match=r"v must be \(\*batch, 8, 64\)"):
        block_sparse(x, values, layout, u=u, v=v[1:])
    with pytest.raises(ValueError, match=r"bias must be \(\*batch, 48\)"):
        block_sparse(x, values, layout, bias=bias[1:])
    with pytest.raises(TypeError, match="values must have x's dtype"):
        block_sparse(x, values.half(), layout)
    with pytest.raises(ValueError, match="layout must be on x's device"):
        block_sparse(x, values, layout.to("meta"))
    with pytest.raises(ValueError, match="at most 128"):
        large = BlockLayout.from_mask(torch.tensor([[True]]), 130)
        block_sparse(torch.zeros(1, 130), torch.zeros(1, 130, 130), large, backend="triton")
