"""Iterative solvers on the protocol, as values: ``solve(A, b, CG(tol=1e-8))``."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix, matrix, static
from structmat.linalg.implicit import implicit_solve
from structmat.linalg.krylov import Apply, Cycle, cg_cycle, gmres_cycle, iterate


class ConvergenceError(RuntimeError):
    """An iterative solver stopped short of its tolerance.

    Attributes:
        iterations: how many it took.
        residual: the largest relative residual ``|b - A x| / |b|`` that it left.
    """

    def __init__(self, message: str, iterations: int, residual: float) -> None:
        super().__init__(message)
        self.iterations, self.residual = iterations, residual


@dataclasses.dataclass(frozen=True)
class SolveInfo:
    """What a solve took.

    Attributes:
        iterations: of the column that took most.
        residuals: ``|b - A x| / |b|`` of each column, computed from x: shape (*batch, k), of a vector (*batch,).
    """

    iterations: int
    residuals: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Method:
    """An algorithm with its numbers. ``_aid`` names the field that holds a matrix."""

    _aid: ClassVar[str] = "preconditioner"

    def __post_init__(self) -> None:
        numbers: Any = self
        tol = numbers.tol
        if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < math.inf):
            raise ValueError(f"tol must be a positive number or None, got {tol!r}")
        check_int("max_iterations", numbers.max_iterations)
        aid = getattr(self, self._aid)
        if aid is not None and not isinstance(aid, StructuredMatrix):
            raise TypeError(f"{self._aid} must be a structured matrix, got {type(aid).__name__}")

    def _check(self, A: StructuredMatrix, aid: StructuredMatrix) -> None:
        if aid.shape[-2:] != A.shape[-2:]:
            raise ValueError(f"{self._aid} must be {A.shape[-2]} x {A.shape[-1]}, got shape {tuple(aid.shape)}")
        if aid.device != A.device:
            raise ValueError(f"{self._aid} is on {aid.device} but the matrix is on {A.device}")
        if aid.dtype != A.dtype:
            raise TypeError(f"{self._aid} has dtype {aid.dtype} but the matrix has {A.dtype}; use .to({A.dtype})")

    def _cycle(self, product: Apply, aid: StructuredMatrix | None) -> Cycle:
        raise NotImplementedError


def _preconditioning(P: StructuredMatrix | None) -> Apply:
    return (lambda rows: rows) if P is None else (lambda rows: P._solve(rows.mT).mT)


@dataclasses.dataclass(frozen=True, eq=False)
class CG(_Method):
    """Conjugate gradients, for Hermitian positive definite matrices.

    An iteration is a product with A and a solve with the preconditioner; k columns share both, and each has its own
    coefficients and stops by itself. Convergence is decided by the residual computed from the solution. Source:
    Hestenes, Stiefel 1952.

    Args:
        tol: largest ``|b - A x| / |b|`` of every column; by default 1e-10, in single precision 1e-5.
        max_iterations: at least 1.
        preconditioner: Hermitian positive definite, of A's shape and dtype, near A and fast to solve with, such as
            ``Circulant.from_toeplitz(T)``. Used for its value: no gradient reaches it.

    Example:
        >>> import torch, structmat
        >>> from structmat.linalg import CG, solve
        >>> T = structmat.Toeplitz(0.5 ** torch.arange(1000, dtype=torch.float64))
        >>> method = CG(preconditioner=structmat.Circulant.from_toeplitz(T))
        >>> x, info = solve(T, torch.ones(1000, dtype=torch.float64), method, return_info=True)
        >>> info.iterations < 10
        True
    """

    tol: float | None = None
    max_iterations: int = 1000
    preconditioner: StructuredMatrix | None = None

    def _cycle(self, product: Apply, aid: StructuredMatrix | None) -> Cycle:
        return cg_cycle(product, _preconditioning(aid))


@dataclasses.dataclass(frozen=True, eq=False)
class GMRES(_Method):
    """Generalised minimal residuals, restarted, for any square matrix.

    Preconditioned from the right, so that the residual that is minimised is that of the solution. An iteration is a
    product with A and a solve with the preconditioner, and twice the orthogonalisation against the vectors since the
    last restart, (restart + 1) k n numbers of memory; k columns have their own spaces. Source: Saad, Schultz 1986.

    Args:
        tol: largest ``|b - A x| / |b|`` of every column; by default 1e-10, in single precision 1e-5.
        restart: iterations before a restart, at least 1.
        max_iterations: of all restarts together, at least 1.
        preconditioner: of A's shape and dtype, near A and fast to solve with. No gradient reaches it.

    Example:
        >>> import torch, structmat
        >>> from structmat.linalg import GMRES, solve
        >>> A = structmat.Dense(torch.eye(3) + 0.1 * torch.ones(3, 3).tril())
        >>> solve(A, A @ torch.ones(3), GMRES())
        tensor([1.0000, 1.0000, 1.0000])
    """

    tol: float | None = None
    restart: int = 50
    max_iterations: int = 1000
    preconditioner: StructuredMatrix | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("restart", self.restart)

    def _cycle(self, product: Apply, aid: StructuredMatrix | None) -> Cycle:
        return gmres_cycle(product, _preconditioning(aid), self.restart)


@dataclasses.dataclass(frozen=True, eq=False)
class Refinement(_Method):
    """Iterative refinement, ``x += inverse (b - A x)`` until the residual is small: any square matrix.

    ``inverse`` may have less precision than A: float32 factors then give float64 residuals, since only the residual
    is computed with A. A step multiplies the error by about ``|I - inverse A|``, which must be below 1: in float32 for
    condition numbers up to about 1e6. Source: Wilkinson 1963; Higham 2002, "Accuracy and stability of numerical
    algorithms", chapter 12.

    Args:
        inverse: an approximate inverse, of A's shape and of any precision, such as ``A.to(torch.float32).inverse()``.
            No gradient reaches it.
        tol: largest ``|b - A x| / |b|`` of every column; by default 1e-10, in single precision 1e-5.
        max_iterations: at least 1.

    Example:
        >>> import torch, structmat
        >>> from structmat.linalg import Refinement, solve
        >>> A = structmat.Dense(torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64))
        >>> method = Refinement(A.to(torch.float32).inverse(), tol=1e-14)
        >>> x, info = solve(A, torch.ones(2, dtype=torch.float64), method, return_info=True)
        >>> bool(info.residuals <= 1e-14)
        True
    """

    _aid: ClassVar[str] = "inverse"

    inverse: StructuredMatrix | None
    tol: float | None = None
    max_iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inverse is None:
            raise TypeError("inverse must be a structured matrix, got NoneType")

    def _check(self, A: StructuredMatrix, aid: StructuredMatrix) -> None:
        if aid.dtype.is_complex != A.dtype.is_complex:
            raise TypeError(f"inverse must be real or complex as the matrix is, {A.dtype}, got {aid.dtype}")
        super()._check(A, aid.to(A.dtype))

    def _cycle(self, product: Apply, aid: StructuredMatrix | None) -> Cycle:
        assert aid is not None

        def cycle(r: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, int]:
            size = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
            unit = r / torch.where(size > 0, size, 1)  # a small residual must not vanish in less precision
            return aid._linear(unit.to(aid.dtype)).to(r.dtype) * size, 1

        return cycle


Method = CG | GMRES | Refinement


@matrix
class _Iterated(StructuredMatrix):
    """``base`` with an iterative method for its solver: transposes carry the method along, as derivatives need."""

    base: StructuredMatrix
    aids: tuple[StructuredMatrix, ...]
    method: Any = static()
    record: Any = static(default=None)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def _linear(self, x: Tensor) -> Tensor:
        return self.base._linear(x)

    @property
    def mT(self) -> StructuredMatrix:
        return _Iterated(self.base.mT, tuple(P.mT for P in self.aids), self.method)

    def conj(self) -> Any:
        return _Iterated(self.base.conj(), tuple(P.conj() for P in self.aids), self.method)

    def _solve(self, b: Tensor) -> Tensor:
        return implicit_solve(self, b, _run)


def _run(A: _Iterated, b: Tensor) -> Tensor:
    with torch.autocast(A.device.type, enabled=False):  # whose products would end far from any tolerance
        return _converge(A, b)


def _converge(A: _Iterated, b: Tensor) -> Tensor:
    method = A.method
    tol = method.tol or (1e-10 if torch.finfo(A.dtype).bits == 64 else 1e-5)
    rows = b.mT.expand(*torch.broadcast_shapes(b.shape[:-2], A.batch_shape), *b.mT.shape[-2:])
    cycle = method._cycle(A.base._linear, A.aids[0] if A.aids else None)
    x, count, residuals, reason = iterate(A.base._linear, cycle, rows, tol, method.max_iterations)
    worst = float(residuals.max()) if residuals.numel() else 0.0
    if not worst <= tol:
        raise ConvergenceError(
            f"{type(method).__name__} stopped after {count} iterations with a relative residual of {worst:.2g}, "
            f"tol = {tol:.2g}: {reason}",
            count,
            worst,
        )
    if A.record is not None:
        A.record.append(SolveInfo(count, residuals))
    return x.mT


def solve(A: StructuredMatrix, b: Tensor, method: Method | None = None, *, return_info: bool = False) -> Any:
    """``A^-1 b`` by a chosen method.

    Derivatives with respect to A and b, of every order, are those of the exact solution (implicit-function theorem):
    a backward pass solves with ``A.H`` by the same method and the conjugate transpose of its preconditioner.

    Args:
        A: square, shape (*batch, n, n).
        b: shape (n,) or (*batch, n) where batch is exactly the matrix's, else (*batch, n, k); dtype and device of A.
        method: :class:`CG`, :class:`GMRES` or :class:`Refinement`; None takes the class's own ``A.solve(b)``.
        return_info: whether to return a :class:`SolveInfo` as well; needs a method.

    Returns:
        The solution, of b's shape (with broadcast batch); with ``return_info`` a pair.

    Raises:
        ConvergenceError: if a column's relative residual stays above ``tol``.
        ValueError: if A is not square, sizes, batches or devices do not match, or there is no info to return.
        TypeError: if dtypes differ, the dtype is float16 or bfloat16, or an argument is none of these.

    Example:
        >>> import torch, structmat
        >>> from structmat.linalg import GMRES, solve
        >>> T = structmat.Toeplitz(torch.tensor([4.0, 1.0, 0.5]), torch.tensor([4.0, 2.0, 1.0]))
        >>> solve(T, T @ torch.ones(3, 2), GMRES()).round(decimals=3)
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """
    if not isinstance(A, StructuredMatrix):
        raise TypeError(f"A must be a structured matrix, got {type(A).__name__}; for a tensor write structmat.Dense(A)")
    if method is None:
        if return_info:
            raise ValueError("return_info needs a method: a direct solver has no iterations")
        return A.solve(b)
    if not isinstance(method, _Method):
        raise TypeError(f"method must be CG, GMRES or Refinement, got {type(method).__name__}")
    A._check_factorisable("solve")
    aid = getattr(method, method._aid)
    if aid is not None:
        method._check(A, aid)
    record: list[SolveInfo] = []
    bare = copy.copy(method)
    object.__setattr__(bare, method._aid, None)  # its tensors are no part of the static fields
    x = _Iterated(A, () if aid is None else (aid.detach(),), bare, record if return_info else None).solve(b)
    if not return_info:
        return x
    info = record[0]
    vector = info.residuals.ndim == x.ndim  # b was one, and the solver saw one column
    return x, SolveInfo(info.iterations, info.residuals.squeeze(-1)) if vector else info
