r"""
Long convolutions
=================

What the filters of a long convolution look like, which matrix they stand for, how they are learned, and how an input
that comes piece by piece is convolved without redoing anything. The page :doc:`/long_convolution` explains the layers.
"""

import matplotlib.pyplot as plt
import torch

from structmat.nn import ExplicitFilter, ImplicitFilter, LongConv
from structmat.nn.longconv import long_convolution
from structmat.testing import relative_error

torch.manual_seed(0)
length = 512

# %%
# Filters and their matrices
# --------------------------
#
# An implicit filter computes its taps from their positions by a small network of sines, under a decay that is faster
# from channel to channel. An explicit one has the taps as parameters. Either way a channel is multiplied by a
# triangular Toeplitz matrix; with filters in both directions by a full one.

filters = {"implicit": ImplicitFilter(64, length), "explicit": ExplicitFilter(64, length)}
fig, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
for ax, (name, make) in zip(axes, filters.items(), strict=False):
    taps = make()[0].detach()
    for channel in (0, 24, 48):
        ax.plot(taps[channel], linewidth=0.8, label=f"channel {channel}")
    ax.set(title=f"{name}: initial taps", xlabel="position")
    ax.legend(fontsize=8)
for ax, mode in zip(axes[2:], ("causal", "bidirectional"), strict=True):
    matrix = LongConv(64, 48, mode=mode, skip=False).matrix(channel=8).to_dense().detach()
    ax.imshow(matrix, cmap="RdBu", vmin=-matrix.abs().max(), vmax=matrix.abs().max())
    ax.set(title=f"{mode}: the matrix of a channel", xticks=[], yticks=[])
plt.show()

# %%
# Learning a filter
# -----------------
#
# A room answers a click with echoes. Given noise and what is heard of it, both filters find the echoes in 300 steps of
# Adam. For one channel the explicit filter is the simpler one: the convolution is linear in its taps, each is learned
# by itself. The implicit one pays with many channels, which share its network and positions.

position = torch.arange(length)
echo = torch.zeros(length)
for delay, size in ((0, 1.0), (60, -0.6), (150, 0.5), (300, 0.3)):
    after = (position - delay).clamp(min=0)
    echo += size * (position >= delay) * torch.exp(-after / 12) * torch.cos(after / 4)


def train(filter, lr):
    layer = LongConv(1, length, filter=filter, skip=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    losses = []
    for _ in range(300):
        noise = torch.randn(16, 1, length)
        heard = long_convolution(noise, echo[None])
        loss = (layer(noise) - heard).square().mean() / heard.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return layer, losses


trained = {
    "explicit": train(ExplicitFilter(1, length), 2e-2),
    "implicit": train(ImplicitFilter(1, length, width=64, features=33, fast_decay=1.5), 3e-3),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=[1, 1.6], layout="constrained")
right.plot(echo, color="0.7", linewidth=4, label="the room")
for name, (layer, losses) in trained.items():
    left.semilogy(losses, label=f"{name}, {sum(p.numel() for p in layer.parameters()):,} parameters")
    right.plot(layer.taps()[0, 0].detach(), linewidth=1, label=name)
    print(f"{name}: relative squared error {losses[0]:.3f} -> {losses[-1]:.1e}")
left.set(xlabel="step", ylabel="relative squared error")
left.legend(fontsize=8)
right.set(xlabel="position", title="taps")
right.legend(fontsize=8)
plt.show()

# %%
# The input piece by piece
# ------------------------
#
# A state holds what came before and the taps. Any cut into pieces gives the outputs of the whole, to rounding, and the
# buffer grows by doubling; the filter is computed once.

layer = LongConv(64, length)
u = torch.randn(2, 64, length)
with torch.no_grad():
    whole = layer(u)
    y, state = layer.prefill(u[..., :200])
    outputs, room = [y], [state.history.shape[-1]]
    y, state = layer.prefill(u[..., 200:300], state)
    outputs.append(y)
    for t in range(300, length):
        y, state = layer.step(u[..., t], state)
        outputs.append(y.unsqueeze(-1))
        room.append(state.history.shape[-1])
streamed = torch.cat(outputs, -1)
print(f"relative difference {relative_error(streamed, whole):.1e}; rooms of the buffer: {sorted(set(room))}")

# %%
# The transform as block products
# -------------------------------
#
# ``algorithm="monarch"`` computes the same by products with small DFT matrices, two to four of them.

for order in (2, 3, 4):
    same = long_convolution(u, layer.taps()[0], skip=layer.skip, algorithm="monarch", order=order)
    print(f"order {order}: relative difference {relative_error(same, whole):.1e}")
