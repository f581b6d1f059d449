"""The families of structured matrices."""

from structmat.matrices.block_diagonal import BlockDiagonal
from structmat.matrices.block_sparse import BlockSparse
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.causal import CausalBasis, CausalMonarch
from structmat.matrices.dense import Dense
from structmat.matrices.diagonal import Diagonal
from structmat.matrices.displacement import (
    LDR,
    Cauchy,
    CauchyLike,
    CausalToeplitz,
    Circulant,
    Companion,
    Hankel,
    HankelLike,
    LDRSubdiagonal,
    LDRTridiagonal,
    Shift,
    Toeplitz,
    ToeplitzLike,
    Vandermonde,
    VandermondeLike,
)
from structmat.matrices.fastfood import Fastfood
from structmat.matrices.kaleidoscope import Kaleidoscope
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.matrices.low_rank import LowRank
from structmat.matrices.monarch import Monarch
from structmat.matrices.monarch_p import MonarchFFT, MonarchP
from structmat.matrices.orthogonal_butterfly import OrthogonalButterfly
from structmat.matrices.permutation import Permutation
from structmat.matrices.pivoted_low_rank import PivotedLowRank
from structmat.matrices.pixelfly import Pixelfly

__all__ = [
    "LDR",
    "BlockDiagonal",
    "BlockSparse",
    "Butterfly",
    "Cauchy",
    "CauchyLike",
    "CausalBasis",
    "CausalMonarch",
    "CausalToeplitz",
    "Circulant",
    "Companion",
    "Dense",
    "Diagonal",
    "Fastfood",
    "Hankel",
    "HankelLike",
    "Kaleidoscope",
    "KroneckerSparse",
    "LDRSubdiagonal",
    "LDRTridiagonal",
    "LowRank",
    "Monarch",
    "MonarchFFT",
    "MonarchP",
    "OrthogonalButterfly",
    "Permutation",
    "PivotedLowRank",
    "Pixelfly",
    "Shift",
    "Toeplitz",
    "ToeplitzLike",
    "Vandermonde",
    "VandermondeLike",
]
