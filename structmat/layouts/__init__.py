"""Where a block-sparse matrix has blocks: layouts as values, made by name, joined, and drawn.

A layout divides an m x n matrix into a grid of blocks and says which of them are stored. Patterns are defined on the
grid itself; on a rectangular grid a pattern of p x p cells is stretched: block (i, j) of mb x nb lies in cell
(floor(i p / mb), floor(j p / nb)). Blocks do not have to divide the sizes: those in the last block row and column are
cut by the matrix's edge.
"""

from structmat.layouts.layout import Layout
from structmat.layouts.patterns import (
    banded,
    bigbird,
    block_diagonal,
    dilated,
    flat_butterfly,
    full,
    global_,
    kron,
    random,
    top_k,
)

__all__ = [
    "Layout",
    "banded",
    "bigbird",
    "block_diagonal",
    "dilated",
    "flat_butterfly",
    "full",
    "global_",
    "kron",
    "random",
    "top_k",
]
