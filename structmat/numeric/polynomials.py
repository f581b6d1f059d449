"""Polynomials by their coefficients, constant term first, in the last dimension; other dimensions broadcast."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_same, check_tensor
from structmat.matrices.displacement import CausalToeplitz, Vandermonde
from structmat.matrices.displacement._convolution import convolve
from structmat.matrices.displacement._nodes import check_nodes


def _check(one: str, a: Tensor, two: str, b: Tensor) -> None:
    for name, value in ((one, a), (two, b)):
        check_tensor(name, value, 1)
        check_inexact(name, value)
        if value.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one entry, got shape {tuple(value.shape)}")
    check_same(two, b, one, a)
    check_broadcast(two, b.shape[:-1], one, a.shape[:-1])


def polynomial_multiply(a: Tensor, b: Tensor) -> Tensor:
    """The coefficients of a(z) b(z): a product with a Toeplitz matrix, three FFTs.

    Args:
        a: shape (*batch, p), constant term first, floating point or complex.
        b: shape (*batch, q), same dtype and device; batches broadcast.

    Returns:
        Shape (*batch, p + q - 1).

    Raises:
        TypeError: if an argument is no floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty, or batches or devices do not match.

    Example:
        >>> import torch
        >>> from structmat.numeric import polynomial_multiply
        >>> polynomial_multiply(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])).round(decimals=4)
        tensor([1., 3., 5., 3.])
    """
    _check("a", a, "b", b)
    return convolve(a, b, a.shape[-1] + b.shape[-1] - 1)


def polynomial_divide(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and remainder: ``a = q b + r`` with deg r < deg b.

    The reversed quotient is the power series of the reversed polynomials' quotient, a solve with a triangular Toeplitz
    matrix, O(n log n). As in long division, errors grow exponentially with the length of the quotient where b has roots
    outside of the unit circle. Source: Aho, Hopcroft, Ullman 1974, section 8.3.

    Args:
        a: shape (*batch, p), constant term first, floating point or complex.
        b: shape (*batch, q), its last coefficient not zero; same dtype and device; batches broadcast.

    Returns:
        Quotient, shape (*batch, max(p - q, 0) + 1), and remainder, shape (*batch, max(q - 1, 1)).

    Raises:
        TypeError: if an argument is no floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty, or batches or devices do not match.
        torch.linalg.LinAlgError: if the last coefficient of b is zero (seen on the CPU).

    Example:
        >>> import torch
        >>> from structmat.numeric import polynomial_divide
        >>> q, r = polynomial_divide(torch.tensor([5.0, 3.0, 5.0, 3.0]), torch.tensor([1.0, 1.0]))
        >>> q.round(decimals=4), r.round(decimals=4)
        (tensor([1., 2., 3.]), tensor([4.]))
    """
    _check("a", a, "b", b)
    p, q = a.shape[-1], b.shape[-1]
    degree, size = max(p - q, 0), max(q - 1, 1)
    padded = torch.nn.functional.pad(a, (0, max(q - p, 0)))
    # Reversed, and cut or filled with zeros to the length of the quotient.
    top, divisor = (torch.nn.functional.pad(t.flip(-1), (0, degree))[..., : degree + 1] for t in (padded, b))
    quotient = CausalToeplitz(divisor).solve(top.unsqueeze(-1)).squeeze(-1).flip(-1)
    rest = torch.nn.functional.pad(padded, (0, size))[..., :size] - convolve(quotient, b, size)
    return quotient, rest if q > 1 else torch.zeros_like(rest)


def polynomial_evaluate(coefficients: Tensor, nodes: Tensor) -> Tensor:
    """The polynomial's values: a product with a Vandermonde matrix, O(m n) operations and O(m) memory.

    Args:
        coefficients: shape (*batch, n), constant term first, floating point or complex.
        nodes: shape (*batch, m), same dtype and device; batches broadcast.

    Returns:
        Shape (*batch, m).

    Raises:
        TypeError: if an argument is no floating-point or complex tensor, or dtypes differ.
        ValueError: if one is empty, or batches or devices do not match.

    Example:
        >>> import torch
        >>> from structmat.numeric import polynomial_evaluate
        >>> polynomial_evaluate(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 3.0]))
        tensor([ 1.,  3., 19.])
    """
    _check("coefficients", coefficients, "nodes", nodes)
    # Without the constructor's warning: values are accurate where coefficients from values would not be.
    V = Vandermonde._rebuild((nodes,), (coefficients.shape[-1], nodes.dtype))
    return V._linear(coefficients.unsqueeze(-2)).squeeze(-2)


def polynomial_interpolate(nodes: Tensor, values: Tensor) -> Tensor:
    """The coefficients of the polynomial of degree n - 1 with these values: a solve with a Vandermonde matrix, O(n^2).

    Its condition number grows exponentially with n but for nodes spread on the unit circle; where the dtype cannot
    resolve it the constructor warns with the number. Source: Bjorck, Pereyra 1970.

    Args:
        nodes: distinct, shape (*batch, n), float32, float64 or complex.
        values: shape (*batch, n), same dtype and device; batches broadcast.

    Returns:
        Coefficients (*batch, n), constant term first.

    Raises:
        TypeError: if an argument is no tensor of these dtypes, or dtypes differ.
        ValueError: if sizes, batches or devices do not match.
        torch.linalg.LinAlgError: if two nodes are equal (seen on the CPU).

    Example:
        >>> import torch
        >>> from structmat.numeric import polynomial_interpolate
        >>> polynomial_interpolate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 5.0, 10.0]))
        tensor([1., 0., 1.])
    """
    check_nodes("nodes", nodes)
    _check("nodes", nodes, "values", values)
    if nodes.shape[-1] != values.shape[-1]:
        raise ValueError(f"values must be as many as nodes, {nodes.shape[-1]}, got shape {tuple(values.shape)}")
    return Vandermonde(nodes, nodes.shape[-1]).solve(values.unsqueeze(-1)).squeeze(-1)
