"""Numerical tools on matrices of displacement structure."""

from structmat.numeric.polynomials import (
    polynomial_divide,
    polynomial_evaluate,
    polynomial_interpolate,
    polynomial_multiply,
)
from structmat.numeric.rational import RationalFunction, pade, rational_interpolation
from structmat.numeric.toeplitz import AutoregressiveModel, levinson, levinson_durbin, toeplitz_lstsq, toeplitz_solve

__all__ = [
    "AutoregressiveModel",
    "RationalFunction",
    "levinson",
    "levinson_durbin",
    "pade",
    "polynomial_divide",
    "polynomial_evaluate",
    "polynomial_interpolate",
    "polynomial_multiply",
    "rational_interpolation",
    "toeplitz_lstsq",
    "toeplitz_solve",
]
