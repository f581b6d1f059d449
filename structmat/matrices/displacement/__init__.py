"""Matrices of displacement structure."""

from structmat.matrices.displacement.cauchy import Cauchy
from structmat.matrices.displacement.cauchy_like import CauchyLike, VandermondeLike
from structmat.matrices.displacement.causal_toeplitz import CausalToeplitz
from structmat.matrices.displacement.circulant import Circulant
from structmat.matrices.displacement.companion import Companion
from structmat.matrices.displacement.eigenvectors import ShiftEigenvectors
from structmat.matrices.displacement.hankel import Hankel
from structmat.matrices.displacement.krylov import LDRSubdiagonal, LDRTridiagonal
from structmat.matrices.displacement.krylov_matrix import krylov, shift_power
from structmat.matrices.displacement.ldr import LDR
from structmat.matrices.displacement.operators import Shift
from structmat.matrices.displacement.toeplitz import Toeplitz
from structmat.matrices.displacement.toeplitz_like import HankelLike, ToeplitzLike
from structmat.matrices.displacement.vandermonde import ConditioningWarning, Vandermonde

__all__ = [
    "LDR",
    "Cauchy",
    "CauchyLike",
    "CausalToeplitz",
    "Circulant",
    "Companion",
    "ConditioningWarning",
    "Hankel",
    "HankelLike",
    "LDRSubdiagonal",
    "LDRTridiagonal",
    "Shift",
    "ShiftEigenvectors",
    "Toeplitz",
    "ToeplitzLike",
    "Vandermonde",
    "VandermondeLike",
    "krylov",
    "shift_power",
]
