"""Exact members of the kaleidoscope hierarchy: fast transforms as :class:`~structmat.Kaleidoscope` matrices.

Names, arguments and conventions are those of :mod:`structmat.transforms`. Width and expansion of each are in its text;
sizes without prime factors above 7 need no padding. Constants are computed in double precision and rounded once.
"""

from structmat.kaleidoscopes.fourier import dct, dft, dst, idct, idft, idst
from structmat.kaleidoscopes.members import acdc, circulant, fastfood, hadamard, permutation, toeplitz

__all__ = [
    "acdc",
    "circulant",
    "dct",
    "dft",
    "dst",
    "fastfood",
    "hadamard",
    "idct",
    "idft",
    "idst",
    "permutation",
    "toeplitz",
]
