"""Projection in the metric of data against closed forms, stationarity and members."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat
from structmat import layouts
from structmat.calibrated import fit, metric_of
from structmat.lazy import Sum
from structmat.projection.moments import Moments
from structmat.testing import relative_error

DTYPES = (torch.float64, torch.complex128)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(m, n, dtype=torch.float64, outputs=False, tokens=None, seed=0):
    """A weight, and moments of correlated inputs of unequal sizes (and output gradients)."""
    g, tokens = generator(seed), tokens or 3 * (m + n)

    def correlated(size):
        mixed = torch.randn(tokens, size, generator=g, dtype=dtype) @ torch.randn(size, size, generator=g, dtype=dtype)
        return mixed * torch.logspace(0, 1, size, dtype=torch.float64) + 1

    W, x = torch.randn(m, n, generator=g, dtype=dtype), correlated(n)
    return W, Moments.of(x, correlated(m) if outputs else None), x


def configs(block=8):
    return [
        structmat.LowRankConfig(rank=3),
        structmat.BlockDiagonalConfig(nblocks=3),
        structmat.MonarchConfig(nblocks=3, rank=2),
        structmat.MonarchConfig(nblocks=(4, 3), ratio=0.6),
        structmat.BlockSparseConfig(block=block, density=0.5),
        structmat.BlockSparseConfig(block=block, pattern="banded", ratio=0.7),
        structmat.PixelflyConfig(block=block, rank=3, max_stride=1),
        structmat.ButterflyConfig(),
        structmat.LDRConfig(rank=2),
    ]


IDS = ["low rank", "diagonal", "monarch", "uneven monarch", "top_k", "banded", "pixelfly", "butterfly", "ldr"]


def loss(E, moments):
    """tr(T E S E^H), in NumPy."""
    E, S = np.asarray(E), moments.inputs.numpy()
    T = np.eye(E.shape[0]) if moments.outputs is None else moments.outputs.numpy()
    return np.trace(T @ E @ S @ E.conj().T).real


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_averages(dtype):
    _, moments, x = problem(7, 5, dtype)
    x = x.numpy()
    expected = sum(np.outer(row, row.conj()) for row in x) / len(x)
    assert np.linalg.norm(moments.inputs.numpy() - expected) <= 1e-12 * np.linalg.norm(expected)
    centred = np.cov(x.T, bias=True)
    assert np.linalg.norm(moments.covariance.numpy() - centred) <= 1e-10 * np.linalg.norm(centred)
    assert moments.centred().mean.abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("shape", [(30, 36), (36, 11), (1, 7), (7, 1)])
def test_low_rank_is_the_whitened_decomposition(shape, outputs, dtype):
    W, moments, _ = problem(*shape, dtype, outputs)
    rank = min(3, *shape)
    result = structmat.project(W, structmat.LowRankConfig(rank=rank), moments, damping=0)

    def root(S):
        values, vectors = np.linalg.eigh(S)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.conj().T

    right = root(moments.inputs.numpy())
    left = np.eye(shape[0]) if moments.outputs is None else root(moments.outputs.numpy())
    singular = np.linalg.svd(left @ W.numpy() @ right, compute_uv=False)
    best = np.sqrt(np.sum(singular[rank:] ** 2) / np.sum(singular**2))
    assert abs(result.calibrated_error - best) <= 1e-10
    achieved = np.sqrt(loss(W - result.matrix.to_dense(), moments) / loss(W, moments))
    assert abs(achieved - result.calibrated_error) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_masked_matrices_are_least_squares(dtype):
    W, moments, x = problem(20, 21, dtype)
    mask = torch.rand(3, 4, generator=generator()) < 0.6
    mask[1] = False
    layout = layouts.Layout(mask, (8, 6), (20, 21))
    start = structmat.BlockSparse.from_dense(W, layout)
    fitted = fit(start, W, moments, damping=0).to_dense().numpy()
    entries = layout.entries().numpy()
    assert not fitted[~entries].any() and entries.any()
    for row in range(20):
        kept = entries[row]
        y = x.numpy() @ W[row].numpy()
        expected = np.linalg.lstsq(x.numpy()[:, kept], y, rcond=None)[0]
        assert np.linalg.norm(fitted[row, kept] - expected) <= 1e-9 * (np.linalg.norm(expected) + 1e-300)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("config", configs()[:6], ids=IDS[:6])
def test_the_end_is_stationary(config, outputs, monkeypatch):
    """No factor has a gradient left: of the error per unit of change, measured on each factor's own size."""
    monkeypatch.setattr("structmat.projection.weighted._SMALLEST_STEP", 0.0)
    W, moments, _ = problem(30, 36, outputs=outputs)
    start = structmat.project(W, config).matrix
    fitted, damped = start, metric_of(moments, W).damped(0.3)
    for _ in range(8):
        fitted = fit(fitted, W, moments, 0.3)
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in fitted.tensors()]
    value = torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.tree_structure(fitted))
    E = W - value.to_dense()
    error = (E * ((E if damped.T is None else damped.T @ E) @ damped.S)).sum() / damped.squared(W)
    error.backward()
    for leaf in leaves:
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert (leaf.grad.norm() * leaf.norm()).item() <= 1e-3 * max(error.item(), 0.05)
    assert damped.squared(W - fitted.to_dense()) < damped.squared(W - start.to_dense())


