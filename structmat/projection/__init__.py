"""Optimal and approximate factorisations: tensors in, factors and certificates out; no matrix classes here."""

from structmat.projection.blockwise import project_block_diagonal, project_monarch
from structmat.projection.truncated import truncated_svd

__all__ = ["project_block_diagonal", "project_monarch", "truncated_svd"]
