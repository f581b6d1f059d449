"""From products of Chebyshev polynomials of the digits to Chebyshev polynomials of the index, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def _twist(x: Tensor) -> Tensor:
    """Odd rows J of (..., J, d, w) negated and reversed over d: its own inverse."""
    odd = torch.arange(x.shape[-3], device=x.device)[:, None, None] % 2 == 1
    return torch.where(odd, -x.flip(-2), x)


def _level(x: Tensor, transposed: bool, inverse: bool) -> Tensor:
    """``y[J, d] = x[J, d] + x[J + 1, n - d]`` for d >= 1: tau_d(Y) tau_J(T_n(Y)) = tau_{J n + d} + tau_{J n - d}."""
    first, body = x[..., :1, :], x[..., 1:, :]
    if not inverse and transposed:
        body = body + pad(body[..., :-1, :, :].flip(-2), (0, 0, 0, 0, 1, 0))
    elif not inverse:
        body = body + pad(body[..., 1:, :, :].flip(-2), (0, 0, 0, 0, 0, 1))
    elif transposed:
        body = _twist(_twist(body).cumsum(-3))
    else:
        body = _twist(_twist(body).flip(-3).cumsum(-3).flip(-3))
    return torch.cat([first, body], -2)


def echo(x: Tensor, radix: Sequence[int], transposed: bool = False, inverse: bool = False) -> Tensor:
    """K x over the last dimension, K unit upper triangular with ``prod_a tau_{j_a}(Y_a) = sum_i K[i, j] tau_i(Z)``.

    tau_0 = 1, tau_d = 2 T_d, Y_a = T_{w_a}(Z). At most N (p - 1) additions. Norms: |K| <= 2^(p-1), and |K^-1| is at
    most the product over the levels of the number of values of the digits above.
    """
    levels = range(len(radix) - 1) if transposed != inverse else range(len(radix) - 2, -1, -1)
    for a in levels:
        digits = (math.prod(radix[a + 1 :]), radix[a], math.prod(radix[:a]))
        x = _level(x.unflatten(-1, digits), transposed, inverse).flatten(-3)
    return x
