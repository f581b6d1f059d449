"""Checks of entries, arithmetic, solving, declared structure and initialisation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from structmat.base import LINEAR_STD, StructuredMatrix
from structmat.testing.entry import Entry, assert_close, draw


def check_entries(entry: Entry, device: Any = "cpu") -> None:
    """Shape, dense entries, diagonal, trace, NumPy and SciPy views equal the reference's."""
    for dtype in (torch.float64, torch.complex128):
        if dtype not in entry.dtypes:
            continue
        A = entry(dtype, device)
        D = entry.reference(A)
        assert A.shape == D.shape, f"shape {tuple(A.shape)}, the reference has {tuple(D.shape)}"
        assert isinstance(A.shape, torch.Size)
        assert A.device == D.device
        assert A.ndim == D.ndim
        assert A.batch_shape == D.shape[:-2]
        assert_close(A.to_dense(), D, what="to_dense")
        assert_close(A.mT.to_dense(), D.mT, what="mT.to_dense")
        assert_close(A.diagonal(), D.diagonal(dim1=-2, dim2=-1), what="diagonal")
        assert_close(A.mT.diagonal(), D.diagonal(dim1=-2, dim2=-1), what="mT.diagonal")
        # A trace may cancel: relative to the sum of the sizes of the diagonal's entries.
        size = D.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        off = (A.trace() - D.diagonal(dim1=-2, dim2=-1).sum(-1)).abs()
        assert (off <= 1e-12 * size).all(), "trace differs"
        assert type(A).__name__ in repr(A)
        if not any(t.requires_grad for t in A.tensors()):
            assert_close(torch.from_numpy(np.asarray(A)).to(device), D, what="np.asarray")
        if A.ndim == 2:
            S = A.to_scipy()
            v, X = draw((A.shape[-1],), A).cpu(), draw((A.shape[-2], 2), A).cpu()
            assert_close(torch.from_numpy(S @ v.numpy()), D.cpu() @ v, what="scipy matvec")
            assert_close(torch.from_numpy(S.H @ X.numpy()), D.mH.cpu() @ X, what="scipy adjoint")


def check_arithmetic(entry: Entry, device: Any = "cpu") -> None:
    """Sums, differences, scalar multiples and products with matrices of the same and of other classes."""
    from structmat.matrices import Dense, Diagonal, LowRank, Permutation

    for dtype in (torch.float64, torch.complex128):
        if dtype not in entry.dtypes:
            continue
        A, B = entry(dtype, device), entry(dtype, device, seed=1)
        D, E = entry.reference(A), entry.reference(B)
        m, n = A.shape[-2:]
        assert_close((A + B).to_dense(), D + E, what="A + B")
        assert_close((A - B).to_dense(), D - E, what="A - B")
        assert_close((-A).to_dense(), -D, what="-A")
        assert_close((2 * A).to_dense(), 2 * D, what="2 * A")
        assert_close((A / 4).to_dense(), D / 4, what="A / 4")
        assert_close((A * torch.tensor(0.5, dtype=dtype, device=device)).to_dense(), 0.5 * D, what="A * tensor")
        assert_close(sum([A, B, A]).to_dense(), 2 * D + E, what="sum([A, B, A])")  # pyright: ignore
        x = draw((*A.batch_shape, 3, m), A)
        assert_close((A @ B.mT).linear(x), (x @ (E @ D.mT)), what="A @ B.mT")
        assert_close((A @ A.H).to_dense(), D @ D.mH, what="A @ A.H")
        others: list[StructuredMatrix] = [
            Dense(draw((n, 4), A)),
            Diagonal(draw((n,), A)),
            LowRank(draw((n, 2), A), draw((2, 3), A)),
            Permutation.random((n, n), dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0)),
        ]
        for other in others:
            name = type(other).__name__
            assert_close((A @ other).to_dense(), D @ other.to_dense(), what=f"A @ {name}")
            assert_close((other.mT @ A.mT).to_dense(), other.to_dense().mT @ D.mT, what=f"{name}.mT @ A.mT")
        assert_close((A + Dense(E)).to_dense(), D + E, what="A + Dense")
        assert_close((A + LowRank(draw((m, 2), A), draw((2, n), A))).to_dense(), D + draw((m, 2), A) @ draw((2, n), A))
        try:
            _ = A @ Dense(draw((n + 1, 2), A))
        except ValueError as error:
            assert str(tuple(A.shape)) in str(error)
        else:
            raise AssertionError("no error for a product of sizes that do not meet")


