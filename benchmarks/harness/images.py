"""Images from idx files, all on the device as bytes, shifted and flipped there."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARTS = ("train", "t10k")
SHIFT = 2


def read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an idx file, gzipped or not, in the shape that its header says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an idx file of bytes.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {name}[.gz] in {folder}; Debian has it: apt-get install dataset-fashion-mnist")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if data[:3] != b"\0\0\x08" or len(data) - start != math.prod(shape):
        raise ValueError(f"{path} is not an idx file of bytes")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


class Images:
    """A part of a data set on a device: bytes with a border of zeros, and labels.

    Args:
        images: (count, height, width), bytes.
        labels: (count,).
        mean: of the training images' bytes.
        std: theirs.
        device: where they are to be.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float, device: torch.device) -> None:
        self.size = images.shape[-1]
        self.pixels = torch.nn.functional.pad(images, [SHIFT] * 4).to(device)
        self.labels, self.mean, self.std, self.device = labels.long().to(device), mean, std, device
        self.places = torch.arange(self.size, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor, shift: Tensor | None = None, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (batch, 1, height, width) and labels of the chosen ones.

        Args:
            chosen: (batch,).
            shift: (batch, 2), from 0 to twice the border; in the middle by default.
            flip: (batch,), bool: whether to flip them from left to right.
        """
        shift = torch.full((len(chosen), 2), SHIFT, device=self.device) if shift is None else shift
        columns = self.places.expand(len(chosen), -1)
        if flip is not None:
            columns = torch.where(flip[:, None], self.size - 1 - columns, columns)
        rows, columns = self.places + shift[:, :1], columns + shift[:, 1:]
        pixels = self.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((pixels.float() - self.mean) / self.std)[:, None], self.labels[chosen]


def load(folder: Path, device: torch.device, count: int | None = None, pilot: bool = False) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        folder: with the idx files.
        device: where the images are to be.
        count: take the first ones of each only.
        pilot: train on the first half of the training images and test on the second.
    """
    found = []
    for part in PARTS:
        images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
        if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
            shapes = f"{[*images.shape]} and {[*labels.shape]}"
            raise ValueError(f"{folder}: {part} images must be square with a label each, got shapes {shapes}")
        found.append((images, labels))
    if pilot:
        half = len(found[0][1][:count]) // 2
        found = [tuple(part[i * half : (i + 1) * half] for part in found[0]) for i in range(2)]
    found = [(images[:count], labels[:count]) for images, labels in found]
    values = found[0][0].float()
    mean, std = values.mean().item(), values.std().item()
    train, test = (Images(*part, mean, std, device) for part in found)
    return train, test


class ImagePlan:
    """The batches of an epoch, drawn on the device: which images, how far shifted, whether flipped."""

    def __init__(self, images: Images, batch: int, seed: int) -> None:
        self.images, self.batch = images, min(batch, len(images))
        self.steps = len(images) // self.batch
        shape = (self.steps, self.batch)
        device = images.device
        self.order = torch.zeros(shape, dtype=torch.long, device=device)
        self.shift = torch.zeros((*shape, 2), dtype=torch.long, device=device)
        self.flip = torch.zeros(shape, dtype=torch.bool, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self) -> None:
        """Draw the next epoch, in place."""
        options = {"device": self.images.device, "generator": self.generator}
        shuffled = torch.randperm(len(self.images), **options)[: self.order.numel()]
        self.order.copy_(shuffled.view_as(self.order))
        self.shift.copy_(torch.randint(0, 2 * SHIFT + 1, self.shift.shape, **options))
        self.flip.copy_(torch.randint(0, 2, self.flip.shape, **options).bool())

    def batch_of(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of a step, a tensor of one element."""
        order, shift, flip = (t.index_select(0, step).squeeze(0) for t in (self.order, self.shift, self.flip))
        return self.images.take(order, shift, flip)

    def loss(self, run: Callable[..., Tensor], step: Tensor) -> Tensor:
        """Cross-entropy of a model on the batch of a step."""
        x, y = self.batch_of(step)
        return torch.nn.functional.cross_entropy(run(x).float(), y)


def made_up(size: int, count: int, device: torch.device) -> Images:
    """Random images, for times."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(0, 10, (count,), generator=generator), 127.5, 74.0, device)