@pytest.mark.parametrize("config", configs(), ids=IDS)
def test_errors_fall(config):
    W, moments, _ = problem(32, 32, outputs=True)
    result = structmat.project(W, config, moments)
    assert result.calibrated_error is not None and result.plain_calibrated_error is not None
    assert result.calibrated_error < 0.95 * result.plain_calibrated_error


@pytest.mark.parametrize("config", configs(), ids=IDS)
@pytest.mark.parametrize("outputs", [False, True])
def test_members_are_kept(config, outputs):
    _, moments, _ = problem(30, 36, outputs=outputs)
    member = config.random((30, 36), dtype=torch.float64, generator=generator(1)).to_dense()
    plain = structmat.project(member, config)
    result = structmat.project(member, config, moments)
    assert result.calibrated_error <= max(plain.error * 30, 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    index=st.integers(0, 8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.complex64]),
    outputs=st.booleans(),
    tokens=st.integers(1, 60),
    damping=st.sampled_from([0.01, 0.3]),
)
def test_never_worse_than_the_plain_projection(m, n, index, dtype, outputs, tokens, damping):
    W, moments, _ = problem(m, n, torch.complex128 if dtype.is_complex else torch.float64, outputs, tokens)
    W, config = W.to(dtype), configs(block=3)[index]
    try:
        config.random((m, n), device="meta")
    except ValueError:
        return  # the structure does not exist for this size
    plain, result = structmat.project(W, config), structmat.project(W, config, moments, damping)
    assert result.matrix.dtype == dtype and result.matrix.shape == (m, n)
    assert type(result.matrix) is type(plain.matrix)
    # Rounded to bfloat16 the plain projection may be the better one, which is then returned.
    damped = metric_of(moments, W).damped(damping)
    wide = W.to(torch.complex128 if dtype.is_complex else torch.float64)
    errors = [damped.squared(wide - A.matrix.to(wide.dtype).to_dense()) for A in (plain, result)]
    assert errors[1] <= errors[0]


def test_plain_moments_give_the_plain_optimum():
    W = torch.randn(30, 36, generator=generator(), dtype=torch.float64)
    moments = Moments(torch.eye(36, dtype=torch.float64) * 3, torch.zeros(36, dtype=torch.float64), 1)
    for config in configs()[:6]:
        plain, result = structmat.project(W, config), structmat.project(W, config, moments)
        assert result.bound is not None
        assert abs(result.error - plain.error) <= 1e-9 and abs(result.calibrated_error - plain.error) <= 1e-9


def test_more_damping_is_nearer_to_the_weight():
    W, moments, _ = problem(40, 40)
    config = structmat.MonarchConfig(nblocks=4, ratio=0.5)
    found = [structmat.project(W, config, moments, damping) for damping in (1e-4, 1e-1, 1e3)]
    assert found[0].error > found[1].error > found[2].error
    assert found[0].calibrated_error < found[1].calibrated_error < found[2].calibrated_error
    assert found[2].error <= 1.001 * found[2].bound