def check_solve(entry: Entry, device: Any = "cpu") -> None:
    """solve, inverse, slogdet and logdet of invertible entries; a plain error from the others that are square."""
    for dtype in (torch.float64, torch.complex128):
        if dtype not in entry.dtypes:
            continue
        A = entry(dtype, device)
        if not entry.invertible:
            if A.shape[-1] == A.shape[-2]:
                try:
                    A.solve(draw((A.shape[-1],), A))
                except (ValueError, NotImplementedError) as error:
                    assert str(error)
                else:
                    raise AssertionError("solve works: declare the entry invertible")
            continue
        D = entry.reference(A)
        *batch, n, _ = A.shape
        condition = torch.linalg.cond(D).max().item()
        tol = 1e-14 * condition + 1e-13  # the backward error of a stable solver, times the condition number
        b, v = draw((*batch, n, 3), A), draw((*batch, n), A, 2)
        for name, M, E in (("A", A, D), ("A.mT", A.mT, D.mT), ("A.H", A.H, D.mH)):
            assert_close(M.solve(b), torch.linalg.solve(E, b), tol, f"{name}.solve of columns")
            assert_close(M.solve(v), torch.linalg.solve(E, v), tol, f"{name}.solve of a vector")
            assert_close(M.inverse().to_dense(), torch.linalg.inv(E), tol, f"{name}.inverse")
            assert_close(M.inverse().linear(b.mT), b.mT @ torch.linalg.inv(E).mT, tol, f"{name}.inverse.linear")
            sign, logabs = M.slogdet()
            ref_sign, ref_logabs = torch.linalg.slogdet(E)
            assert_close(sign, ref_sign, 1e-11, f"sign of {name}")
            assert (logabs - ref_logabs).abs().max() <= 1e-11 * n, f"log|det| of {name}"
        expected = torch.logdet(D)
        got = A.logdet()
        assert got.shape == expected.shape
        assert_close(got.exp().nan_to_num(), expected.exp().nan_to_num(), 1e-10, "exp(logdet)")
        assert torch.equal(got.isnan(), expected.isnan())
        assert_close(A.inverse().inverse().to_dense(), D, tol * condition, "inverse of the inverse")


def check_structure(entry: Entry, device: Any = "cpu") -> None:
    """Declared parameters and flops are those that are stored and done; the product never goes through dense."""
    A = entry(entry.dtypes[0], device)
    stored = sum(t.numel() for t in A.tensors() if t.is_floating_point() or t.is_complex())
    assert A.num_params == stored, f"num_params says {A.num_params}, {stored} are stored"
    assert isinstance(A.flops, int)
    for name, M, size in (("A", A, A.shape[-1]), ("A.mT", A.mT, A.shape[-2])):
        tokens, counter = 16, FlopCounterMode(display=False)
        x = draw((*A.batch_shape, tokens, size), A)
        with counter:
            M.linear(x)
        measured = counter.get_total_flops() / tokens
        # The counter sees matrix products only; what it sees must have been declared.
        assert measured <= M.flops, f"{name}.linear does {measured} flops a token, {M.flops} are declared"


def check_initialisation(entry: Entry, device: Any = "cpu") -> None:
    """``randomize_`` gives N(0, 1) inputs outputs of the asked standard deviation within 5%, where the class has it."""
    A = entry(torch.float32 if torch.float32 in entry.dtypes else entry.dtypes[0], device)
    generator = torch.Generator(device).manual_seed(0)
    squares, total = 0.0, 0
    try:
        A.clone().randomize_(generator=generator)
    except NotImplementedError as error:
        assert "random" in str(error)
        return
    rounds = 400 if math.prod(A.shape) < 400 else 100
    for _ in range(rounds):
        D = A.clone().randomize_(LINEAR_STD, generator).to_dense()
        squares += D.abs().square().sum().item()
        total += math.prod(D.shape[:-1])
    std = math.sqrt(squares / total)
    # 5% is the promise; what small matrices add to it is the sampling error of the mean over this many rows.
    assert abs(std / LINEAR_STD - 1) <= 0.05 + 1.5 / math.sqrt(total), f"outputs have standard deviation {std:.4f}"
