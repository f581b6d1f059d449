"""Bytes of a text file on the device, and windows of them."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.training import autocast


def read_bytes(path: Path) -> Tensor:
    """The bytes of a text file, unpacked if it ends in .xz or .gz."""
    openers = {".xz": lzma.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


class Text:
    """A text, split at 95 %: windows for training are drawn from the first part, those held out lie in the second.

    Args:
        data: bytes.
        context: bytes that a model sees; windows have one more.
        held: how many held-out windows at most, side by side or at equal distances.
        device: where the bytes are to be.
    """

    def __init__(self, data: Tensor, context: int, held: int, device: torch.device) -> None:
        split = int(0.95 * len(data))
        if len(data) - split <= context:
            raise ValueError(f"the text must have more than {20 * context} bytes, got {len(data)}")
        self.bytes, self.context, self.split = data.to(device), context, split
        first, last = split, len(data) - context - 1
        count = min(held, 1 + (last - first) // context)
        self.held = torch.linspace(first, last, count, dtype=torch.float64).long().to(device)
        self.within = torch.arange(context + 1, device=device)

    def windows(self, starts: Tensor) -> Tensor:
        """Bytes (batch, context + 1) from these places on."""
        return self.bytes[starts[:, None] + self.within].long()

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module, batch: int) -> float:
        """The mean over all bytes of the held-out windows, each seen with those before it in its window."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.bytes.device)
        for starts in self.held.split(batch):
            with autocast(self.bytes.device):
                total += loss_of(model, self.windows(starts)).double() * len(starts)
        model.train()
        return total.item() / len(self.held) / math.log(2)


def loss_of(run: Callable[..., Tensor], windows: Tensor) -> Tensor:
    """Cross-entropy of the next byte."""
    logits = run(windows[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class TextPlan:
    """Where the windows of some steps begin, drawn on the device."""

    def __init__(self, text: Text, batch: int, steps: int, seed: int) -> None:
        device = text.bytes.device
        self.text, self.steps = text, steps
        self.starts = torch.zeros((steps, batch), dtype=torch.long, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self) -> None:
        """Draw the windows of the next steps, in place."""
        last = self.text.split - self.text.context - 1
        device = self.starts.device
        self.starts.copy_(torch.randint(0, last + 1, self.starts.shape, device=device, generator=self.generator))

    def windows(self, step: Tensor) -> Tensor:
        """The windows of a step, a tensor of one element."""
        return self.text.windows(self.starts.index_select(0, step).squeeze(0))

    def loss(self, run: Callable[..., Tensor], step: Tensor) -> Tensor:
        """The loss of a model on the windows of a step."""
        return loss_of(run, self.windows(step))
