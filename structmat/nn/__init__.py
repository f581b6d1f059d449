"""Modules that own structured matrices as parameters."""

from structmat.nn.butterfly import ButterflyLinear, OrthogonalButterflyLinear, parameter_groups
from structmat.nn.fly import convert_fly_state_dict
from structmat.nn.layers import BlockDiagonalLinear, LowRankLinear, MonarchLinear
from structmat.nn.linear import StructuredLinear
from structmat.nn.parameters import MatrixParameters

__all__ = [
    "BlockDiagonalLinear",
    "ButterflyLinear",
    "LowRankLinear",
    "MatrixParameters",
    "MonarchLinear",
    "OrthogonalButterflyLinear",
    "StructuredLinear",
    "convert_fly_state_dict",
    "parameter_groups",
]
