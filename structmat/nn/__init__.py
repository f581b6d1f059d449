"""Modules that own structured matrices as parameters."""

from structmat.nn.block_sparse import BlockSparseLinear, PixelflyLinear
from structmat.nn.block_sparse_conv import BlockSparseConv2d, PixelflyConv2d
from structmat.nn.butterfly import ButterflyLinear, OrthogonalButterflyLinear
from structmat.nn.butterfly_conv import ButterflyConv2d
from structmat.nn.causal_monarch import CausalMonarchConv
from structmat.nn.displacement import CirculantLinear, LDRLinear, ToeplitzLikeLinear, ToeplitzLinear
from structmat.nn.displacement_conv import LDRConv2d
from structmat.nn.fastfood import FastfoodLinear
from structmat.nn.fly import convert_fly_state_dict
from structmat.nn.groups import parameter_groups
from structmat.nn.kaleidoscope import KaleidoscopeLinear
from structmat.nn.kaleidoscope_conv import KaleidoscopeConv2d
from structmat.nn.layers import BlockDiagonalLinear, LowRankLinear, MonarchLinear
from structmat.nn.linear import StructuredLinear
from structmat.nn.longconv import ExplicitFilter, ImplicitFilter, LongConv, ShortConv, cache_taps
from structmat.nn.parameters import MatrixParameters
from structmat.nn.permutation import LearnablePermutation
from structmat.nn.recurrent import StructuredLSTMCell

__all__ = [
    "BlockDiagonalLinear",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "ButterflyConv2d",
    "ButterflyLinear",
    "CausalMonarchConv",
    "CirculantLinear",
    "ExplicitFilter",
    "FastfoodLinear",
    "ImplicitFilter",
    "KaleidoscopeConv2d",
    "KaleidoscopeLinear",
    "LDRConv2d",
    "LDRLinear",
    "LearnablePermutation",
    "LongConv",
    "LowRankLinear",
    "MatrixParameters",
    "MonarchLinear",
    "OrthogonalButterflyLinear",
    "PixelflyConv2d",
    "PixelflyLinear",
    "ShortConv",
    "StructuredLSTMCell",
    "StructuredLinear",
    "ToeplitzLikeLinear",
    "ToeplitzLinear",
    "cache_taps",
    "convert_fly_state_dict",
    "parameter_groups",
]
