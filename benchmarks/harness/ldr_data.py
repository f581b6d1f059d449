"""Fashion-MNIST as vectors on a device: as it is, or each image rotated and noise added to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.images import PARTS, read_idx

#: The data sets, in the order of the tables.
PLAIN, TURNED = "Fashion-MNIST", "rotated and noisy"
VARIANTS = (PLAIN, TURNED)
#: Noise is uniform from 0 to this, of pixels from 0 to 1.
NOISE = 0.5
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Flat:
    """Vectors (count, n) and labels (count,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def of(self, chosen: Tensor) -> Flat:
        """The chosen ones."""
        return Flat(self.x[chosen], self.y[chosen])


def turn(images: Tensor, seed: int) -> Tensor:
    """Images (count, 1, side, side) rotated by angles from the full circle, with noise, cut off at 1."""
    generator = torch.Generator(images.device).manual_seed(seed)
    options = {"device": images.device, "generator": generator}
    angles = 2 * math.pi * torch.rand(len(images), **options)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).unflatten(1, (2, 3))
    parts = []
    for some, how in zip(images.split(10_000), theta.split(10_000), strict=True):
        turned = F.grid_sample(some, F.affine_grid(how, list(some.shape), align_corners=False), align_corners=False)
        parts.append((turned + NOISE * torch.rand(some.shape, **options)).clamp(max=1))
    return torch.cat(parts)


def load(folder: Path, variant: str, device: torch.device, count: int | None, side: int) -> tuple[Flat, Flat]:
    """Training and test vectors, with the training vectors' mean taken off and divided by their deviation.

    Args:
        folder: with the idx files.
        variant: one of ``VARIANTS``.
        device: where the vectors are to be, and the rotations are made: the noise depends on it.
        count: take the first ones of each only.
        side: of the images; smaller ones are means over pixels.
    """
    found: list[Flat] = []
    for seed, part in enumerate(PARTS):
        images, labels = (read_idx(folder, f"{part}-{name}-ubyte")[:count] for name in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            shapes = f"{[*images.shape]} and {[*labels.shape]}"
            raise ValueError(f"{folder}: {part} must have images with a label each, got shapes {shapes}")
        pixels = F.adaptive_avg_pool2d(images.to(device).unsqueeze(1).float() / 255, side)
        found.append(Flat((turn(pixels, seed) if variant == TURNED else pixels).flatten(1), labels.long().to(device)))
    mean, std = found[0].x.mean(), found[0].x.std()
    train, test = (Flat((part.x - mean) / std, part.y) for part in found)
    return train, test


def held_out(train: Flat) -> tuple[Flat, Flat]:
    """A random sixth of the training data held out, the same one at each call: (the rest, it)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.y.device)
    return train.of(order[len(train) // 6 :]), train.of(order[: len(train) // 6])


class Plan:
    """The batches of an epoch, drawn on the device."""

    def __init__(self, data: Flat, batch: int, seed: int) -> None:
        self.data, self.batch = data, min(batch, len(data))
        self.steps = len(data) // self.batch
        self.order = torch.zeros(self.steps, self.batch, dtype=torch.long, device=data.y.device)
        self.generator = torch.Generator(data.y.device).manual_seed(seed)

    def draw(self) -> None:
        """Draw the next epoch, in place."""
        shuffled = torch.randperm(len(self.data), device=self.order.device, generator=self.generator)
        self.order.copy_(shuffled[: self.order.numel()].view_as(self.order))

    def loss(self, run: Callable[..., Tensor], step: Tensor) -> Tensor:
        """Cross-entropy on the batch of a step, a tensor of one element; in float32, because FFTs have no bfloat16."""
        some = self.data.of(self.order.index_select(0, step).squeeze(0))
        with torch.autocast(self.order.device.type, enabled=False):
            return F.cross_entropy(run(some.x), some.y)


def made_up(side: int, count: int, device: torch.device) -> Flat:
    """Random vectors, for times."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, side * side, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return Flat(x.to(device), y.to(device))
