"""Linear algebra on the protocol: iterative solvers, derivatives of solutions, SciPy."""

from structmat.linalg.iterative import CG, GMRES, ConvergenceError, Refinement, SolveInfo, solve

__all__ = ["CG", "GMRES", "ConvergenceError", "Refinement", "SolveInfo", "solve"]
