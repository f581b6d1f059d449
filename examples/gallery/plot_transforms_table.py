r"""
Which transforms are butterflies
================================

Eight matrices of sizes 8 to 1024, each approximated by a butterfly matrix, a sparse matrix and a matrix of low rank
with equally many numbers, after figure 1 of Dao et al. 2019, "Learning fast algorithms for linear transforms using
butterfly factorizations". There the butterflies are trained; here they are projections, without training. The page
:doc:`/butterfly` explains the family and what its projection guarantees.
"""

import matplotlib.pyplot as plt
import numpy as np
import scipy.fft
import scipy.linalg
import torch

import structmat
from structmat import ButterflyConfig, transforms
from structmat.testing import relative_error

# %%
# The matrices
# ------------
#
# All are scaled to orthogonal (or unitary) ones where they have a scale. The Legendre transform takes values at the
# Gauss nodes to coefficients; the convolution is circular, with random numbers for its kernel.

rng = np.random.default_rng(0)


def hartley(n):
    angles = 2 * np.pi / n * (np.outer(np.arange(n), np.arange(n)) % n)
    return (np.cos(angles) + np.sin(angles)) / np.sqrt(n)


def legendre(n):
    nodes, weights = np.polynomial.legendre.leggauss(n)
    degrees = np.arange(n)[:, None]
    return np.polynomial.legendre.legvander(nodes, n - 1).T * np.sqrt(weights * (degrees + 0.5))


MATRICES = {
    "Fourier": lambda n: scipy.fft.fft(np.eye(n), axis=0, norm="ortho"),
    "Hadamard": lambda n: scipy.linalg.hadamard(n) / np.sqrt(n),
    "cosine (DCT-II)": lambda n: scipy.fft.dct(np.eye(n), axis=0, norm="ortho"),
    "sine (DST-II)": lambda n: scipy.fft.dst(np.eye(n), axis=0, norm="ortho"),
    "Hartley": hartley,
    "Legendre": legendre,
    "convolution": lambda n: scipy.linalg.circulant(rng.standard_normal(n)),
    "random": lambda n: rng.standard_normal((n, n)),
}
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]

# %%
# Three approximations
# --------------------
#
# Of the butterflies, those of the first two have rank 1, with 2 n log2(n) numbers. A real cosine transform is the real
# part of a complex butterfly, and so has rank 2: 64 n numbers at n = 1024. Up to n = 16 rank 2 would have as many
# numbers as the matrix has entries, and rank 1 is taken. The permutation of the columns is searched among the known
# ones; where none helped at n = 128, larger sizes do without. The two rivals are the best there are: the largest
# entries (whose places are not counted), and the largest singular values (of a rank r, 2 n r numbers).


def butterfly(W, name, searched):
    rank = 1 if name in ("Fourier", "Hadamard") or len(W) < 32 else 2
    found = structmat.project(W, ButterflyConfig(rank=rank, permutation="search" if searched else None))
    return found.error, found.bound, found.matrix.num_params


def sparse(W, budget):
    squares = W.abs().square().flatten().sort(descending=True).values
    return (squares[budget:].sum() / squares.sum()).sqrt().item()


def low_rank(W, budget):
    squares = torch.linalg.svdvals(W).square()
    return (squares[budget // (2 * len(W)) :].sum() / squares.sum()).sqrt().item()


errors = {kind: np.zeros((len(MATRICES), len(SIZES))) for kind in ("butterfly", "sparse", "low rank")}
bounds = np.zeros((len(MATRICES), len(SIZES)))
for i, (name, make) in enumerate(MATRICES.items()):
    for j, n in enumerate(SIZES):
        W = torch.from_numpy(np.ascontiguousarray(make(n)))
        searched = n <= 128 or errors["butterfly"][i, SIZES.index(128)] < 0.5
        errors["butterfly"][i, j], bounds[i, j], budget = butterfly(W, name, searched)
        errors["sparse"][i, j], errors["low rank"][i, j] = sparse(W, budget), low_rank(W, budget)

# %%
# The table
# ---------
#
# Relative errors in the Frobenius norm. The first two are butterflies of rank 1, to rounding, the next three of rank 2.
# The Legendre transform is not one, but much nearer to one than to anything sparse or of low rank. The last two are no
# butterflies: the certificate proves that none of this chain, with the columns in this order, does much better; the
# largest entries do.

for kind, table in errors.items():
    print(f"\n{kind:16}" + "".join(f"{f'n = {n}':>10}" for n in SIZES))
    for name, row in zip(MATRICES, table, strict=True):
        print(f"{name:16}" + "".join(f"{e:10.1e}" for e in row))
print("\nno butterfly is nearer than")
for i in (5, 6, 7):
    print(f"{list(MATRICES)[i]:16}" + "".join(f"{e:10.1e}" for e in bounds[i]))

figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.4), sharey=True, layout="constrained")
for ax, (kind, table) in zip(axes, errors.items(), strict=True):
    image = ax.imshow(np.log10(np.maximum(table, 1e-16)), cmap="viridis", vmin=-16, vmax=0)
    ax.set_xticks(range(len(SIZES)), [str(n) for n in SIZES], rotation=60, fontsize=8)
    ax.set_yticks(range(len(MATRICES)), list(MATRICES), fontsize=8)
    ax.set_title(kind, fontsize=9)
figure.colorbar(image, ax=axes, label="log10 of the relative error", shrink=0.8)

large = SIZES.index(32)
assert (errors["butterfly"][:5, large:] < 1e-12).all()
assert (errors["butterfly"][:2] < 1e-14).all()
rivals = np.minimum(errors["sparse"], errors["low rank"])
assert (rivals[:5, large:] > 0.1).all()
assert (errors["butterfly"][5, large:] < 0.5 * rivals[5, large:]).all()
assert (bounds[6:, SIZES.index(1024)] > 0.8).all()

# %%
# A convolution takes two
# -----------------------
#
# A circular convolution is a Fourier transform, a multiplication and an inverse transform: one butterfly does not hold
# it, and a projection on one cannot find it. The product of two does, and is written down exactly.

kernel = torch.from_numpy(rng.standard_normal(1024))
two = transforms.circulant(kernel)
error = relative_error(two.to_dense(), torch.from_numpy(scipy.linalg.circulant(kernel.numpy())))
print(f"two butterflies, {two.num_params} numbers: relative error {error:.1e}")
assert error < 1e-12
plt.show()
