"""Blocks plus low rank: the completion that is behind it."""

import pytest
import torch

from structmat import layouts
from structmat.projection import project_pixelfly
from structmat.projection.pixelfly import project_free_blocks

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (64, 40), (47, 61)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_low_rank_is_completed(shape, dtype):
    layout = layouts.flat_butterfly(shape, 4, 2)
    L = draw(shape[0], 4, dtype=dtype) @ draw(4, shape[1], seed=1, dtype=dtype)
    S = 100 * layout.entries() * draw(*shape, seed=2, dtype=dtype)
    left, right, lost = project_pixelfly(L + S, layout.mask, layout.block, 4)
    assert (left @ right - L).norm() < 1e-10 * (L + S).norm()
    assert lost < 1e-10 * (L + S).norm()
    gram = left.mH @ left
    torch.testing.assert_close(gram, right @ right.mH)  # singular values split evenly
    assert (gram - gram.diagonal().diag()).norm() < 1e-8 * gram.norm()


def test_high_rank_from_both_starts():
    """Of these one start alone ends in a local minimum for the first seed."""
    layout = layouts.flat_butterfly((64, 64), 8, 4)
    for seed in range(4):
        L = draw(64, 12, seed=seed) @ draw(12, 64, seed=seed + 10)
        _, _, lost = project_pixelfly(L, layout.mask, layout.block, 12)
        assert lost < 1e-10 * L.norm()


def test_lost_is_the_error_outside_and_sweeps_only_lower_it():
    W = draw(2, 40, 56)
    layout = layouts.bigbird((40, 56), 8)
    outside = ~layout.entries()
    before = torch.full((2,), torch.inf, dtype=F64)
    for sweeps in (0, 1, 2, 5, 50):
        left, right, lost = project_pixelfly(W, layout.mask, layout.block, 5, sweeps)
        torch.testing.assert_close(lost, ((W - left @ right) * outside).norm(dim=(-2, -1)))
        assert (lost <= before * (1 + 1e-12)).all()
        before = lost


def test_scales_and_degenerate_masks():
    W = draw(24, 24)
    layout = layouts.block_diagonal((24, 24), 8)
    reference = project_pixelfly(W, layout.mask, layout.block, 3)[2]
    for scale in (1e-150, 1e150):
        lost = project_pixelfly(scale * W, layout.mask, layout.block, 3)[2]
        torch.testing.assert_close(lost / scale, reference)
    for mask in (torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)):
        left, right, lost = project_pixelfly(W, mask, (8, 8), 3)
        expected = 0.0 if mask.all() else torch.linalg.svdvals(W)[3:].norm().item()
        assert abs(lost.item() - expected) < 1e-12 * W.norm()
        assert torch.isfinite(left @ right).all()
    rows = torch.tensor([[True, True, True], [False, False, True], [False, False, False]])  # a row that nothing sees
    left, right, lost = project_pixelfly(W, rows, (8, 8), 3)
    assert torch.isfinite(left @ right).all()
    assert lost < (W * ~rows.repeat_interleave(8, 0).repeat_interleave(8, 1)).norm()


@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_free_blocks_are_found(scale, dtype):
    """Robust principal components: where the blocks are is not told."""
    shape, block = (61, 90), (8, 6)  # blocks of the last row are cut
    layout = layouts.random(shape, block, 12 / 120, seed=3)
    L = draw(61, 3, dtype=dtype) @ draw(3, 90, seed=1, dtype=dtype)
    S = scale * layout.entries() * draw(*shape, seed=2, dtype=dtype)
    mask, left, right, lost = project_free_blocks(L + S, layout.nnz, block, 3)
    assert torch.equal(mask, layout.mask)
    assert (left @ right - L).norm() < 1e-10 * (L + S).norm()
    assert lost < 1e-10 * (L + S).norm()


@pytest.mark.parametrize("shape", [(48, 48), (33, 50), (1, 9), (3, 3)], ids=str)
def test_free_blocks_are_never_above_blocks_or_rank_alone_nor_given_ones(shape):
    W, block = draw(2, *shape), (min(4, shape[0]), min(5, shape[1]))
    grid = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    for count in {1, -(-grid // 4), grid}:
        largest = layouts.top_k(W, block, count / grid)
        for rank in {0, 1, min(shape)}:
            mask, left, right, lost = project_free_blocks(W, count, block, rank)
            assert mask.sum() == count
            outside = ~layouts.Layout(mask, block, shape).entries()
            torch.testing.assert_close(lost, ((W - left @ right) * outside).norm(dim=(-2, -1)), atol=1e-12, rtol=1e-9)
            slack = 1e-12 * W.norm()
            assert lost.norm() <= (W * ~largest.entries()).norm() + slack
            assert lost.norm() <= torch.linalg.svdvals(W)[:, rank:].norm() + slack
            assert lost.norm() <= project_pixelfly(W, largest.mask, block, rank, 0)[2].norm() + slack


def test_errors():
    with pytest.raises(ValueError, match="rank must be at most"):
        project_pixelfly(draw(4, 5), torch.eye(2, dtype=torch.bool), (2, 3), 5)
    with pytest.raises(ValueError, match="NaN"):
        project_pixelfly(torch.full((4, 4), torch.inf), torch.eye(2, dtype=torch.bool), (2, 2), 1)
