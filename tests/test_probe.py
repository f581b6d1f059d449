"""probe: every family at one number of parameters, best first."""

from __future__ import annotations

import pytest
import torch

import structmat

FAST = [structmat.LowRankConfig(ratio=1), structmat.MonarchConfig(nblocks=4), structmat.BlockDiagonalConfig()]


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda g: structmat.LowRank.random((32, 48), rank=5, generator=g), "pivoted lowrank 5"),
        (lambda g: structmat.Monarch.random((32, 48), nblocks=4, rank=1, generator=g), "monarch 4x4 rank 1"),
        (lambda g: structmat.BlockDiagonal.random((32, 48), nblocks=4, generator=g), "blockdiagonal 4"),
        (lambda g: structmat.Toeplitz.random((32, 48), generator=g), "toeplitzlike"),
    ],
)
def test_it_finds_the_structure_that_a_matrix_has(made, name):
    A = made(torch.Generator().manual_seed(0))
    found = structmat.probe(A.to_dense(), max(A.num_params, 160))
    assert found.best.structure.startswith(name) and found.best.error < 1e-4
    assert all(row.params <= found.budget for row in found.rows) and len(found.rows) + len(found.missing) == 10
    assert [row.error for row in found.rows] == sorted(row.error for row in found.rows)


def test_moments_decide_where_they_are_given():
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 24, generator=g), torch.randn(99, 24, generator=g) * torch.linspace(0.01, 3, 24)
    moments = structmat.Moments.of(x)
    found = structmat.probe(W, 0.5, moments, configs=FAST)
    assert [r.calibrated_error for r in found.rows] == sorted(r.calibrated_error for r in found.rows)
    for row in found.rows:
        result = structmat.project(W, row.config, moments)
        assert (row.error, row.calibrated_error) == (result.error, result.calibrated_error)
        assert row.params == result.matrix.num_params <= found.budget == 288


def test_table_and_plot(tmp_path):
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    found = structmat.probe(W, 0.2, measure=True, configs=[*FAST, structmat.BlockSparseConfig(ratio=1)])
    lines = str(found).splitlines()
    assert lines[0] == "64 x 48 within 614 parameters (20.0%)"
    assert lines[1].split() == ["structure", "params", "share", "error", "projecting", "product"]
    assert any(line.startswith("dense") for line in lines) and found.dense_seconds > 0
    assert found.missing and any("blocksparse: blocksparse needs at least" in line for line in lines)
    for moments in (None, structmat.Moments.of(torch.randn(99, 48))):
        drawn = structmat.probe(W, 0.2, moments, configs=FAST)
        drawn.plot(tmp_path / "probe.png")
        assert (tmp_path / "probe.png").stat().st_size > 2000
        assert ("calibrated" in str(drawn)) == (moments is not None)
    with pytest.raises(ValueError, match="suffix must be one of"):
        found.plot(tmp_path / "probe.txt")


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 17), (40, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_awkward_sizes(shape, dtype):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.complex64).to(
        torch.complex128 if dtype.is_complex else torch.complex64
    )
    W = W if dtype.is_complex else W.real.to(dtype)
    found = structmat.probe(W, 1.0)
    assert found.rows and all(row.params <= shape[0] * shape[1] for row in found.rows)


def test_errors_name_what_is_wrong():
    W = torch.randn(8, 8)
    for bad in (0, -3, 1.5, 0.0, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            structmat.probe(W, bad)
    with pytest.raises(TypeError, match="budget must be a number"):
        structmat.probe(W, "half")
    with pytest.raises(structmat.BudgetError, match="no family has a 8 x 8 matrix within 3 parameters"):
        structmat.probe(W, 3, configs=FAST)
    with pytest.raises(TypeError, match="configs must be Configs"):
        structmat.probe(W, 0.5, configs=[3])
    with pytest.raises(TypeError, match="configs must be Configs"):
        structmat.probe(W, 0.5, configs=[])
    with pytest.raises(ValueError, match="must leave its size to the budget"):
        structmat.probe(W, 0.5, configs=[structmat.MonarchConfig(rank=2)])
    with pytest.raises(ValueError, match=r"W must have shape \(m, n\)"):
        structmat.probe(torch.randn(2, 8, 8), 0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        structmat.probe(W * float("nan"), 0.5)
    with pytest.raises(ValueError, match="moments are of 5 inputs"):
        structmat.probe(W, 0.5, structmat.Moments.of(torch.randn(9, 5)))
