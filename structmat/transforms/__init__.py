"""Named transforms as structured matrices that equal the dense ones to rounding.

Names, arguments and conventions are those of ``scipy.fft``, ``scipy.linalg``, ``numpy`` and ``torch.nn.functional``.
Real transforms have real factors. Constants are computed in double precision and rounded once to ``dtype``.
"""

from structmat.transforms.convolution import circulant, convolution, hankel, toeplitz
from structmat.transforms.convolution2d import conv2d
from structmat.transforms.fourier import czt, dft, dft2, fractional_dft, hartley, idft, idft2
from structmat.transforms.permutations import bit_reversal, digit_reversal, even_odd, reversal, stride_permutation
from structmat.transforms.selection import Selection
from structmat.transforms.trigonometric import (
    chebyshev_coefficients,
    chebyshev_values,
    dct,
    dst,
    idct,
    idst,
)
from structmat.transforms.walsh import hadamard
from structmat.transforms.wavelets import daubechies, daubechies_filter, haar

__all__ = [
    "Selection",
    "bit_reversal",
    "chebyshev_coefficients",
    "chebyshev_values",
    "circulant",
    "conv2d",
    "convolution",
    "czt",
    "daubechies",
    "daubechies_filter",
    "dct",
    "dft",
    "dft2",
    "digit_reversal",
    "dst",
    "even_odd",
    "fractional_dft",
    "haar",
    "hadamard",
    "hankel",
    "hartley",
    "idct",
    "idft",
    "idft2",
    "idst",
    "reversal",
    "stride_permutation",
    "toeplitz",
]
