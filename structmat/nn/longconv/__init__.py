"""Long convolutions: the function, filters, and layers that stream."""

from structmat.nn.longconv.caching import cache_taps
from structmat.nn.longconv.filters import ExplicitFilter, ImplicitFilter
from structmat.nn.longconv.functional import circular_convolution, long_convolution
from structmat.nn.longconv.module import LongConv
from structmat.nn.longconv.relaxed import RelaxedState
from structmat.nn.longconv.short import ShortConv, ShortConvState
from structmat.nn.longconv.streaming import LongConvState

__all__ = [
    "ExplicitFilter",
    "ImplicitFilter",
    "LongConv",
    "LongConvState",
    "RelaxedState",
    "ShortConv",
    "ShortConvState",
    "cache_taps",
    "circular_convolution",
    "long_convolution",
]
