"""structmat: structured matrices for PyTorch."""

from structmat import kaleidoscopes, nn, surgery, transforms
from structmat.base import StructuredMatrix, matrix, static
from structmat.chain import Chain, Pattern
from structmat.config import (
    BlockDiagonalConfig,
    BudgetError,
    Config,
    LowRankConfig,
    MonarchConfig,
    Projection,
    config_from_dict,
    project,
)
from structmat.config_butterfly import ButterflyConfig
from structmat.lazy import Inverse, Kronecker, Product, Scaled, Sum, Transposed
from structmat.matrices import (
    BlockDiagonal,
    Butterfly,
    Dense,
    Diagonal,
    Kaleidoscope,
    KroneckerSparse,
    LowRank,
    Monarch,
    OrthogonalButterfly,
    Permutation,
)

__version__ = "0.1.0"

__all__ = [
    "BlockDiagonal",
    "BlockDiagonalConfig",
    "BudgetError",
    "Butterfly",
    "ButterflyConfig",
    "Chain",
    "Config",
    "Dense",
    "Diagonal",
    "Inverse",
    "Kaleidoscope",
    "Kronecker",
    "KroneckerSparse",
    "LowRank",
    "LowRankConfig",
    "Monarch",
    "MonarchConfig",
    "OrthogonalButterfly",
    "Pattern",
    "Permutation",
    "Product",
    "Projection",
    "Scaled",
    "StructuredMatrix",
    "Sum",
    "Transposed",
    "config_from_dict",
    "kaleidoscopes",
    "matrix",
    "nn",
    "project",
    "static",
    "surgery",
    "transforms",
]
