"""Launchers of the block-sparse kernels: tile sizes, grids, strides, scratch memory."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat_kernels import backend
from structmat_kernels.block_sparse import kernel
from structmat_kernels.block_sparse.layout import Tables, split_table
from structmat_kernels.launches import launch
from structmat_kernels.sizes import cdiv, pad, power
from structmat_kernels.tuning import Config, lookup


def product_config(tokens: int, height: int, width: int, dtype: torch.dtype, even: bool = True) -> Config:
    """Tiles of a product with (super-)blocks of ``height`` outputs and ``width`` inputs.

    ``parts`` (0: a product of its own before the launch) and ``ahead`` are those of kernel.product's low rank.
    """
    bn = pad(height)
    if tokens <= 128:  # few programs: short tiles, deep pipelines
        bt = max(16, min(64, power(tokens)))
        return {"block_t": bt, "block_k": min(pad(width), 64), "num_warps": 4, "num_stages": 4}
    if dtype == torch.float32 or not even:  # masks take registers: 256 tokens would spill
        bk = min(pad(width), 32 if dtype == torch.float32 else 64)
        return {"block_t": 128, "block_k": bk, "num_warps": 8 if bn == 128 else 4, "num_stages": 3}
    # Several programs a processor hide each other's first loads and last stores.
    if bn >= 64:
        tile = {"block_t": 128, "block_k": min(pad(width), 64), "num_warps": 4, "num_stages": 3}
        return tile | {"parts": 4, "ahead": 16}
    return {"block_t": 256, "block_k": min(pad(width), 64), "num_warps": 4, "num_stages": 3}


def sampled_config(tokens: int, height: int, width: int, dtype: torch.dtype, programs: int) -> Config:
    """Tiles of a sampled product; ``programs`` is the number of (super-)blocks times batches."""
    full = dtype == torch.float32
    bi = pad(width)
    pack = max(1, (128 if full or pad(height) > 64 else 256) // bi)
    # Two programs on each of 132 processors, in one wave; a span is worth at least 1024 tokens.
    splits = max(1, min(264 * pack // max(programs, 1), tokens // 1024))
    warps = 8 if pack * bi * pad(height) > 8192 else 4
    return {"pack": pack, "block_k": 32 if full else 64, "num_warps": warps, "num_stages": 3, "splits": splits}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(t: Tensor) -> Tensor:
    """Contiguous but for the first dimension, whose stride the kernels take (0 for a shared operand)."""
    return t if t[0].is_contiguous() else t.contiguous()


def _packed(values: Tensor, tables: Tables, qo: int, qi: int) -> Tensor:
    groups, nnz, bo, bi = values.shape
    values = values.contiguous()
    packed = values.new_empty(groups, tables.columns.shape[0], qo * bo, qi * bi)
    grid = (tables.members.shape[0], groups)
    sizes = {"BO": bo, "BI": bi, "QO": qo, "QI": qi, "SIZE": power(bo * bi)}
    launch(kernel.pack, grid, (values, packed, tables.members), (nnz,), **sizes, num_warps=4)
    return packed


def product(
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
    middle: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The product on canonical operands; see reference.py. ``middle`` is x V^T (x U if transposed), where known."""
    groups, tokens, n_in = x.shape
    nnz, bo, bi = values.shape[1:]
    n_out = n if transposed else m
    y = x.new_empty(groups, tokens, n_out)
    if y.numel() == 0:
        return y
    grid = (-(-m // bo), -(-n // bi))
    fine, coarse = split_table(table, grid, nnz, (qo, qi))
    rank = u.shape[-1]
    with backend.launching(x):
        x = _rows(x)
        tables = fine
        if qo * qi > 1:
            tables, values = coarse, _packed(values, coarse, qo, qi)
            bo, bi, grid = bo * qo, bi * qi, (-(-grid[0] // qo), -(-grid[1] // qi))
        height, width = (bi, bo) if transposed else (bo, bi)
        sizes = (n_out, n_in, height, width, rank, int(transposed))
        chosen = config or lookup("block_sparse", x.device, x.dtype, sizes, tokens)
        rows, columns = grid[::-1] if transposed else grid
        bn = pad(height)
        even = height == bn and width == pad(width) and columns * width == n_in
        chosen = chosen or product_config(tokens, height, width, x.dtype, even)
        bk = chosen["block_k"]
        tiles = cdiv(tokens, chosen["block_t"])
        values, bias = _whole(values), _whole(bias)
        outer = _whole(v if transposed else u)
        inner, partial, counters = outer, outer, table
        br = min(pad(rank), 64)
        # The low rank's inner product in the same launch: for one matrix and no wider than a tile.
        fused = middle is None and groups == 1 and 0 < rank <= 128
        parts, ahead = (chosen.get("parts", 0), min(chosen.get("ahead", 2), tiles)) if fused else (0, 0)
        if parts:
            inner = _whole(u if transposed else v)
            size = chosen["block_t"] * cdiv(rank, br) * br
            middle = x.new_empty(1, tiles, size)
            partial = x.new_empty(tiles, parts, size, dtype=torch.float32)
            counters = torch.zeros(tiles, 2, dtype=torch.int32, device=x.device)
        elif rank and middle is None:
            middle = torch.matmul(x, u if transposed else v.mT)
        t = x if middle is None else middle.contiguous()
        offsets = tables.column_offsets if transposed else tables.row_offsets
        index = tables.csc_rows if transposed else tables.columns
        launch(
            kernel.product, (groups * tiles * rows + parts * (tiles + ahead),),
            (x, values, t, outer, inner, partial, counters, bias, gamma, y, offsets, index, tables.csc_positions),
            (scale, tokens, n_in, n_out, rows, tiles, x.stride(0), x.stride(1), values.stride(0), t.stride(0),
             outer.stride(0), bias.stride(0), gamma.stride(0)),
            WIDTH=width, HEIGHT=height, RANK=rank, BIAS=bias.shape[-1] > 0, GAMMA=gamma.shape[-1] > 0,
            TRANSPOSED=transposed, EVEN=even and width % bk == 0,
            BT=chosen["block_t"], BN=bn, BK=bk, BR=br, PARTS=parts, AHEAD=ahead, STAGES=chosen["num_stages"],
            PRECISION=backend.dot_precision(x.dtype), UPCAST=backend.INTERPRETED, num_warps=chosen["num_warps"],
        )  # fmt: skip
    return y


def sampled(
    left: Tensor,
    right: Tensor,
    values: Tensor,
    gamma: Tensor,
    table: Tensor,
    qo: int,
    qi: int,
    longest: int,
    scale: float,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """``scale gamma left^T right`` at the stored blocks, (G, nnz, bo, bi): the gradient of values.

    left is (G, T, m) and right (G, T, n); values gives the shape. Spans of tokens are added in a fixed order.
    """
    groups, tokens, m = left.shape
    n = right.shape[-1]
    nnz, bo, bi = values.shape[1:]
    if nnz * groups == 0 or tokens == 0:
        return values.new_zeros(values.shape, dtype=dtype)
    grid = (-(-m // bo), -(-n // bi))
    fine, coarse = split_table(table, grid, nnz, (qo, qi))
    tables = coarse if qo * qi > 1 else fine
    height, width, rows, columns = bo * qo, bi * qi, -(-grid[0] // qo), -(-grid[1] // qi)
    with backend.launching(left):
        left, right = _rows(left), _rows(right)
        blocks = tables.columns.shape[0]
        chosen = config or lookup("block_sparse_values", left.device, left.dtype, (m, n, height, width), tokens)
        chosen = chosen or sampled_config(tokens, height, width, left.dtype, blocks * groups)
        pack, bk = chosen["pack"], chosen["block_k"]
        span = cdiv(cdiv(tokens, chosen["splits"]), bk) * bk
        splits = cdiv(tokens, span)
        out = left.new_empty(splits, groups, nnz, bo, bi, dtype=dtype if splits == 1 else torch.float32)
        po, pi = pad(height), pad(width)
        # Rows hold different numbers of blocks: the longest sets the grid, and programs past a row's end leave at once.
        launch(
            kernel.sampled, (rows * splits * groups, cdiv(longest, pack)),
            (left, right, out, tables.row_offsets, tables.columns, tables.members, gamma),
            (scale, tokens, m, n, nnz, rows, splits, span, left.stride(0), left.stride(1), right.stride(0),
             right.stride(1), gamma.stride(0)),
            HEIGHT=height, WIDTH=width, QO=qo, QI=qi, GAMMA=gamma.shape[-1] > 0,
            EVEN=height == po and width == pi and rows * height == m and columns * width == n,
            PACK=pack, BO=po, BI=pi, BK=bk, SWAP=po >= 64, STAGES=chosen["num_stages"],
            PRECISION=backend.dot_precision(left.dtype), UPCAST=backend.INTERPRETED, num_warps=chosen["num_warps"],
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(dtype)
