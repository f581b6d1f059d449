"""Causal bilinear maps by products of polynomials in factored bases."""

from structmat.matrices.causal._fit import CausalFit, fit_causal_monarch
from structmat.matrices.causal.basis import CausalBasis
from structmat.matrices.causal.causal_monarch import CausalMonarch, Conditioning

__all__ = ["CausalBasis", "CausalFit", "CausalMonarch", "Conditioning", "fit_causal_monarch"]
