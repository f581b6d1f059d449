"""Toeplitz systems: square, tall, and those of autoregressive models."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_int, check_same, check_tensor
from structmat.linalg.implicit import implicit_solve
from structmat.matrices.displacement import Toeplitz, ToeplitzLike
from structmat.matrices.displacement._convolution import LinAlgError, values_visible


def toeplitz_solve(column: Tensor, row: Tensor | None, b: Tensor) -> Tensor:
    """``T^-1 b`` for the square Toeplitz matrix of this first column and row, as ``scipy.linalg.solve_toeplitz``.

    By ``Toeplitz(column, row).solve(b)``, see :class:`structmat.Toeplitz`: iterations where they are quick, else
    elimination with pivoting, both backward stable, unlike Levinson's recursion.

    Args:
        column: shape (*batch, n), float32, float64 or complex.
        row: shape (*batch, n), its first entry ignored; None for the column's conjugate.
        b: shape (n,) or (*batch, n) where batch is exactly the matrix's, else (*batch, n, k).

    Returns:
        The solution, of b's shape (with broadcast batch).

    Raises:
        TypeError: if an argument is no tensor of these dtypes, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.
        torch.linalg.LinAlgError: if the matrix is singular to double precision.

    Example:
        >>> import torch
        >>> from structmat.numeric import toeplitz_solve
        >>> toeplitz_solve(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([2.0, 3.0]))
        tensor([3., 1.])
    """
    return Toeplitz(column, row).solve(b)


def toeplitz_lstsq(T: Toeplitz, b: Tensor) -> Tensor:
    """The x of least ``|T x - b|`` for a tall Toeplitz matrix of full column rank.

    ``T^H T`` is Toeplitz-like of rank 4: the normal equations are eliminated in O(n^2) after products in O(m log m), in
    double precision, and the solution is refined once by its residual. Squaring the condition number limits that of T
    to about 1e6; below, the error is near that of a QR factorisation ("corrected seminormal equations", Björck 1987).

    Args:
        T: shape (*batch, m, n), m >= n, float32, float64 or complex.
        b: shape (m,) or (*batch, m) where batch is exactly the matrix's, else (*batch, m, k).

    Returns:
        Shape (n,), (*batch, n) or (*batch, n, k). Derivatives of every order reach T and b.

    Raises:
        TypeError: if T is no Toeplitz matrix, b no tensor, or dtypes differ.
        ValueError: if T is wide, or sizes, batches or devices do not match.
        torch.linalg.LinAlgError: if ``T^H T`` is singular to double precision.

    Example:
        >>> import torch, structmat
        >>> from structmat.numeric import toeplitz_lstsq
        >>> T = structmat.Toeplitz(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0]))
        >>> toeplitz_lstsq(T, T @ torch.tensor([1.0, -1.0])).round(decimals=4)
        tensor([ 1., -1.])
    """
    if not isinstance(T, Toeplitz):
        raise TypeError(f"T must be a structmat.Toeplitz, got {type(T).__name__}")
    m, n = T.shape[-2:]
    if m < n:
        raise ValueError(f"T must have at least as many rows as columns, got shape {tuple(T.shape)}")
    check_tensor("b", b, 1)
    vector = b.ndim == 1 or b.shape == T.shape[:-1]
    wide = torch.complex128 if T.dtype.is_complex else torch.float64
    check_same("b", b, "the matrix", T.diagonals)
    columns, A = (b.unsqueeze(-1) if vector else b).to(wide), T.to(wide)
    if columns.shape[-2] != m:
        raise ValueError(f"b must have {m} rows, got shape {tuple(b.shape)}")
    adjoint = A.mT.conj()
    # Under (Z_1, Z_0) and (Z_0, Z_-1), whose product has (Z_1, Z_-1) whatever the sizes.
    left, right = adjoint.to_ldr(1.0, 0.0), A.to_ldr(0.0, -1.0)
    G = torch.cat([left.left, adjoint.matmul(right.left)], -1)
    H = torch.cat([A.mT.matmul(left.right), right.right], -1)
    gram = ToeplitzLike(G, H, 1.0, -1.0)
    x = gram.solve(adjoint.matmul(columns))
    x = x + gram.solve(adjoint.matmul(columns - A.matmul(x)))
    return (x.squeeze(-1) if vector else x).to(T.dtype)


def levinson(column: Tensor, row: Tensor | None, b: Tensor) -> Tensor:
    """``T^-1 b`` by Levinson's recursion, n steps of O(n) operations each.

    Safe for Hermitian positive definite matrices and others whose leading minors are all well conditioned; where one of
    them is nearly singular its digits are lost without notice. :func:`toeplitz_solve` has no such condition, and is
    quicker from a few hundred on. Source: Levinson 1947; Bunch 1985, "Stability of methods for solving Toeplitz systems
    of equations".

    Args:
        column: shape (*batch, n), float32, float64 or complex.
        row: shape (*batch, n), its first entry ignored; None for the column's conjugate.
        b: shape (n,) or (*batch, n) where batch is exactly the matrix's, else (*batch, n, k).

    Returns:
        The solution, of b's shape (with broadcast batch). Derivatives are those of the exact solution.

    Raises:
        TypeError: if an argument is no tensor of these dtypes, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.
        torch.linalg.LinAlgError: if a leading minor is zero (seen on the CPU).

    Example:
        >>> import torch
        >>> from structmat.numeric import levinson
        >>> levinson(torch.tensor([2.0, 1.0]), None, torch.tensor([3.0, 0.0]))
        tensor([ 2., -1.])
    """
    T = Toeplitz(column, row)
    T._check_factorisable("levinson")
    check_tensor("b", b, 1)
    check_same("b", b, "column", column)
    vector = b.ndim == 1 or b.shape == T.shape[:-1]
    columns = b.unsqueeze(-1) if vector else b
    if columns.shape[-2] != T.shape[-1]:
        raise ValueError(f"b must have {T.shape[-1]} rows, got shape {tuple(b.shape)}")
    check_broadcast("b", columns.shape[:-2], "column", T.batch_shape)
    x = implicit_solve(T, columns, _recursion)
    return x.squeeze(-1) if vector else x


def _recursion(T: Toeplitz, b: Tensor) -> Tensor:
    t, b, n = T.diagonals.unsqueeze(-2), b.mT, T.shape[-1]
    f = g = t[..., n - 1 : n].reciprocal()  # T_k f and T_k g are the first and the last unit vector
    x = b[..., :1] * f
    pad = torch.nn.functional.pad
    for k in range(1, n):
        above, below = t[..., n - 1 - k : n - 1], t[..., n : n + k].flip(-1)  # t_-k, ..., t_-1 and t_k, ..., t_1
        down, up = (below * f).sum(-1, keepdim=True), (above.flip(-1) * g).sum(-1, keepdim=True)
        scale = (1 - down * up).reciprocal()
        longer, later = pad(f, (0, 1)), pad(g, (1, 0))
        f, g = scale * (longer - down * later), scale * (later - up * longer)
        x = pad(x, (0, 1)) + (b[..., k : k + 1] - (below * x).sum(-1, keepdim=True)) * g
    if values_visible(x) and not bool(x.isfinite().all()):
        raise LinAlgError("a leading minor of the Toeplitz matrix is zero: use toeplitz_solve, which pivots")
    return x.mT


@dataclasses.dataclass(frozen=True)
class AutoregressiveModel:
    """``x_t = sum_j coefficients[j - 1] x_(t-j) + e_t``.

    Attributes:
        coefficients: shape (*batch, order).
        reflection: the last coefficient of the model of each order, the partial autocorrelations: (*batch, order).
        variance: of e_t, real, shape (*batch,).
    """

    coefficients: Tensor
    reflection: Tensor
    variance: Tensor


def levinson_durbin(autocorrelation: Tensor, order: int | None = None) -> AutoregressiveModel:
    """The autoregressive model of an autocorrelation, by the Yule-Walker equations ``sum_j a_j r_(i-j) = r_i``.

    O(order^2) operations; derivatives of every order. Source: Durbin 1960; Brockwell, Davis 1991, section 5.2.

    Args:
        autocorrelation: ``r_k``, the mean of ``x_t conj(x_(t-k))``, k = 0, 1, ...: shape (*batch, order + 1) or longer,
            float32, float64 or complex. It must be positive definite, as estimates with the factor 1 / n are.
        order: at least 1; by default one less than there are numbers.

    Returns:
        Coefficients, reflection coefficients (of modulus below 1) and the variance of the error.

    Raises:
        TypeError: if autocorrelation is no tensor of these dtypes, or order no integer.
        ValueError: if order is not from 1 to one less than there are numbers.
        torch.linalg.LinAlgError: if the autocorrelation is not positive definite (seen on the CPU).

    Example:
        >>> import torch
        >>> from structmat.numeric import levinson_durbin
        >>> model = levinson_durbin(torch.tensor([1.0, 0.5, 0.25]))
        >>> model.coefficients, model.variance
        (tensor([0.5000, 0.0000]), tensor(0.7500))
    """
    check_tensor("autocorrelation", autocorrelation, 1)
    check_inexact("autocorrelation", autocorrelation)
    r, most = autocorrelation, autocorrelation.shape[-1] - 1
    order = check_int("order", most if order is None else order)
    if order > most:
        raise ValueError(f"order must be at most {most} for {most + 1} autocorrelations, got {order}")
    variance, a = r[..., 0].real if r.is_complex() else r[..., 0], r[..., :0]
    reflection, variances = [], [variance]
    for m in range(1, order + 1):
        k = (r[..., m] - (a * r[..., 1:m].flip(-1)).sum(-1)) / variance
        reflection.append(k)
        a = torch.cat([a - k.unsqueeze(-1) * a.conj().flip(-1), k.unsqueeze(-1)], -1)
        variance = variance * (1 - (k * k.conj()).real)
        variances.append(variance)
    if values_visible(variance) and not bool((torch.stack(variances) > 0).all()):
        raise LinAlgError("the autocorrelation is not positive definite: an error variance is not positive")
    return AutoregressiveModel(a, torch.stack(reflection, -1), variance)
