"""Optimal and approximate factorisations: tensors in, factors and certificates out; no matrix classes here."""

from structmat.projection.blockwise import project_block_diagonal, project_monarch
from structmat.projection.butterfly import project_butterfly
from structmat.projection.cauchy import fit_cauchy_like
from structmat.projection.moments import Moments
from structmat.projection.pixelfly import project_pixelfly
from structmat.projection.refine import permutation_candidates, refine, search_permutation
from structmat.projection.sums import project_butterfly_sum
from structmat.projection.truncated import truncated_svd

__all__ = [
    "Moments",
    "fit_cauchy_like",
    "permutation_candidates",
    "project_block_diagonal",
    "project_butterfly",
    "project_butterfly_sum",
    "project_monarch",
    "project_pixelfly",
    "refine",
    "search_permutation",
    "truncated_svd",
]
