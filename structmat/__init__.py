"""structmat: structured matrices for PyTorch."""

from structmat import kaleidoscopes, layouts, models, nn, surgery, transforms
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
from structmat.config_block_sparse import BlockSparseConfig, PixelflyConfig
from structmat.config_butterfly import ButterflyConfig
from structmat.lazy import Inverse, Kronecker, Product, Scaled, Sum, Transposed
from structmat.matrices import (
    BlockDiagonal,
    BlockSparse,
    Butterfly,
    Dense,
    Diagonal,
    Kaleidoscope,
    KroneckerSparse,
    LowRank,
    Monarch,
    OrthogonalButterfly,
    Permutation,
    Pixelfly,
)

__version__ = "0.1.0"

__all__ = [
    "BlockDiagonal",
    "BlockDiagonalConfig",
    "BlockSparse",
    "BlockSparseConfig",
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
    "Pixelfly",
    "PixelflyConfig",
    "Product",
    "Projection",
    "Scaled",
    "StructuredMatrix",
    "Sum",
    "Transposed",
    "config_from_dict",
    "kaleidoscopes",
    "layouts",
    "matrix",
    "models",
    "nn",
    "project",
    "static",
    "surgery",
    "transforms",
]
