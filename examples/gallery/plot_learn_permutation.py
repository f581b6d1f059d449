r"""
Learning a permutation of pixels
================================

The pixels of all images have been scrambled by one unknown permutation. With pairs of a clear and a scrambled image it
is found by linear assignment, whatever it is. Without pairs a relaxed permutation is trained until the scrambled images
have the statistics of clear ones; scrambled images as a test of learned permutations come from Dao et al. 2020,
"Kaleidoscope: an efficient, learnable representation for all structured linear maps".
"""

import matplotlib.pyplot as plt
import torch

from structmat import Permutation, transforms
from structmat.nn import LearnablePermutation

torch.manual_seed(0)
side = 16
n = side * side


def images(count):
    """Three soft ellipses of random places, sizes and shades in each, flattened."""
    grid = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    total = torch.zeros(count, side, side)
    for _ in range(3):
        centre, radius = torch.rand(2, count, 1, 1) * 1.6 - 0.8, torch.rand(2, count, 1, 1) * 0.5 + 0.25
        distance = ((x - centre[0]) / radius[0]).square() + ((y - centre[1]) / radius[1]).square()
        total += (torch.rand(count, 1, 1) * 2 - 1) * torch.sigmoid(6 * (1 - distance))
    return total.flatten(1)


def show(rows):
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, 1.1 * len(rows)))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture.view(side, side), cmap="gray", vmin=-1.2, vmax=1.2)
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    figure.tight_layout()


# %%
# With pairs
# ----------
#
# Any of the 256! permutations: the one under which the pixels of 50 pairs correlate best is the solution of a linear
# assignment problem, and there is nothing to train. :meth:`structmat.Permutation.from_dense` solves it.

hidden = Permutation.random((n, n))
clear = images(50)
scrambled = hidden.linear(clear)
found = Permutation.from_dense(scrambled.mT @ clear)
print("found from pairs:", torch.equal(found.perm, hidden.perm))
assert torch.equal(found.perm, hidden.perm)
show({"clear": clear[:8], "scrambled": scrambled[:8], "restored": found.mT.linear(scrambled[:8])})

# %%
# Without pairs
# -------------
#
# Now there are 2000 scrambled images and 2000 others that are clear. A permutation P that restores the images turns the
# second moments C of scrambled pixels into those of clear ones, P C P^T. Its difference to these is differentiable in a
# relaxed permutation. (Smoothness of the restored images would be no criterion: an undecided permutation blurs them.)
#
# :class:`~structmat.nn.LearnablePermutation` knows 8^7 permutations of this size, among them bit reversal, by which the
# images are scrambled here. Most starts end in the same wrong one; the loss says so, and another is made.

hidden = transforms.bit_reversal(n)
clear, scrambled = images(2000), hidden.linear(images(2000))
wanted, given = clear.mT @ clear / len(clear), scrambled.mT @ scrambled / len(scrambled)

curves = []
for _ in range(20):
    layer, curve = LearnablePermutation(n), []
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.15)
    for _ in range(70):
        P = layer.to_dense()
        loss = (P @ given @ P.mT - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    curves.append(curve)
    print(f"start {len(curves)}: loss {curve[-1]:.3f}, entropy of the choices {layer.entropy().item():.2f}")
    if curve[-1] < 0.05:
        break
assert curves[-1][-1] < 0.05

# %%
# New images, scrambled and restored. Second moments do not tell such images from their mirror images: that one of the
# eight symmetries of the square is taken that fits; but for it, every pixel is in its place.

fresh = images(8)
restored = layer.permutation().linear(hidden.linear(fresh)).view(-1, side, side)
symmetries = [s.rot90(k, (1, 2)).flatten(1) for s in (restored, restored.mT) for k in range(4)]
matching = [torch.equal(s, fresh) for s in symmetries]
print("restored without pairs:", any(matching))
assert any(matching)

show({"clear": fresh, "scrambled": hidden.linear(fresh), "restored": restored.flatten(1)})

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=[1.5, 1])
for curve in curves:
    left.semilogy(curve, color="tab:blue" if curve is curves[-1] else "0.7")
left.set_xlabel("step")
left.set_ylabel("misfit of second moments")
right.imshow(layer.to_dense().detach() ** 0.5, cmap="Greys")
right.set_title("the relaxed permutation at the end", fontsize=9)
right.set_xticks([])
right.set_yticks([])
figure.tight_layout()
plt.show()
