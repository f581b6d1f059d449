"""Operators on structured matrices that keep their operands.

The rules by which two matrices join into one of a closed family live in the classes (``_compose``, ``_add``);
:func:`compose` and :func:`add` ask them first and build a lazy value where no rule applies.
"""

from structmat.lazy.joins import Product, Sum, add, compose
from structmat.lazy.kronecker import Kronecker
from structmat.lazy.wrappers import Inverse, Scaled, Transposed

__all__ = ["Inverse", "Kronecker", "Product", "Scaled", "Sum", "Transposed", "add", "compose"]
