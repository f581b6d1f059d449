"""Product with one Kronecker-sparse factor in plain PyTorch: the definition.

The factor has the pattern I_a (x) 1_{q x p} (x) I_d: block diagonal with a blocks, each a q x p grid of d x d diagonal
matrices. A butterfly matrix is a product of such factors with q = p = 2 (one level) or 4 to 64 (merged levels).
Source: Gonon et al. 2024, "Fast inference with Kronecker-sparse matrices".
"""

from __future__ import annotations

from torch import Tensor


def kronecker_sparse(x: Tensor, blocks: Tensor) -> Tensor:
    """``y[(A q + o) d + D] = sum_b blocks[A, D, o, b] x[(A p + b) d + D]``.

    Args:
        x: shape (*batch, tokens, a p d).
        blocks: shape (*batch, a, d, q, p), dtype and device of x.

    Returns:
        Shape (*batch, tokens, a q d). Cost: 2 a d q p operations a token.
    """
    a, d, _, p = blocks.shape[-4:]
    pieces = x.unflatten(-1, (a, p, d)).movedim((-3, -1), (-4, -3))  # (*batch, a, d, tokens, p)
    return (pieces @ blocks.mT).movedim((-4, -3), (-3, -1)).flatten(-3)


def blocks_gradient(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    """Gradient of ``sum(grad * kronecker_sparse(x, blocks))`` in the blocks, for real operands of equal batch."""
    a, d, q, p = blocks.shape[-4:]
    g = grad.unflatten(-1, (a, q, d)).movedim((-3, -1), (-4, -3))  # (*batch, a, d, tokens, q)
    return g.mT @ x.unflatten(-1, (a, p, d)).movedim((-3, -1), (-4, -3))
