"""Iterative solvers: convergence, preconditioners, precisions, derivatives and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structmat import Circulant, Dense, Diagonal, Inverse, Toeplitz, ToeplitzLike
from structmat.linalg import CG, GMRES, ConvergenceError, Refinement, SolveInfo, solve
from structmat.testing import assert_close

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def positive(*shape, dtype=torch.float64, seed=0):
    """Hermitian, eigenvalues between 1 and about 5."""
    W = draw(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.5
    return W @ W.mH + torch.eye(shape[-1], dtype=dtype)


def general(*shape, dtype=torch.float64, seed=0):
    return torch.eye(shape[-1], dtype=dtype) + draw(*shape, dtype=dtype, seed=seed) / (3 * shape[-1] ** 0.5)


def decaying(n, dtype=torch.float64):
    k = torch.arange(n, dtype=torch.float64)
    return Toeplitz(((1 + k) ** -1.1).to(dtype), (0.7 * (1 + k) ** -1.3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [CG(), GMRES(), GMRES(restart=4)], ids=["cg", "gmres", "restarted"])
def test_solutions_of_every_dtype(method, dtype):
    W = (positive if isinstance(method, CG) else general)(11, 11, dtype=dtype)
    b = draw(11, 3, dtype=dtype, seed=1)
    x, info = solve(Dense(W), b, method, return_info=True)
    double = torch.finfo(dtype).bits == 64
    assert_close(x, torch.linalg.solve(W, b), 2e-9 if double else 1e-4)
    residuals = (b - W @ x).norm(dim=0) / b.norm(dim=0)
    assert info.residuals.shape == (3,)
    assert (info.residuals - residuals).abs().max() <= 10 * torch.finfo(dtype).eps
    assert (residuals <= (1e-10 if double else 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_gmres_ends_after_as_many_steps_as_eigenvalues(n, different, hermitian, seed):
    values = torch.arange(1, different + 1, dtype=torch.float64).repeat(n)[:n]
    Q = torch.linalg.qr(draw(n, n, seed=seed))[0]
    A = Dense(Q @ torch.diag(values) @ Q.mT)
    x, info = solve(A, draw(n, 2, seed=seed + 1), (CG if hermitian else GMRES)(tol=1e-9), return_info=True)
    assert info.iterations <= min(n, different) + 1
    assert_close(A @ x, draw(n, 2, seed=seed + 1), 1e-9)


def test_columns_converge_by_themselves():
    A = Dense(positive(20, 20))
    easy = torch.linalg.eigh(A.to_dense())[1][:, :1]  # an eigenvector takes one step
    b = torch.cat([1e8 * easy, draw(20, 1), torch.zeros(20, 1, dtype=torch.float64), 1e-8 * draw(20, 1, seed=2)], 1)
    for method in (CG(tol=1e-12), GMRES(tol=1e-12)):
        x, info = solve(A, b, method, return_info=True)
        assert (info.residuals <= 1e-12).all()
        assert info.residuals[2] == 0
        assert_close(A.matmul(x[:, 3:]), b[:, 3:], 1e-11)
        alone = solve(A, b[:, 1], method)
        assert_close(x[:, 1], alone, 1e-11)


def test_batches_broadcast():
    W = general(2, 1, 6, 6)
    b = draw(3, 6, 2)
    for method in (GMRES(), Refinement(Dense(torch.linalg.inv(W)))):
        x, info = solve(Dense(W), b, method, return_info=True)
        assert_close(x, torch.linalg.solve(W.expand(2, 3, 6, 6), b), 1e-9)
        assert info.residuals.shape == (2, 3, 2)
    v = draw(2, 1, 6)
    x, info = solve(Dense(W), v, GMRES(), return_info=True)
    assert x.shape == (2, 1, 6)
    assert info.residuals.shape == (2, 1)
    assert solve(Dense(W[0, 0]), draw(6), GMRES(), return_info=True)[1].residuals.shape == ()
    assert solve(Dense(W), draw(6, 0), GMRES()).shape == (2, 1, 6, 0)


def test_circulant_preconditioners_save_iterations():
    T = decaying(1500)
    b = draw(1500, 2)
    plain = solve(T, b, GMRES(), return_info=True)[1]
    x, info = solve(T, b, GMRES(preconditioner=Circulant.from_toeplitz(T)), return_info=True)
    assert info.iterations <= 10
    assert plain.iterations > 2 * info.iterations
    assert_close(T @ x, b, 1e-10)
    S = Toeplitz(0.9 ** torch.arange(1500, dtype=torch.float64))
    plain = solve(S, b, CG(), return_info=True)[1]
    info = solve(S, b, CG(preconditioner=Circulant.from_toeplitz(S)), return_info=True)[1]
    assert 4 * info.iterations < plain.iterations


def test_float32_inverses_bring_float64_residuals():
    M = ToeplitzLike.random((120, 120), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.zeros(120, 1, dtype=torch.float64)
    first, last = unit.clone(), unit.clone()
    first[0], last[-1] = 2, 1
    M = M * 0.3 + ToeplitzLike(first, last)
    b = draw(120, 3)
    inverse = M.to(torch.float32).inverse()
    assert inverse.dtype == torch.float32
    assert (b - M @ inverse.matmul(b.float()).double()).norm() > 1e-8 * b.norm()
    x, info = solve(M, b, Refinement(inverse, tol=1e-13), return_info=True)
    assert x.dtype == torch.float64
    assert (info.residuals <= 1e-13).all()
    assert info.iterations <= 6
    assert_close(x, torch.linalg.solve(M.to_dense(), b), 1e-11)
    T = decaying(64)
    x, info = solve(T, 1e-30 * draw(64), Refinement(Inverse(T.to(torch.float32)), tol=1e-14), return_info=True)
    assert isinstance(info, SolveInfo)
    assert info.residuals <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", ["cg", "gmres", "refinement"])
def test_derivatives_are_those_of_the_solution(kind, dtype):
    base = positive(4, 4, dtype=dtype) if kind == "cg" else general(4, 4, dtype=dtype)
    P = Diagonal(base.diagonal().real.to(dtype).clone())
    if kind != "cg":
        P = P * (1 + 0.3 * (1j if dtype.is_complex else 1))  # its transpose is not its conjugate transpose
    method = {
        "cg": CG(tol=1e-14, preconditioner=P),
        "gmres": GMRES(tol=1e-14, preconditioner=P),
        "refinement": Refinement(Dense(torch.linalg.inv(base) + 1e-3), tol=1e-14),
    }[kind]

    def call(W, b):
        W = (W + W.mH) / 2 if kind == "cg" else W
        return solve(Dense(W), b, method)

    leaves = base.requires_grad_(), draw(4, 2, dtype=dtype).requires_grad_()
    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)


def test_autocast_regions_change_nothing():
    A, b = Dense(general(30, 30, dtype=torch.float32)), draw(30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = solve(A, b, GMRES())
        y = decaying(600).to(torch.float32).solve(draw(600, dtype=torch.float32))
    assert torch.equal(x, solve(A, b, GMRES()))
    assert torch.equal(y, decaying(600).to(torch.float32).solve(draw(600, dtype=torch.float32)))


def test_batched_derivatives_and_vmap():
    W = general(3, 4, 4).requires_grad_()
    b = draw(4, 2).requires_grad_()
    torch.autograd.gradcheck(lambda W, b: solve(Dense(W), b, GMRES(tol=1e-14)), (W, b))
    mapped = torch.func.vmap(lambda W: solve(Dense(W), b.detach(), GMRES()))(W.detach())
    assert_close(mapped, torch.linalg.solve(W.detach(), b.detach()), 1e-9)
    grads = torch.func.vmap(torch.func.grad(lambda W: solve(Dense(W), b.detach(), GMRES(tol=1e-13)).sum()))(W.detach())
    torch.linalg.solve(W, b.detach()).sum().backward()
    assert_close(grads, W.grad, 1e-9)


def test_no_gradient_reaches_the_preconditioner():
    d = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
    A = Dense(general(4, 4).requires_grad_())
    solve(A, draw(4), GMRES(preconditioner=Diagonal(d))).sum().backward()
    assert d.grad is None
    assert A.weight.grad.norm() > 0


def test_what_does_not_converge_raises_with_numbers():
    n = 40
    shift = Dense(torch.eye(n, dtype=torch.float64).roll(1, 0))  # GMRES finds nothing before step n
    with pytest.raises(ConvergenceError, match="GMRES stopped after 12 iterations") as caught:
        solve(shift, torch.eye(n, dtype=torch.float64)[0], GMRES(restart=40, max_iterations=12))
    assert caught.value.iterations == 12
    assert caught.value.residual == pytest.approx(1)
    assert solve(shift, torch.eye(n, dtype=torch.float64)[0], GMRES()).argmax() == n - 1
    with pytest.raises(ConvergenceError, match="not positive definite"):
        solve(Dense(-positive(5, 5)), draw(5), CG())
    with pytest.raises(ConvergenceError, match="does not fall"):
        solve(Dense(torch.diag(torch.tensor([1.0, 0.0]))), torch.ones(2), GMRES())
    with pytest.raises(ConvergenceError, match="Refinement"):
        solve(Dense(general(5, 5)), draw(5), Refinement(Dense(torch.eye(5, dtype=torch.float64) * 3)))
    with pytest.raises(ConvergenceError, match="tol = 1e-18"):
        solve(Dense(positive(9, 9)), draw(9), CG(tol=1e-18))


def test_without_a_method_the_class_solves():
    T, b = decaying(7), draw(7)
    assert torch.equal(solve(T, b), T.solve(b))


def test_errors_name_what_is_wrong():
    A, b = Dense(general(4, 4)), draw(4)
    with pytest.raises(ValueError, match="return_info needs a method"):
        solve(A, b, return_info=True)
    with pytest.raises(TypeError, match="A must be a structured matrix, got Tensor"):
        solve(general(4, 4), b, CG())
    with pytest.raises(TypeError, match="method must be CG, GMRES or Refinement, got str"):
        solve(A, b, "cg")
    with pytest.raises(ValueError, match="square"):
        solve(Dense(draw(3, 4)), b, GMRES())
    with pytest.raises(ValueError, match="4 rows"):
        solve(A, draw(5), GMRES())
    with pytest.raises(TypeError, match="b has dtype"):
        solve(A, b.float(), GMRES())
    with pytest.raises(ValueError, match="preconditioner must be 4 x 4, got shape"):
        solve(A, b, GMRES(preconditioner=Diagonal(torch.ones(3, dtype=torch.float64))))
    with pytest.raises(TypeError, match="preconditioner has dtype"):
        solve(A, b, GMRES(preconditioner=Diagonal(torch.ones(4))))
    with pytest.raises(TypeError, match="inverse must be real or complex"):
        solve(A, b, Refinement(Diagonal(torch.ones(4, dtype=torch.complex64))))
    with pytest.raises(TypeError, match="float32"):
        solve(A.to(torch.bfloat16), b.bfloat16(), CG())
    for call, match in (
        (lambda: CG(tol=0.0), "tol must be"),
        (lambda: GMRES(restart=0), "restart must be at least 1"),
        (lambda: CG(max_iterations=0), "max_iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="preconditioner must be a structured matrix, got Tensor"):
        CG(preconditioner=torch.ones(3))
    with pytest.raises(TypeError, match="inverse must be a structured matrix, got NoneType"):
        Refinement(None)
