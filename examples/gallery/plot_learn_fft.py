r"""
Recovering the fast Fourier transform
=====================================

The matrix of the discrete Fourier transform has n² entries; Cooley and Tukey wrote it as log2(n) sparse factors after a
permutation. Here these are found in three ways: from the matrix, from samples of its inputs and outputs, and from
samples without knowing the permutation, as in Dao et al. 2019, "Learning fast algorithms for linear transforms using
butterfly factorizations". The page :doc:`/butterfly` explains the family.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb

from structmat import Butterfly, transforms
from structmat.nn import ButterflyLinear, LearnablePermutation
from structmat.testing import relative_error

torch.manual_seed(0)
n = 32
dft = torch.fft.fft(torch.eye(n, dtype=torch.complex128), norm="ortho")

# %%
# From the matrix
# ---------------
#
# The projection splits the matrix by singular value decompositions. There is nothing to tune and nothing to wait for:
# the result is exact, and the right permutation, bit reversal, is found among the known ones.

start = time.perf_counter()
found = Butterfly.from_dense(dft, permutation="search")
butterfly, permutation = found.factors
print(f"{1e3 * (time.perf_counter() - start):.0f} ms, {butterfly.num_params} numbers in place of {dft.numel()}")
print(f"relative error {relative_error(found.to_dense(), dft):.1e}")
assert relative_error(found.to_dense(), dft) < 1e-14
assert torch.equal(permutation.perm, transforms.bit_reversal(n).perm)

# %%
# From samples, by gradient descent
# ---------------------------------
#
# A complex butterfly layer after the fixed permutation; Adam on the squared error, with fresh inputs in every step and
# a step size that falls to zero. That suffices for the last bit: no other method polishes the result.


def train(layer, permute, steps, rate, extra=()):
    groups = [{"params": list(layer.parameters()), "lr": rate}, *extra]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, n, dtype=torch.complex128)
        loss = (layer(permute(x)) - x @ dft.mT).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not extra:
            schedule.step()
        losses.append(loss.item())
    return losses


layer = ButterflyLinear(n, n, bias=False, dtype=torch.complex128)
reversal = transforms.bit_reversal(n, dtype=torch.complex128)
losses = train(layer, reversal.linear, steps=1000, rate=0.02)
learned = layer.weight().detach()
error = relative_error((learned @ reversal).to_dense(), dft)
print(f"relative error {error:.1e} after {len(losses)} steps")
assert error < 1e-12

# %%
# The permutation is learned, too
# -------------------------------
#
# :class:`~structmat.nn.LearnablePermutation` makes three choices at each of four levels: 4096 permutations, relaxed
# into one doubly stochastic matrix. Its logits and the factors are trained together. Not every start succeeds; the loss
# says which, as factors cannot make up for a wrong permutation. The first that does is rounded to a permutation, and
# its factors are trained on. The permutation need not be bit reversal: two inputs that meet in a block of 2 x 2 of the
# rightmost factor, for example, may be swapped if the block's columns are. This freedom is what keeps the relaxed
# permutation undecided.

starts = []
for seed in range(12):
    torch.manual_seed(seed)
    relaxed = LearnablePermutation(n, dtype=torch.float64)
    candidate = ButterflyLinear(n, n, bias=False, dtype=torch.complex128)
    curve = train(candidate, relaxed, 300, 0.02, [{"params": list(relaxed.parameters()), "lr": 0.2}])
    starts.append((float(np.mean(curve[-50:])), curve, relaxed, candidate))
    print(f"start {seed}: loss {starts[-1][0]:.1e}")
    if starts[-1][0] < 1e-2:
        break
_, _, relaxed, candidate = starts[-1]
rounded = relaxed.permutation().to(torch.complex128)
train(candidate, rounded.linear, steps=1000, rate=0.02)
error = relative_error((candidate.weight() @ rounded).to_dense(), dft)
print(f"relative error {error:.1e} with the permutation {rounded.perm.tolist()}")
assert error < 1e-12

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3), width_ratios=[1.6, 1, 1])
left.semilogy(losses, color="black", label="permutation known")
for i, (_, curve, _, _) in enumerate(starts):
    left.semilogy(curve, color="tab:blue", alpha=0.5, label="permutation learned" if i == 0 else None)
left.set_xlabel("step")
left.set_ylabel("mean squared error")
left.legend(fontsize=8)
for ax, dense, title in [
    (middle, relaxed.to_dense(), "relaxed permutation"),
    (right, rounded.to_dense().real, "rounded"),
]:
    ax.imshow(dense.detach(), cmap="Greys", vmin=0, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
figure.tight_layout()

# %%
# The factors beside Cooley and Tukey's
# -------------------------------------
#
# A product does not change if a column of a factor is scaled and the row that meets it is scaled back. Apart from this
# the factors of the Fourier matrix are unique. So they are scaled here as Cooley and Tukey's are: the first entry of
# each row is 1, from the rightmost factor on; what is left goes into the leftmost. Colours are phases, pale ones small.
# In the middle: what was learned, as it is; below: scaled.


def scaled(B):
    values = [f.values.clone() for f in B.factors]
    for i in range(len(values) - 1, 0, -1):
        first = values[i][:, :, 0, :]
        values[i] = values[i] / first[:, :, None, :]
        a, _, c, d = values[i - 1].shape
        values[i - 1] = values[i - 1] * first.reshape(a, 1, c, d)
    return Butterfly(tuple(values))


cooley_tukey = transforms.dft(n, norm="ortho", dtype=torch.complex128).factors[0]
rows = {"Cooley-Tukey": scaled(cooley_tukey), "learned": learned, "learned, scaled": scaled(learned)}
for mine, theirs in zip(rows["learned, scaled"].factors, rows["Cooley-Tukey"].factors, strict=True):
    assert relative_error(mine.values, theirs.values) < 1e-10

figure, axes = plt.subplots(3, len(learned.factors), figsize=(9.5, 6))
for line, (name, B) in zip(axes, rows.items(), strict=True):
    for ax, factor in zip(line, B.factors, strict=True):
        dense = factor.to_dense().numpy()
        size = np.abs(dense) / np.abs(dense).max()
        hue = np.angle(dense) / (2 * np.pi) % 1
        ax.imshow(hsv_to_rgb(np.stack([hue, 0.85 * size**0.5, np.where(size > 0, 0.9, 1)], -1)))
        ax.set_xticks([])
        ax.set_yticks([])
    line[0].set_ylabel(name, fontsize=9)
figure.tight_layout()
plt.show()
