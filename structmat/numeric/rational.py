"""Rational functions: Padé approximants by a Toeplitz solve, interpolants by a Cauchy-like one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from structmat._checks import check_broadcast, check_inexact, check_int, check_same, check_tensor
from structmat.matrices.displacement import CauchyLike, Toeplitz
from structmat.matrices.displacement._convolution import convolve


def pade(coefficients: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """The Padé approximant p/q of a power series, ``q(z) c(z) - p(z) = O(z^(m + n + 1))`` with q(0) = 1.

    The denominator solves an n x n Toeplitz system (of Hankel type in the reverse order). It is ill-conditioned for
    large n, and singular where the table of approximants has a block: take smaller m and n then. Source: Baker,
    Graves-Morris 1996, "Padé approximants", section 1.1.

    Args:
        coefficients: of the series, shape (*batch, m + n + 1) or longer, of which the rest is not used; float32,
            float64 or complex.
        m: degree of the numerator, at least 0.
        n: degree of the denominator, at least 0. (``scipy.interpolate.pade(c, n, m)`` has them in the other order.)

    Returns:
        Numerator p, shape (*batch, m + 1), and denominator q, shape (*batch, n + 1), constant terms first.

    Raises:
        TypeError: if coefficients is no tensor of these dtypes, or m or n no integer.
        ValueError: if m or n is negative, or there are too few coefficients.
        torch.linalg.LinAlgError: if the system is singular to double precision.

    Example:
        >>> import torch
        >>> from structmat.numeric import pade
        >>> p, q = pade(torch.tensor([1.0, 1.0, 1 / 2, 1 / 6, 1 / 24]), 2, 2)  # of exp
        >>> p.round(decimals=4), q.round(decimals=4)
        (tensor([1.0000, 0.5000, 0.0833]), tensor([ 1.0000, -0.5000,  0.0833]))
    """
    check_tensor("coefficients", coefficients, 1)
    check_inexact("coefficients", coefficients)
    check_int("m", m, 0)
    check_int("n", n, 0)
    if coefficients.shape[-1] < m + n + 1:
        raise ValueError(f"coefficients must be at least m + n + 1 = {m + n + 1}, got {coefficients.shape[-1]}")
    c = coefficients
    q = torch.ones_like(c[..., :1])
    if n:
        # sum_j c[m + i - j] q[j] = 0 for i = 1, ..., n; c of negative index is zero.
        diagonals = torch.nn.functional.pad(c, (n, 0))[..., m + 1 : m + 2 * n]
        tail = Toeplitz.from_diagonals(diagonals, n).solve(-c[..., m + 1 : m + n + 1].unsqueeze(-1))
        q = torch.cat([q, tail.squeeze(-1)], -1)
    return convolve(q, c, m + 1), q


@dataclasses.dataclass(frozen=True)
class RationalFunction:
    """``r(z) = sum_j w_j f_j / (z - z_j) / sum_j w_j / (z - z_j)``, with the value f_j at the support z_j.

    Attributes:
        support: shape (*batch, n + 1).
        values: shape (*batch, n + 1).
        weights: shape (*batch, n + 1).
    """

    support: Tensor
    values: Tensor
    weights: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Values (*batch, k) at z (*batch, k)."""
        difference = z.unsqueeze(-1) - self.support.unsqueeze(-2)
        hit = difference == 0
        terms = self.weights.unsqueeze(-2) / torch.where(hit, 1, difference)
        terms = torch.where(hit.any(-1, keepdim=True), hit.to(terms.dtype), terms)  # on a support point, its value
        return (terms * self.values.unsqueeze(-2)).sum(-1) / terms.sum(-1)


def rational_interpolation(nodes: Tensor, values: Tensor) -> RationalFunction:
    """The rational function of degrees (n, n) through 2 n + 1 points, in barycentric form.

    Every other node is a support, from the first on. The others make n conditions on the weights, whose Loewner matrix
    ``(f_i - f_j) / (z_i - z_j)`` is Cauchy-like of rank 2: O(n^2). Nodes in order along a curve make it well
    conditioned. Values of a rational function of lower degree leave the weights undetermined: take fewer points.
    Source: Antoulas, Anderson 1986, "On the scalar rational interpolation problem"; Berrut, Trefethen 2004.

    Args:
        nodes: distinct, an odd number of them, shape (*batch, 2 n + 1), float32, float64 or complex.
        values: shape (*batch, 2 n + 1), same dtype and device; batches broadcast.

    Returns:
        The function, to be called with points.

    Raises:
        TypeError: if an argument is no tensor of these dtypes, or dtypes differ.
        ValueError: if sizes, batches or devices do not match, there is an even number, or a node of odd index is also
            one of even index (seen on the CPU).
        torch.linalg.LinAlgError: if the weights are not determined to double precision.

    Example:
        >>> import torch
        >>> from structmat.numeric import rational_interpolation
        >>> r = rational_interpolation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1 / 2, 1 / 3]))
        >>> r(torch.tensor([3.0, 4.0]))  # 1 / (1 + z)
        tensor([0.2500, 0.2000])
    """
    for name, value in (("nodes", nodes), ("values", values)):
        check_tensor(name, value, 1)
        check_inexact(name, value)
    check_same("values", values, "nodes", nodes)
    check_broadcast("values", values.shape[:-1], "nodes", nodes.shape[:-1])
    count = nodes.shape[-1]
    if values.shape[-1] != count or count % 2 == 0:
        raise ValueError(
            f"nodes and values must be 2 n + 1 each, got shapes {tuple(nodes.shape)} and {tuple(values.shape)}"
        )
    support, f, s, g = nodes[..., ::2], values[..., ::2], nodes[..., 1::2], values[..., 1::2]
    weights = torch.ones_like(f[..., -1:] + support[..., -1:])
    if count > 1:
        left, right = torch.stack([g, torch.ones_like(g)], -1), torch.stack([torch.ones_like(f), -f], -1)
        L = CauchyLike(s, support[..., :-1], left, right[..., :-1, :])
        last = (g - f[..., -1:]) / (s - support[..., -1:])
        weights = torch.cat([L.solve(-last.unsqueeze(-1)).squeeze(-1), weights], -1)
    return RationalFunction(support, f, weights)
