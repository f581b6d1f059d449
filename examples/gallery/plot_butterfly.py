r"""
Butterfly matrices
==================

What the factors of a butterfly matrix look like, how they merge, and what a product costs. The page
:doc:`/butterfly` explains the family.
"""

import time

import matplotlib.pyplot as plt
import torch

from structmat import Butterfly, Chain, KroneckerSparse
from structmat.testing import relative_error

torch.manual_seed(0)

# %%
# The supports of the factors
# ---------------------------
#
# A factor of pattern (a, b, c, d) has the support I_a (x) 1_{b x c} (x) I_d. From left to right the strides shrink and
# the diagonal blocks multiply. Their product is full.


def draw_supports(chain, title):
    figure, axes = plt.subplots(1, len(chain) + 1, figsize=(2.2 * (len(chain) + 1), 2.6))
    product = Butterfly.from_chain(chain, dtype=torch.float64)
    pictures = [(f"{tuple(p)}", KroneckerSparse(torch.ones(p)).to_dense()) for p in chain]
    for ax, (name, dense) in zip(axes, [*pictures, ("product", product.to_dense())], strict=True):
        ax.imshow(dense != 0, cmap="Blues", vmin=0, vmax=1.4)
        ax.set_title(name, fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()


draw_supports(Chain.dyadic(32), "n = 32 = 2 2 2 2 2: four hundred numbers in place of a thousand")

# %%
# Other sizes have other radices, and rectangular ones. Nothing is padded.

draw_supports(Chain.mixed_radix([5, 3, 2]), "n = 30 = 5 3 2")
draw_supports(Chain.mixed_radix([(2, 3), (2, 2), (3, 2)]), "12 x 12 by rectangular blocks 2 x 3, 2 x 2, 3 x 2")
draw_supports(Chain.dyadic(32, rank=2), "n = 32, blocks of rank 2")

# %%
# Few stages instead of many levels
# ---------------------------------
#
# Neighbouring factors merge exactly. For n = 4096 the twelve levels become two stages of blocks of 64 x 64. The merge
# is a part of every product; so its cost counts below, where the product with 256 vectors is timed on one thread.

n, rows = 4096, 256
B = Butterfly.random((n, n))
x = torch.randn(rows, n)


def level_by_level(x):
    for factor in reversed(B.factors):
        x = factor.linear(x)
    return x


def milliseconds(function):
    function(x)
    start = time.perf_counter()
    for _ in range(3):
        function(x)
    return 1e3 * (time.perf_counter() - start) / 3


with torch.no_grad():
    dense = B.to_dense()
    print(f"difference of both ways: {relative_error(B.linear(x), level_by_level(x)):.1e}")
    times = {
        "dense": milliseconds(lambda x: x @ dense.mT),
        "twelve levels": milliseconds(level_by_level),
        "two stages": milliseconds(B.linear),
    }
for name, value in times.items():
    print(f"{name:14} {value:8.1f} ms")

# %%
# Learning a transform
# --------------------
#
# The Hadamard transform of size 16, from random pairs of inputs and outputs, by gradient descent on the factors.

size = 16
H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
target = torch.ones(1, 1)
for _ in range(4):
    target = torch.kron(target, H)
target /= size**0.5
learned = Butterfly.random((size, size)).requires_grad_()
optimizer = torch.optim.Adam(list(learned.tensors()), lr=0.02)
errors = []
for _ in range(1500):
    batch = torch.randn(64, size)
    loss = (learned.linear(batch) - batch @ target.mT).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    errors.append(relative_error(learned.to_dense(), target))
print(f"relative error after {len(errors)} steps: {errors[-1]:.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
left.semilogy(errors)
left.set_xlabel("step")
left.set_ylabel("relative error")
right.imshow(learned.to_dense().detach(), cmap="RdBu", vmin=-0.4, vmax=0.4)
right.set_title("what was learned", fontsize=9)
right.set_xticks([])
right.set_yticks([])
figure.tight_layout()
plt.show()
