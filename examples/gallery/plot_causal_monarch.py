r"""
Causal Monarch maps
===================

What the matrix of a causal polynomial Monarch convolution looks like, why nothing of it lies above the diagonal, and
what happens when one of the conditions is dropped. The page :doc:`/causal_monarch` has the proofs.
"""

from typing import Any

import matplotlib.pyplot as plt
import torch

from structmat import CausalMonarch, CausalToeplitz
from structmat.matrices.causal import fit_causal_monarch

double: Any = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)

# %%
# Jacobians
# ---------
#
# y = conv(k, u) is linear in u for a fixed kernel k: its matrix is the Jacobian. All blocks the identity give the plain
# convolution, whose diagonals are constant. Other triangular blocks give other triangular matrices.

n = 32
t = torch.arange(n, **double)
kernel = torch.exp(-t / 10) * torch.cos(t / 2)


def random_blocks(radix, lower, size):
    """One triangular block with a diagonal of ones for every digit and every value of the lower digits."""
    blocks, count = [], 1
    for r in radix:
        strict = size * torch.randn(count, r, r, generator=generator, **double) / r**0.5
        blocks.append(torch.eye(r, **double) + (strict.tril(-1) if lower else strict.triu(1)))
        count *= r
    return blocks


def bases(radix, lower, size=0.6):
    return [random_blocks(radix, lower, size) for _ in range(3)]


plain = CausalMonarch.identity(n, (8, 4), **double)
fourier_blocks = bases((8, 4), lower=True)
fourier = CausalMonarch.from_blocks(fourier_blocks, n, "fourier")
chebyshev = CausalMonarch.from_blocks(bases((8, 8), lower=False), n, "chebyshev")
assert torch.allclose(plain.toeplitz(kernel).to_dense(), CausalToeplitz(kernel).to_dense(), atol=1e-12)

# %%
# A mutant
# --------
#
# Of scheme "fourier" the first n basis polynomials have degrees below n, so that those of products stay below
# N = 2 n, the number of nodes. The mutant's top digit has degrees up to its number of values: its blocks are still
# lower triangular, but products wrap around modulo Z^N - 1 and the future reaches the past.


def mutant_matrix(blocks, k):
    """M_0^-1 diag(M_1 k) M_2 by dense evaluation at the 2 n roots of unity, of blocks with a larger top digit."""
    N = 2 * n
    roots = torch.exp(-2j * torch.pi * torch.arange(N, **double) / N)
    powers = roots[:, None] ** torch.arange(N, **double)
    values = []
    for low, top in blocks:
        # q_j = phi_{j_0}(Z) phi_{j_1 | j_0}(Z^8), column j_0 + 8 j_1
        first = powers[:, :8].unsqueeze(-2) @ low[0].to(powers.dtype)
        second = torch.einsum("zd,wdj->zjw", powers[:, ::8][:, : top.shape[-1]], top.to(powers.dtype))
        values.append((first * second).flatten(1))
    M_0, M_1, M_2 = values
    return torch.linalg.solve(M_0, (M_1[:, :n] @ k.to(M_1.dtype))[:, None] * M_2[:, :n]).real[:n]


mutants = []
for low, top in fourier_blocks:
    larger = torch.eye(8, **double).repeat(8, 1, 1)
    larger[:, :4, :4] = top
    larger[:, 4:, :4] = 0.3 * torch.randn(8, 4, 4, generator=generator, **double)  # the degrees that are too high
    mutants.append((low, larger))

pictures = {
    "identity: plain convolution": plain.toeplitz(kernel).to_dense(),
    'scheme "fourier"': fourier.toeplitz(kernel).to_dense(),
    'scheme "chebyshev"': chebyshev.toeplitz(kernel).to_dense(),
    "mutant: degrees too high": mutant_matrix(mutants, kernel),
}
fig, axes = plt.subplots(1, 4, figsize=(11, 3.5))
for ax, (title, J) in zip(axes, pictures.items(), strict=True):
    upper = float(J.triu(1).norm() / J.norm())
    scale = 0.7 * float(J.abs().max())
    ax.imshow(J, cmap="RdBu", vmin=-scale, vmax=scale, interpolation="nearest")
    ax.plot([-0.5, n - 0.5], [-0.5, n - 0.5], color="0.4", lw=0.5)
    ax.set_title(f"{title}\nabove the diagonal: {upper:.0e}", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
fig.tight_layout()

# %%
# Fitting a causal family
# -----------------------
#
# A convolution that forgets: whatever crosses a border between two blocks of eight steps is multiplied by 0.6. It is
# linear in k and in u, causal, and no convolution. Coefficients are found from samples; the search starts at the plain
# convolution and never ends worse.

block = torch.arange(n) // 8
forget = 0.6 ** (block[:, None] - block).clamp(min=0).double()
k = torch.randn(40, n, generator=generator, **double)
W = CausalToeplitz(k).to_dense() * forget
fit = fit_causal_monarch(k[:, None], torch.eye(n, **double), W.mT.contiguous(), radix=(8, 4), steps=60)
print(f"error {fit.error:.3f}, plain convolution {fit.plain_error:.3f}")
print("condition numbers", [f"{c:.1f}" for c in fit.matrix.conditioning().cond])

target = CausalToeplitz(kernel).to_dense() * forget
found = fit.matrix.toeplitz(kernel).to_dense()
fig, axes = plt.subplots(1, 3, figsize=(8.5, 3.4))
shown = {"the family": target, "fitted": found, "difference": target - found}
for ax, (title, J) in zip(axes, shown.items(), strict=True):
    scale = 0.7 * float(target.abs().max())
    ax.imshow(J, cmap="RdBu", vmin=-scale, vmax=scale, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
fig.tight_layout()
