"""Block-sparse product plus low rank in plain PyTorch: the definition, and the flat block butterfly pattern.

``y = gamma B x + U (V x) + bias``, where B has dense blocks at the places of a layout and zeros elsewhere.
Source: Dao et al. 2022, "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network Models".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat_kernels.block_sparse.layout import BlockLayout, split_table


def _places(values: Tensor, table: Tensor, m: int, n: int, qo: int, qi: int) -> tuple[Tensor, Tensor]:
    """Block row and block column of every stored block."""
    nnz, bo, bi = values.shape[-3:]
    fine = split_table(table, (-(-m // bo), -(-n // bi)), nnz, (qo, qi))[0]
    return fine.rows.long(), fine.columns.long()


# On CUDA index_add, and the backward of index_select, add in an order that changes from run to run; indexing and
# index_put sort first. On a CPU all are deterministic, and the former faster.
def _take(pieces: Tensor, sources: Tensor) -> Tensor:
    if pieces.is_cuda:
        return pieces.movedim(-3, 0)[sources].movedim(0, -3)
    return pieces.index_select(-3, sources)


def _sum_at(products: Tensor, targets: Tensor, count: int) -> Tensor:
    """Sums of the products with one target: (*batch, count, tokens, height)."""
    if products.is_cuda:
        first = products.movedim(-3, 0)
        zeros = first.new_zeros(count, *first.shape[1:])
        return zeros.index_put((targets,), first, accumulate=True).movedim(0, -3)
    return products.new_zeros(*products.shape[:-3], count, *products.shape[-2:]).index_add(-3, targets, products)


def block_sparse(
    x: Tensor,
    values: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    gamma: Tensor,
    table: Tensor,
    m: int,
    n: int,
    qo: int = 1,
    qi: int = 1,
    longest: int = 0,
    scale: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """``scale gamma B x + U V x + bias``, or with B^T and V^T U^T.

    Args:
        x: shape (*batch, tokens, n), or m if transposed.
        values: shape (*batch, nnz, bo, bi), in the order of the layout's CSR.
        u: shape (*batch, m, r); r may be 0.
        v: shape (*batch, r, n).
        bias: shape (*batch, m), or n if transposed; (*batch, 0) for none.
        gamma: shape (*batch, 1), or (*batch, 0) for none.
        table: the layout's.
        m: number of rows of B.
        n: number of columns of B.
        qo: the layout's super-blocks' height in blocks, as qi their width: they change nothing here.
        qi: see qo.
        longest: most super-blocks in a row: it changes nothing here.
        scale: a factor of B.
        transposed: whether to multiply by the transpose.

    Returns:
        Shape (*batch, tokens, m), or n if transposed. Cost: 2 nnz bo bi + 2 r (m + n) operations a token.
    """
    rows, columns = _places(values, table, m, n, qo, qi)
    blocks, sources, targets, size = values.mT, columns, rows, m
    left, right = v.mT, u.mT
    if transposed:
        blocks, sources, targets, size = values, rows, columns, n
        left, right = u, v
    _, width, height = blocks.shape[-3:]  # of a block's input and output
    count = -(-size // height)
    pieces = F.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width)).movedim(-2, -3)
    products = _take(pieces, sources) @ blocks  # (*batch, nnz, tokens, height)
    if products.dtype in (torch.float16, torch.bfloat16):
        products = products.float()
    y = _sum_at(products, targets, count).movedim(-3, -2).flatten(-2)[..., :size]
    y = scale * y
    if gamma.shape[-1]:
        y = gamma.unsqueeze(-1) * y
    if u.shape[-1]:
        y = y + (x @ left) @ right
    if bias.shape[-1]:
        y = y + bias.unsqueeze(-2)
    return y.to(x.dtype)


def block_sparse_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor,
    gamma: Tensor,
    table: Tensor,
    m: int,
    n: int,
    qo: int,
    qi: int,
    longest: int,
    scale: float,
    transposed: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of :func:`block_sparse` for x, values, u, v, bias and gamma, where ``needs`` says; else shape (0,)."""
    tensors = [x, values, u, v, bias, gamma]
    wanted = [i for i, need in enumerate(needs) if need]

    def product(*some: Tensor) -> Tensor:
        full = list(tensors)
        for i, t in zip(wanted, some, strict=True):
            full[i] = t
        return block_sparse(
            *full, table=table, m=m, n=n, qo=qo, qi=qi, longest=longest, scale=scale, transposed=transposed
        )

    found = torch.func.vjp(product, *(tensors[i] for i in wanted))[1](grad) if wanted else ()
    out = [x.new_empty(0) for _ in tensors]
    for i, g in zip(wanted, found, strict=True):
        out[i] = g.contiguous()
    return out


def to_dense(values: Tensor, layout: BlockLayout) -> Tensor:
    """B itself, shape (*batch, m, n), of values (*batch, nnz, bo, bi)."""
    (m, n), (mb, nb), (bo, bi) = layout.shape, layout.grid, layout.block
    places = layout.tables.rows.long() * nb + layout.tables.columns.long()
    flat = values.new_zeros(*values.shape[:-3], mb * nb, bo, bi).index_add(-3, places, values)
    return flat.unflatten(-3, (mb, nb)).transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :m, :n]


def flat_butterfly_mask(mb: int, nb: int, *, max_stride: int | None = None) -> Tensor:
    """The pattern of the flat block butterfly: identity plus the butterfly factors of strides 2, 4, ..., max_stride.

    On a square grid whose size is a power of two, the factor of stride s joins block i to itself and to i ± s/2 within
    its group of s: row i has the columns i and i XOR 1, 2, 4, ..., max_stride / 2. Other grids take the pattern of the
    next power of two p >= max(mb, nb), stretched: entry (i, j) of the p x p pattern marks block
    (floor(i mb / p), floor(j nb / p)). No row and no column is empty.

    Args:
        mb: number of block rows.
        nb: number of block columns.
        max_stride: the largest stride, a power of two; 1 gives the (stretched) identity. By default p.

    Returns:
        (mb, nb), bool, with at most p (1 + log2(max_stride)) true entries.

    Raises:
        ValueError: if max_stride is not a power of two from 1 to p.
    """
    size = 1 << (max(mb, nb) - 1).bit_length()
    top = size if max_stride is None else max_stride
    if top < 1 or top > size or top & (top - 1):
        raise ValueError(f"max_stride must be a power of two from 1 to {size} for a {mb} x {nb} grid, got {max_stride}")
    i = torch.arange(size)
    flips = torch.tensor([0] + [1 << e for e in range(top.bit_length() - 1)])
    columns = i[:, None] ^ flips
    mask = torch.zeros(mb, nb, dtype=torch.bool)
    mask[(i * mb // size)[:, None].expand_as(columns), columns * nb // size] = True
    return mask
