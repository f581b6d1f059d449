"""Displacement operators: companion matrices, Krylov matrices and powers of shifts."""

import numpy as np
import pytest
import torch

from structmat import Companion, Diagonal, LowRank
from structmat.matrices.displacement import Shift, krylov, shift_power
from structmat.testing import assert_close


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_definition(A, g, count):
    dense, columns = A.to_dense(), [g]
    for _ in range(count - 1):
        columns.append(torch.einsum("...ij,...j->...i", dense, columns[-1]))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("f", [1.0, -1.0, 0.0, 0.5, complex(0, 1)])
@pytest.mark.parametrize("up", [False, True])
def test_krylov_matrices_and_powers_of_shifts(n, f, up):
    dtype = torch.complex128 if isinstance(f, complex) else torch.float64
    A = Shift(n, f, up, dtype)
    for count in (1, n, n + 1, 3 * n + 2):
        g = draw(2, n, dtype=dtype)
        assert_close(krylov(A, g, count).to_dense(), by_definition(A, g, count))
    assert krylov(A, draw(n, dtype=dtype)).shape == (n, n)
    for k in (0, 1, n, 2 * n + 1):
        assert_close(shift_power(A, k).to_dense(), torch.linalg.matrix_power(A.to_dense(), k))


@pytest.mark.parametrize("count", [1, 4, 9])
def test_krylov_matrices_of_diagonals(count):
    A, g = Diagonal(draw(5).tanh()), draw(5, seed=1)
    assert_close(krylov(A, g, count).to_dense(), by_definition(A, g, count))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_companion_matrices_have_the_roots_and_multiply_polynomials(n):
    roots = torch.linspace(-1, 1, n, dtype=torch.float64)
    c = torch.from_numpy(np.poly(roots.numpy())[::-1].copy())
    C = Companion(c[:-1])
    assert_close(torch.linalg.eigvals(C.to_dense()).real.sort().values, roots, 1e-8)
    p = draw(n, seed=2)
    product = np.convolve([0.0, 1.0], p.numpy())  # z p(z)
    _, rest = np.polydiv(product[::-1], c.numpy()[::-1])
    expected = np.zeros(n)
    expected[: len(rest)] = rest[::-1]
    assert_close(C @ p, torch.from_numpy(expected), 1e-11)


def test_a_shift_is_a_companion_matrix():
    assert_close(Companion(torch.tensor([-2.0, 0.0, 0.0])).to_dense(), Shift(3, 2.0).to_dense().double())


def test_errors():
    with pytest.raises(TypeError, match="Shift or a Diagonal"):
        krylov(LowRank(torch.ones(2, 1), torch.ones(1, 2)), torch.ones(2))
    with pytest.raises(ValueError, match="3 entries"):
        krylov(Shift(3), torch.ones(2))
    with pytest.raises(TypeError, match="g has dtype"):
        krylov(Shift(3), torch.ones(3).double())
    with pytest.raises(ValueError, match="at least 0"):
        shift_power(Shift(3), -1)
    with pytest.raises(TypeError, match="must be a Shift"):
        shift_power(Diagonal(torch.ones(2)), 2)
    for C in (Companion(torch.zeros(3)), Companion(torch.zeros(3)).mT):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            C.solve(torch.ones(3))
    with pytest.raises(ValueError, match="at least one entry"):
        Companion(torch.ones(0))
    with pytest.raises(ValueError, match="square"):
        Companion.random((2, 3))
