r"""
Layouts and Pixelfly matrices
=============================

Where a block-sparse matrix has its blocks, and what blocks plus low rank make of a matrix. The page :doc:`/pixelfly`
explains the family.
"""

import matplotlib.pyplot as plt
import torch

import structmat
from structmat import BlockSparseConfig, LowRankConfig, PixelflyConfig, layouts
from structmat.testing import relative_error

generator = torch.Generator().manual_seed(0)

# %%
# Layouts by name
# ---------------
#
# A layout is a value: it knows its shape, its blocks and its density, is joined by ``|``, and draws itself.

shape, block = (512, 512), 32
named = {
    "flat butterfly, stride 2": layouts.flat_butterfly(shape, block, max_stride=2),
    "flat butterfly, stride 16": layouts.flat_butterfly(shape, block, max_stride=16),
    "4 cells stretched": layouts.flat_butterfly(shape, block, max_stride=2, cells=4),
    "band": layouts.banded(shape, block, width=1),
    "dilated band": layouts.dilated(shape, block, width=2, dilation=3),
    "BigBird": layouts.bigbird(shape, block, width=1, size=1, extra=2),
    "random": layouts.random(shape, block, density=0.2),
    "butterfly | global": layouts.flat_butterfly(shape, block, max_stride=8) | layouts.global_(shape, block),
}
figure, axes = plt.subplots(2, 4, figsize=(9.2, 5.2), layout="constrained")
for ax, (name, layout) in zip(axes.flat, named.items(), strict=True):
    layout.plot(ax)
    ax.set_title(f"{name}\ndensity {layout.density:.3g}", fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])

# %%
# Rectangles stretch the cells of a square pattern; blocks that do not divide the sizes are cut by the edge.

figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), width_ratios=(3, 2), layout="constrained")
layouts.flat_butterfly((256, 1024), 32, max_stride=4).plot(axes[0])
layouts.banded((200, 300), 48).plot(axes[1])

# %%
# Projection: two kinds of structure in one matrix
# ------------------------------------------------
#
# Interactions that are near, along a chain of 128 sites, and a few global modes on top. Neither blocks at the diagonal
# nor a low rank describes this matrix; their sum does.

n = 128
i = torch.arange(n, dtype=torch.float64)
near = torch.exp(-((i[:, None] - i).abs() / 3))
modes = torch.cos(torch.outer(torch.arange(1, 5, dtype=torch.float64), (i + 0.5) * torch.pi / n))
W = near + modes.mT @ modes / 4

ratios = [0.15, 0.2, 0.25, 0.3]
configs = {
    "low rank": lambda ratio: LowRankConfig(ratio=ratio),
    "flat butterfly": lambda ratio: BlockSparseConfig(block=8, pattern="flat_butterfly", ratio=ratio),
    "largest blocks": lambda ratio: BlockSparseConfig(block=8, ratio=ratio),
    "Pixelfly": lambda ratio: PixelflyConfig(block=8, ratio=ratio),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.imshow(W, cmap="RdBu", vmin=-1.5, vmax=1.5, interpolation="nearest")
left.set_title("the matrix", fontsize=9)
errors = {name: [structmat.project(W, config(r)).error for r in ratios] for name, config in configs.items()}
for name, values in errors.items():
    right.semilogy(ratios, values, marker=".", label=name)
right.set_xlabel("share of the dense parameters")
right.set_ylabel("relative error")
right.legend(fontsize=8)
for name, values in errors.items():
    print(f"{name:15}", "  ".join(f"{value:.4f}" for value in values))
assert all(error <= min(others) for error, *others in zip(*(errors[name] for name in reversed(errors)), strict=True))

# %%
# Where the blocks are is not known
# ---------------------------------
#
# Given a density in place of a layout, blocks and low rank are found together, as in robust principal component
# analysis. Here twelve blocks of noise stand anywhere on a matrix of rank 4. The noise is smaller than the rest: the
# blocks of largest norm are others.

truth = layouts.random((n, n), 8, density=12 / 256, seed=1)
L = structmat.LowRank.random((n, n), 4, generator=generator, dtype=torch.float64).to_dense()
S = torch.randn(n, n, generator=generator, dtype=torch.float64) * 0.6 * L.std() * truth.entries()
found = structmat.Pixelfly.from_dense(L + S, 12 / 256, rank=4, block=8)
largest = layouts.top_k(L + S, 8, 12 / 256)
print(f"relative error {relative_error(found.to_dense(), L + S):.1e}")
print(f"of 12 blocks found: {int((found.layout.mask & truth.mask).sum())}, by their norms alone:", end=" ")
print(int((largest.mask & truth.mask).sum()))
assert found.layout == truth

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
scale = 3 * L.std()
pictures = {
    "low rank + blocks": L + S,
    "what was found: low rank": 0.5 * found.low_rank.to_dense(),
    "and blocks": 0.5 * found.block_sparse.to_dense(),
}
for ax, (name, matrix) in zip(axes, pictures.items(), strict=True):
    ax.imshow(matrix, cmap="RdBu", vmin=-scale, vmax=scale, interpolation="nearest")
    ax.set_title(name, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
plt.show()
