"""Projection on block-structured classes: every slice of the matrix is decomposed on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.projection.truncated import truncated_svd, work_dtype


def _pad(W: Tensor, rows: int, cols: int) -> Tensor:
    if W.shape[-2:] == (rows, cols):
        return W
    return F.pad(W, (0, cols - W.shape[-1], 0, rows - W.shape[-2]))


def slice_ranks(l: int, k: int, q: int, device: torch.device | None = None) -> Tensor:
    """How many hidden units slice (i, j) of a Monarch matrix owns: h = i q + a with h mod l = j; shape (k, l)."""
    first = (torch.arange(l, device=device) - q * torch.arange(k, device=device)[:, None]) % l
    return ((q - first + l - 1) // l).clamp_min(0)


@torch.no_grad()
def project_monarch(W: Tensor, l: int, s: int, r: int, k: int, q: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Monarch factors nearest to W in Frobenius norm.

    Slice (i, j) of the matrix, rows j, l + j, 2 l + j, ... and columns i p, ..., i p + p - 1, is the product of its
    own parts of the factors, of the inner size that :func:`slice_ranks` counts. The slices share nothing, so that
    their truncated SVDs are the optimum. Rows and columns beyond W's count as zeros, where the optimum is zero too.

    Args:
        W: shape (*batch, m, n) with m <= l s and n <= k p.
        l: number of left blocks, of shape s x r.
        s: rows of a left block.
        r: columns of a left block.
        k: number of right blocks, of shape q x p, with k q = l r.
        q: rows of a right block.
        p: columns of a right block.

    Returns:
        ``left`` (*batch, l, s, r), ``right`` (*batch, k, q, p), and the norm of the discarded singular values
        (*batch) in double precision: no Monarch matrix of these shapes comes nearer to W.

    Example:
        >>> import torch
        >>> from structmat.projection import project_monarch
        >>> left, right, lost = project_monarch(torch.ones(4, 6), l=2, s=2, r=2, k=2, q=2, p=3)
        >>> left.shape, right.shape, lost.item() < 1e-12
        (torch.Size([2, 2, 2]), torch.Size([2, 2, 3]), True)
    """
    padded = _pad(W, l * s, k * p)
    slices = padded.unflatten(-1, (k, p)).unflatten(-3, (s, l)).movedim((-2, -3), (-4, -3))  # (*batch, k, l, s, p)
    ranks = slice_ranks(l, k, q, W.device)
    left_parts, right_parts, lost = truncated_svd(slices, -(-q // l), ranks)
    left, right = join_slices(left_parts, right_parts, r, q)
    return left, right, torch.linalg.vector_norm(lost, dim=(-2, -1))


def join_slices(left_parts: Tensor, right_parts: Tensor, r: int, q: int) -> tuple[Tensor, Tensor]:
    """The Monarch factors whose slices are the products of these; :func:`split_slices` takes them apart again.

    Args:
        left_parts: (*batch, k, l, s, most hidden units of a slice).
        right_parts: (*batch, k, l, the same, p).
        r: columns of a left block.
        q: rows of a right block.
    """
    k, l = left_parts.shape[-4:-2]
    block, residue, order = _hidden_units(k, l, q, left_parts.device)
    right = right_parts[..., block, residue, order, :].unflatten(-2, (k, q))
    left = left_parts.mT[..., block, residue, order, :].unflatten(-2, (r, l)).movedim(-3, -1)
    return left.contiguous(), right.contiguous()


def split_slices(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the slices of Monarch factors (*batch, l, s, r) and (*batch, k, q, p), filled up with zeros.

    Returns:
        left_parts (*batch, k, l, s, most) and right_parts (*batch, k, l, most, p).
    """
    (l, s, _), (k, q, p) = left.shape[-3:], right.shape[-3:]
    block, residue, order = _hidden_units(k, l, q, left.device)
    batch, most = left.shape[:-3], -(-q // l)
    left_parts = left.new_zeros(*batch, k, l, most, s)
    left_parts[..., block, residue, order, :] = left.movedim(-1, -3).flatten(-3, -2)  # hidden unit t l + j
    right_parts = right.new_zeros(*batch, k, l, most, p)
    right_parts[..., block, residue, order, :] = right.flatten(-3, -2)
    return left_parts.mT, right_parts


def _hidden_units(k: int, l: int, q: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every hidden unit its right block, its left block, and the how-manieth of that slice it is."""
    h = torch.arange(k * q, device=device)
    block, residue = h // q, h % l
    return block, residue, (h % q - (residue - q * block) % l) // l


@torch.no_grad()
def project_block_diagonal(W: Tensor, k: int, q: int, p: int) -> tuple[Tensor, Tensor]:
    """The k diagonal q x p blocks of W, and the norm of what lies outside them.

    Args:
        W: shape (*batch, m, n) with m <= k q and n <= k p.
        k: number of blocks.
        q: rows of a block.
        p: columns of a block.

    Returns:
        Blocks of shape (*batch, k, q, p) and a norm of shape (*batch) in double precision.

    Example:
        >>> import torch
        >>> from structmat.projection import project_block_diagonal
        >>> blocks, outside = project_block_diagonal(torch.ones(4, 6), k=2, q=2, p=3)
        >>> blocks.shape, round(outside.item() ** 2)
        (torch.Size([2, 2, 3]), 12)
    """
    grid = _pad(W, k * q, k * p).unflatten(-1, (k, p)).unflatten(-3, (k, q))  # (*batch, k, q, k, p)
    blocks = grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()
    outside = grid.to(work_dtype(W), copy=True)
    outside.diagonal(dim1=-4, dim2=-2).zero_()
    return blocks, torch.linalg.vector_norm(outside, dim=(-4, -3, -2, -1))
