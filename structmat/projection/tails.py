"""What the best product of two factors misses at the splits of a chain: sums of squared singular values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structmat.chain import Chain, Pattern
from structmat.projection.bases import norm2_over, rotation
from structmat.projection.leading import leading_bounds, low_precision, trace_of, trailing_sum
from structmat.projection.splitting import split_blocks

# Squared singular values off the Gram matrix are off by about eps |W|^2: good where the lost share is above this.
_GRAM_SHARE = 1e-6
# Entries of Gram matrices taken at a time on a CPU: their powers stay in the cache.
_CHUNK = 1 << 17
# Up to as many entries all singular values are computed exactly; beyond, to this share.
_SMALL = 1 << 14
_ROUGH = 2e-3


_Side = tuple[Pattern, Pattern, int]


def _sides(chain: Chain, split: int) -> _Side:
    left, right = chain.merged(0, split), chain.merged(split, len(chain))
    return left, right, left.rank(right) or 1


def _per_matrix(tails: Callable[[Tensor, int], Tensor], gram: Tensor, rank: int) -> Tensor:
    """The tails (B) of Gram matrices (B, A, alpha, delta, D, k, k)."""
    return tails(gram.flatten(0, -3), rank).reshape(len(gram), -1).sum(-1)


def _gram(blocks: Tensor) -> Tensor:
    """Of the rows; blocks are copied once, not by the product, which would copy both of its operands."""
    blocks = blocks.contiguous()
    return blocks @ blocks.mH


def _pieces(blocks: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Blocks whose Gram matrices, on a CPU, stay in the cache."""
    if blocks.device.type != "cpu":
        return (blocks,)
    entries = blocks[..., 0].numel() * blocks.shape[-2]
    return blocks.split(max(1, blocks.shape[dim] * _CHUNK // max(entries, 1)), dim)


def _exact_where_small(tail: Tensor, size2: Tensor, blocks: Tensor, rank: int) -> Tensor:
    """The tails, but of those that are small beside the matrix the squares of the blocks' own singular values."""
    small = (tail <= _GRAM_SHARE * size2).nonzero().squeeze(-1)
    if small.numel():
        blocks = blocks[small]
        if rank == 1 and blocks.shape[-2] == 2:
            tail[small] = rotation(blocks[..., 0, :], blocks[..., 1, :])[1].flatten(1).sum(-1)
        else:
            tail[small] = torch.linalg.svdvals(blocks)[..., rank:].square().flatten(1).sum(-1)
    return tail


def _blocks(values: Tensor, side: _Side) -> Tensor:
    """The blocks of a split, transposed where their columns are fewer: (B, A, alpha or delta, the other, D, k, l)."""
    blocks = split_blocks(values, *side[:2])
    return blocks if side[0].b <= side[1].c else blocks.mT


def split_error2(values: Tensor, chain: Chain, split: int, terms: int = 1) -> Tensor:
    """The square of what the best product of two factors, merged at a split, misses of (B, a, b, c, d).

    Args:
        values: entries on the support of the chain.
        chain: the patterns.
        split: how many factors are on the left.
        terms: of the best sum of so many products.
    """
    side = _sides(chain, split)
    blocks, rank = _blocks(values, side), side[2] * terms
    tail = values.new_zeros(values.shape[0], dtype=values.dtype.to_real())
    if rank >= blocks.shape[-2]:
        return tail
    for piece in _pieces(blocks, 3):
        tail += _per_matrix(trailing_sum, _gram(piece), rank)
    return _exact_where_small(tail, norm2_over(values, (-4, -3, -2, -1)), blocks, rank)


def error_bounds2(values: Tensor, chain: Chain, known: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The largest E_l^2 of all splits from below, and their sum from above, of (B, a, b, c, d); some are known.

    Of small matrices they are exact; of others within two thousandths, and therefore E_l within one.
    """
    wanted = [split for split in range(1, len(chain)) if split not in known]
    if not wanted:
        bounds = torch.stack(list(known.values()))
        return bounds.amax(0), bounds.sum(0)
    if values[0].numel() <= _SMALL:
        below = above = known | {split: split_error2(values, chain, split) for split in wanted}
    else:
        below, above = _estimates(values, chain, wanted)
        rough = torch.stack([above[split] - below[split] > _ROUGH * above[split] for split in wanted])
        for split, some, which in zip(wanted, rough.any(1).tolist(), rough, strict=True):
            if some:
                index = which.nonzero().squeeze(-1)
                below[split][index] = above[split][index] = split_error2(values[index], chain, split)
        below, above = known | below, known | above
    return torch.stack(list(below.values())).amax(0), torch.stack(list(above.values())).sum(0)


def _estimates(values: Tensor, chain: Chain, wanted: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Bounds of E_l^2 from below and above.

    The blocks of a split have fewer rows and more columns than those of the next. Gram matrices of their rows are
    therefore sums of diagonal blocks of the next split's, and Gram matrices of their columns sums of those of the
    split before: both are computed in the middle, where the blocks are square, and summed outwards.
    """
    size2 = norm2_over(values, (-4, -3, -2, -1))
    scale = (1 / size2.masked_fill(size2 == 0, 1).sqrt())[(..., *[None] * 6)]
    low = low_precision(values)
    sides = {split: _sides(chain, split) for split in range(1, len(chain))}
    rows = [split for split in reversed(sides) if sides[split][0].b <= sides[split][1].c]
    columns = [split for split in sides if split not in rows]
    least, most = ({split: torch.zeros_like(size2) for split in wanted} for _ in range(2))
    for run, summed, dim in ((rows, _rows_summed, 3), (columns, _columns_summed, 2)):
        mine = [split for split in run if split in least]
        if not mine:
            continue
        run = run[run.index(mine[0]) : run.index(mine[-1]) + 1]
        blocks = _blocks(values, sides[run[0]])
        for piece in _pieces(blocks, dim):
            piece = torch.mul(piece, scale, out=torch.empty(piece.shape, dtype=low, device=piece.device))
            gram = piece @ piece.mH
            for i, split in enumerate(run):
                gram = summed(gram, sides[run[i - 1]], sides[split]) if i else gram
                if split in least:
                    below, above = _held(gram.flatten(0, -3), sides[split][2])
                    least[split] += below.to(size2.dtype).reshape(len(gram), -1).sum(-1)
                    most[split] += above.to(size2.dtype).reshape(len(gram), -1).sum(-1)
        for split in mine:  # what is held is off by rounding, of the products of the blocks and of their powers
            noise = (sum(blocks.shape[-2:]) + _blocks(values, sides[split]).shape[-1]) * torch.finfo(low).eps
            least[split] = size2 * (1 - least[split] * (1 - noise))
            most[split] = size2 * (1 - most[split] * (1 + noise))
    return most, least


def _held(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The sum of the rank largest eigenvalues of Gram matrices, from below and from above."""
    k = gram.shape[-1]
    if rank == 1 and k > 2:
        return leading_bounds(gram)
    if rank >= k:
        held = trace_of(gram)
    elif k == 2:
        p, q = gram[:, 0, 0].real, gram[:, 1, 1].real
        held = (p + q) / 2 + torch.hypot((p - q) / 2, gram[:, 0, 1].abs())
    else:
        held = torch.linalg.eigvalsh(gram)[:, -rank:].sum(-1)
    return held, held


def _rows_summed(gram: Tensor, before: _Side, now: _Side) -> Tensor:
    """Gram matrices (B, A, alpha, delta, D, k, k) of the rows at the split before.

    Rows are (k', q): their last digit becomes the first of delta. The last digit of alpha is summed over.
    """
    B, A, alpha, delta, D, k, _ = gram.shape
    k_, alpha_ = now[0].b, now[1].a // now[0].a
    q, j = k // k_, alpha // alpha_
    gram = gram.view(B, A, alpha_, j, delta, D, k_, q, k_, q)
    out = gram.new_empty(B, A, alpha_, q, delta, D, k_, k_)
    for i in range(q):
        _add(gram[..., i, :, i].unbind(3), out[:, :, :, i])
    return out.flatten(3, 4)


def _columns_summed(gram: Tensor, before: _Side, now: _Side) -> Tensor:
    """Gram matrices (B, A, alpha, delta, D, k, k) of the columns at the split after.

    Columns are (j, k'): their first digit becomes the last of alpha. The first digit of delta is summed over.
    """
    B, A, alpha, delta, D, k, _ = gram.shape
    k_, delta_ = now[1].c, now[0].d // now[1].d
    j, q = k // k_, delta // delta_
    gram = gram.view(B, A, alpha, q, delta_, D, j, k_, j, k_)
    out = gram.new_empty(B, A, alpha, j, delta_, D, k_, k_)
    for i in range(j):
        _add(gram[..., i, :, i, :].unbind(3), out[:, :, :, i])
    return out.flatten(2, 3)


def _add(parts: tuple[Tensor, ...], out: Tensor) -> None:
    out.copy_(parts[0]) if len(parts) == 1 else torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
