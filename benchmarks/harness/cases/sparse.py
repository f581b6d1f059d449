"""Block-sparse layers of density 1/8 in the pattern of Pixelfly, alone and with a low-rank term."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cases.find import ways
from harness.cases.linear import dense, low_rank
from harness.problem import FORWARD, Alternative, Built, Cost, Problem, seeded

PER_DENSITY = 8


def pattern(blocks: int) -> Tensor:
    """A square mask with an eighth of its entries, as many in every row as in every column.

    Block i has the columns i XOR o. The offsets o are those of the flat butterfly, 0, 1, 2, 4, ..., cut short where an
    eighth is reached; the rest is drawn at random, so that no larger blocks arise that a kernel could use.
    """
    count = max(1, blocks // PER_DENSITY)
    butterfly = [0] + [1 << e for e in range(blocks.bit_length() - 1)]
    others = [
        o for o in torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist() if o not in butterfly
    ]
    rows = torch.arange(blocks)
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for offset in (butterfly + others)[:count]:
        mask[rows, rows ^ offset] = True
    return mask


def entries(values: Tensor, mask: Tensor, block: int) -> Tensor:
    """The dense matrix of blocks in the order of the mask's rows, then columns; differentiable."""
    grid = mask.shape[0]
    places = mask.flatten().nonzero().squeeze(1).to(values.device)
    flat = values.new_zeros(grid * grid, block, block).index_put((places,), values)
    return flat.unflatten(0, (grid, grid)).transpose(1, 2).reshape(grid * block, grid * block)


def block_sparse(n: int, block: int, tokens: int, direction: str = FORWARD, dtype: str = "bf16") -> Problem:
    """An n x n layer of density 1/8."""
    rank = n // 64  # a quarter as many parameters again

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        mask = pattern(n // block)
        nnz = int(mask.sum())
        params = nnz * block * block
        found = [dense(problem, device), low_rank(problem, device, params, "block sparse")]
        found += _products("block sparse", problem, device, mask, block, 0)
        found += _products("block sparse + low rank", problem, device, mask, block, rank)
        if block < 128 and n // 128 >= PER_DENSITY:
            many = 128 // block
            wide = pattern(n // 128).repeat_interleave(many, 0).repeat_interleave(many, 1)
            found += _products("block sparse in groups of 128", problem, device, wide, block, 0)[:1]
        return [*found, _bsr(problem, device, mask, block, params)]

    return Problem(f"block sparse {block}", n, n, tokens, dtype, direction, alternatives)


def _products(
    name: str, problem: Problem, device: torch.device, mask: Tensor, block: int, rank: int
) -> list[Alternative]:
    n, nnz = problem.inputs, int(mask.sum())
    cost = Cost.linear(problem.tokens, n, n, nnz * block * block + 2 * n * rank)
    found = []
    for suffix, kind, function in ways("block_sparse", "block_sparse", device):
        if kind == "reference" and problem.tokens * n > 8192 * 4096:
            continue  # it keeps the products of all blocks, tens of gigabytes
        if isinstance(function, str):
            found.append(Alternative(name + suffix, kind, cost, missing=function))
            continue
        build = functools.partial(_build, function, problem, device, mask, block, rank)
        exact = functools.partial(_exact, mask, block)
        found.append(Alternative(name + suffix, kind, cost, build, exact))
    return found


def _build(
    function: Callable[..., Tensor],
    problem: Problem,
    device: torch.device,
    mask: Tensor,
    block: int,
    rank: int,
    seed: int,
) -> Built:
    module = importlib.import_module("structmat_kernels.block_sparse")
    layout = module.BlockLayout.from_mask(mask, block).to(device)
    draw, n = seeded(seed, device, problem.torch_dtype), problem.inputs
    values = draw(int(mask.sum()), block, block, std=(n / PER_DENSITY) ** -0.5)
    if rank == 0:
        return [values], lambda x: function(x, values, layout)
    u, v = draw(n, rank, std=rank**-0.5), draw(rank, n, std=n**-0.5)
    return [values, u, v], lambda x: function(x, values, layout, u=u, v=v)


def _exact(
    mask: Tensor, block: int, x: Tensor, values: Tensor, u: Tensor | None = None, v: Tensor | None = None
) -> Tensor:
    y = x @ entries(values, mask, block).mT
    return y if u is None or v is None else y + (x @ v.mT) @ u.mT


def _bsr(problem: Problem, device: torch.device, mask: Tensor, block: int, params: int) -> Alternative:
    """torch's own block-sparse weight in ``F.linear``; it has no derivative here."""
    n = problem.inputs

    def build(seed: int) -> Built:
        values = seeded(seed, device, problem.torch_dtype)(int(mask.sum()), block, block, std=(n / PER_DENSITY) ** -0.5)
        starts = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        columns = mask.nonzero()[:, 1].contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is in beta state
            weight = torch.sparse_bsr_tensor(
                starts.int().to(device), columns.int().to(device), values, (n, n), check_invariants=False
            )
        return [values], lambda x: F.linear(x, weight)

    cost = Cost.linear(problem.tokens, n, n, params)
    exact = functools.partial(_exact, mask, block)
    return Alternative("torch BSR", "peer", cost, build, exact, forward_only=True)
