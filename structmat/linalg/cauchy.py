"""Gaussian elimination on Cauchy-like matrices ``C[i, j] = (G H^T)[i, j] / (s_i - t_j)``, by their generators."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Columns that are eliminated together: matrix products of this size instead of vectors.
BLOCK = 48


def _order(pivots: Tensor, rows: int) -> Tensor:
    """The permutation of LAPACK's row exchanges (batch, c), 1-based, as an index (batch, rows)."""
    swaps = pivots.cpu().numpy() - 1
    order = np.broadcast_to(np.arange(rows), (len(swaps), rows)).copy()
    each = np.arange(len(swaps))
    for i in range(swaps.shape[1]):
        j = swaps[:, i]
        order[each, i], order[each, j] = order[each, j], order[each, i].copy()
    return torch.from_numpy(order).to(pivots.device)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(-2, order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; of one matrix by a kernel that is much faster on a CPU than the batched one."""
    return (a[0] @ b[0]).unsqueeze(0) if len(a) == len(b) == 1 else a @ b


def _cauchy_like(s: Tensor, t: Tensor, G: Tensor, H: Tensor) -> Tensor:
    return _product(G, H.mT.contiguous()) / (s.unsqueeze(-1) - t.unsqueeze(-2))


def cauchy_like_solve(s: Tensor, t: Tensor, G: Tensor, H: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``C^-1 b`` and the determinant of C, by LU with partial pivoting in which only generators are kept.

    The Schur complements of a Cauchy-like matrix are Cauchy-like, with generators that change as b does (Gohberg,
    Kailath, Olshevsky 1995). Below C stands an identity, which is Cauchy-like as well and eliminated with it: what is
    left of it beside b is -C^-1 b, so that no triangular factor has to be kept for a back substitution (Aricò,
    Rodriguez 2010). Blocks of columns are eliminated together. O(r n^2) operations, O((r + k) n) memory.

    Args:
        s: shape (batch, n).
        t: shape (batch, n), numbers that are all different, and different from s.
        G: shape (batch, n, r).
        H: shape (batch, n, r).
        b: shape (batch, n, k). All of one dtype that torch.linalg factorises, and on one device.

    Returns:
        The solution (batch, n, k); sign (batch,) and logarithm of the absolute value (batch,) of det C; and the ratio
        (batch,) of the smallest pivot to the largest: of a singular matrix zero or, with rounding, tiny.
    """
    n, c = s.shape[-1], BLOCK
    done_t, done_g, done_x = t[:, :0], G[:, :0], b[:, :0]
    sign, logabs = torch.ones_like(s[:, 0]), torch.zeros_like(s[:, 0].abs())
    least, most = torch.full_like(logabs, torch.inf), torch.zeros_like(logabs)
    for _ in range(0, n, c):
        t1, H1 = t[:, :c], H[:, :c]
        t, H = t[:, c:], H[:, c:]
        lu, pivots, _info = torch.linalg.lu_factor_ex(_cauchy_like(s, t1, G, H1))
        order = _order(pivots, s.shape[-1])
        s, G, b = s.gather(-1, order), _rows(G, order), _rows(b, order)
        width = t1.shape[-1]
        top, below = lu[:, :width], lu[:, width:]
        diagonal = top.diagonal(dim1=-2, dim2=-1)
        least = torch.minimum(least, diagonal.abs().amin(-1))
        most = torch.maximum(most, diagonal.abs().amax(-1))
        exchanges = (pivots != torch.arange(1, width + 1, device=s.device)).sum(-1) % 2
        sign, logabs = sign * diagonal.sgn().prod(-1) * (1 - 2 * exchanges), logabs + diagonal.abs().log().sum(-1)
        # The rest's generators and b less C21 C11^-1 (G1, b1) and C12^T C11^-T H1; the identity's part likewise.
        s1, G1, b1, s, G, b = s[:, :width], G[:, :width], b[:, :width], s[:, width:], G[:, width:], b[:, width:]
        r = G.shape[-1]
        half = torch.linalg.solve_triangular(top, torch.cat([G1, b1], -1), upper=False, unitriangular=True)
        step = torch.linalg.solve_triangular(top, half, upper=True)
        reduced = _product(below, half)
        G, b = G - reduced[..., :r], b - reduced[..., r:]
        C12 = _cauchy_like(s1, t, G1, H)
        dual = torch.linalg.solve_triangular(top.mT, H1, upper=False)
        dual = torch.linalg.solve_triangular(top.mT, dual, upper=True, unitriangular=True)
        H = H - _product(C12.mT, dual)
        moved = torch.cat([done_g, done_x], -1) - _product(_cauchy_like(done_t, t1, done_g, H1), step)
        moved = torch.cat([moved, -step], -2)
        done_g, done_x, done_t = moved[..., :r], moved[..., r:], torch.cat([done_t, t1], -1)
    return -done_x, sign, logabs, least / most
