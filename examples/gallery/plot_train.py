r"""
Train a structured layer
========================

Replace ``nn.Linear`` by a structured layer in a small network, train it, and compare with what else the same number
of parameters buys: low-rank layers, block-diagonal layers, and a narrower dense network. The last is the comparison
that is easily forgotten.

The task is made here: name the frequency of a sine wave of unknown phase, among 64 frequencies, in noise of twice its
power. The best classifier is known: it takes a Fourier transform and compares 64 energies, so that 128 directions of
the input matter. Monarch layers pass them all; low-rank layers of rank 16 pass 16. Other tasks order the structures
otherwise: measure on yours.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from structmat.nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear

size, classes, batch_size, steps = 256, 64, 256, 600


def waves(count, generator):
    """Sine waves of amplitude 1 with 1 to 64 turns, in Gaussian noise of standard deviation 1, and their classes."""
    label = torch.randint(classes, (count,), generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    clean = torch.sin(2 * math.pi * (label[:, None] + 1) * torch.arange(size) / size + phase)
    return clean + torch.randn(count, size, generator=generator), label


# %%
# The networks
# ------------
#
# A structured layer is constructed and called as ``nn.Linear`` is. It starts with the same output variance, so that
# learning rates carry over. The block counts and ranks are chosen for about an equal number of parameters; the narrow
# network has dense layers of width 57.


def network(layer, width=size):
    """Three layers made by ``layer(in_features, out_features)``."""
    return nn.Sequential(layer(size, width), nn.ReLU(), layer(width, width), nn.ReLU(), layer(width, classes))


networks = {
    "dense": lambda: network(nn.Linear),
    "Monarch": lambda: network(lambda i, o: MonarchLinear(i, o, nblocks=16, rank=1)),
    "narrow dense": lambda: network(nn.Linear, width=57),
    "low rank": lambda: network(lambda i, o: LowRankLinear(i, o, rank=16)),
    "block diagonal": lambda: network(lambda i, o: BlockDiagonalLinear(i, o, nblocks=7)),
}

# %%
# Training
# --------
#
# Nothing in the loop knows of structures. Every network sees the same 600 batches once, and is measured on 2000 waves
# that it has not seen. All use the same learning rate.

generator = torch.Generator().manual_seed(0)
batches = [waves(batch_size, generator) for _ in range(steps)]
test_waves, test_labels = waves(2000, torch.Generator().manual_seed(1))
accuracy, labels = {}, {}
for name, build in networks.items():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accuracy[name], start = [], time.perf_counter()
    for step, (x, label) in enumerate(batches, start=1):
        loss = nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:
            with torch.no_grad():
                accuracy[name].append((model(test_waves).argmax(1) == test_labels).double().mean().item())
    seconds = time.perf_counter() - start
    count = sum(p.numel() for p in model.parameters())
    labels[name] = f"{name}: {count:,} parameters"
    print(f"{name:15} {count:8,d} parameters   accuracy {accuracy[name][-1]:.3f}   {seconds:.1f} s")

# %%
# At a seventh of the parameters the Monarch network is behind the dense one, and ahead of the narrow one: its layers
# keep the full width. The seconds are those of the machine that built this page; on layers of this size a structured
# network is not faster than the dense one.

fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=[1, 1], layout="constrained")
for name, values in accuracy.items():
    (line,) = left.plot(range(30, steps + 1, 30), values)
    left.text(steps + 10, values[-1], labels[name], color=line.get_color(), va="center", fontsize=9)
left.set(xlabel="step", ylabel="accuracy on unseen waves", xlim=(0, steps), ylim=(0, 1.03))
left.grid(alpha=0.3)

observed, label = waves(1, torch.Generator().manual_seed(3))
turns = label.item() + 1
phase = torch.fft.rfft(observed[0])[turns].angle()
right.plot(observed[0], linewidth=0.8, color="0.6", label="what the network sees")
right.plot(torch.cos(2 * math.pi * turns * torch.arange(size) / size + phase), label=f"the wave in it: {turns} turns")
right.set(title="one of the inputs", xlabel="position", ylim=(-4, 6))
right.legend(loc="upper right", fontsize=9)
plt.show()