def test_sums_are_fitted_together():
    W, moments, _ = problem(30, 36)
    monarch = structmat.Monarch.from_dense(W, nblocks=3, rank=2)
    low = structmat.LowRank.from_dense(W - monarch.to_dense(), rank=2)
    joint = fit(Sum((monarch, low)), W, moments, 0.0)
    alone = fit(monarch, W, moments, 0.0)
    errors = [loss(W - A.to_dense(), moments) for A in (joint, alone)]
    assert isinstance(joint, Sum) and [type(t).__name__ for t in joint.terms] == ["Monarch", "LowRank"]
    assert errors[0] < errors[1]


def test_quasi_newton_steps_come_near_to_exact_ones():
    """The fallback for all other classes, on a class whose blocks are also known in closed form."""
    from structmat.calibrated import _polish

    W, moments, _ = problem(24, 24)
    start = structmat.Monarch.from_dense(W, nblocks=2, rank=4)
    metric = metric_of(moments, W).damped(0.1)
    exact, quasi = fit(start, W, moments, 0.1), _polish(start, W, metric)
    errors = [metric.squared(W - A.to_dense()) for A in (start, exact, quasi)]
    assert errors[2] <= 1.1 * errors[1] < 0.7 * errors[0]


def test_monarch_factors_survive_their_slices():
    from structmat.projection.blockwise import join_slices, split_slices

    for m, n, nblocks, rank in ((30, 36, 3, 2), (17, 23, (4, 3), None), (5, 5, 5, 1), (13, 7, (2, 5), None)):
        A = structmat.Monarch.random((m, n), nblocks=nblocks, rank=rank, generator=generator(), dtype=torch.float64)
        left, right = join_slices(*split_slices(A.left, A.right), A.left.shape[-1], A.right.shape[-2])
        assert torch.equal(left, A.left) and torch.equal(right, A.right)


def test_errors_name_the_argument():
    W, moments, x = problem(6, 8)
    config = structmat.LowRankConfig(rank=2)
    with pytest.raises(ValueError, match=r"moments are of 8 inputs.*W is 8 x 6"):
        structmat.project(W.mT, config, moments)
    with pytest.raises(TypeError, match=r"moments must be structmat.Moments, got Tensor"):
        structmat.project(W, config, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="damping must be a finite number, 0 or above"):
        structmat.project(W, config, moments, damping=-1)
    with pytest.raises(ValueError, match=r"W must have shape \(m, n\), got \(1, 6, 8\)"):
        structmat.project(W[None], config, moments)
    few = Moments.of(x[:3])
    with pytest.raises(ValueError, match=r"singular to rounding.*Raise damping"):
        structmat.project(W, config, few, damping=0)
    found = structmat.project(W, config, few)
    assert found.calibrated_error < found.plain_calibrated_error
    with pytest.raises(ValueError, match="inputs has NaN or infinite entries"):
        Moments.of(x / 0)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, n\)"):
        Moments(torch.ones(2, 2), torch.ones(3), 1)
    with pytest.raises(ValueError, match="count must be positive"):
        Moments(torch.ones(2, 2), torch.ones(2), 0)
    with pytest.raises(TypeError, match="moments are complex, W is not"):
        structmat.project(W, config, problem(6, 8, torch.complex128)[1])


def test_dead_inputs_and_zero_weights():
    W, _, x = problem(12, 12)
    x[:, 3:9] = 0
    result = structmat.project(W, structmat.MonarchConfig(nblocks=2, rank=2), Moments.of(x))
    assert torch.isfinite(result.matrix.to_dense()).all() and result.calibrated_error <= result.plain_calibrated_error
    zero = structmat.project(torch.zeros_like(W), structmat.MonarchConfig(nblocks=2, rank=2), Moments.of(x))
    assert relative_error(zero.matrix.to_dense(), torch.zeros_like(W)) == 0 and zero.calibrated_error == 0
