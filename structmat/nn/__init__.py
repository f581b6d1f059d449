"""Modules that own structured matrices as parameters."""

from structmat.nn.fly import convert_fly_state_dict
from structmat.nn.layers import BlockDiagonalLinear, LowRankLinear, MonarchLinear
from structmat.nn.linear import StructuredLinear
from structmat.nn.parameters import MatrixParameters

__all__ = [
    "BlockDiagonalLinear",
    "LowRankLinear",
    "MatrixParameters",
    "MonarchLinear",
    "StructuredLinear",
    "convert_fly_state_dict",
]
