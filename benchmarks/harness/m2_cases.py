"""M2 models and transformers of as many parameters, and the data that both are trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.images import ImagePlan, Images, load
from harness.text import Text, TextPlan, read_bytes
from structmat.models import GPT, VisionTransformer
from structmat.models.m2 import M2GPTConfig, M2GPTForCausalLM, M2ViTConfig, M2ViTForImageClassification
from structmat.models.tasks import IGNORED, associative_recall

RECALL_PAIRS, RECALL_VOCABULARY = 8, 512


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its task."""

    task: str  # "text", "images" or "recall", in the tables with the size: "text, 5M, 512"
    size: str
    model: str  # "attention" or "M2"
    dim: int
    depth: int
    length: int  # bytes or tokens of a sequence, patches of an image
    batch: int
    heads: int = 4

    @property
    def name(self) -> str:
        """The task with its size."""
        return ", ".join(part for part in (self.task, self.size, str(self.length)) if part)

    @property
    def unit(self) -> tuple[str, int]:
        """What a throughput counts, and how many a batch has."""
        return ("images", self.batch) if self.task == "images" else ("tokens", self.batch * self.length)

    def make(self, device: torch.device | str, seed: int) -> nn.Module:
        """The model, from inputs to logits."""
        torch.manual_seed(seed)
        dim, depth = self.dim, self.depth
        vocabulary = {"text": 256, "recall": RECALL_VOCABULARY}.get(self.task, 0)
        if self.model == "attention" and vocabulary:
            return GPT(vocabulary, self.length, dim=dim, depth=depth, heads=self.heads, device=device)
        patch = round(28 / math.sqrt(self.length))
        if self.model == "attention":
            options: dict[str, Any] = {"channels": 1, "heads": self.heads, "class_token": False, "device": device}
            return VisionTransformer(28, patch, 10, dim=dim, depth=depth, **options)
        sizes = {"hidden_size": dim, "num_hidden_layers": depth, "intermediate_size": 4 * dim, "hidden_dropout_prob": 0}
        if vocabulary:
            config = M2GPTConfig(vocabulary, self.length, **sizes)
            return Logits(M2GPTForCausalLM(config), use_cache=False).to(device)
        config = M2ViTConfig(image_size=28, patch_size=patch, num_channels=1, num_labels=10, **sizes)
        return Logits(M2ViTForImageClassification(config)).to(device)


class Logits(nn.Module):
    """A model of transformers' kind that gives its logits alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.options).logits


def cases(smoke: bool = False) -> list[Case]:
    """Pairs of models of nearly as many parameters; of 512 and 4096 bytes, batches of as many."""
    if smoke:
        small = [("text", "tiny", 32, 2), ("recall", "", 64, 2), ("images", "", 16, 4)]
        return [Case(*s[:2], model, 32, 1, *s[2:], heads=2) for s in small for model in ("attention", "M2")]
    return [
        Case("text", "5M", "attention", 256, 6, 512, 64),
        Case("text", "5M", "M2", 304, 6, 512, 64),
        Case("text", "5M", "attention", 256, 6, 4096, 8),
        Case("text", "5M", "M2", 320, 6, 4096, 8),
        Case("text", "30M", "attention", 512, 10, 512, 64, heads=8),
        Case("text", "30M", "M2", 640, 10, 512, 64),
        Case("text", "30M", "attention", 512, 10, 4096, 8, heads=8),
        Case("text", "30M", "M2", 672, 10, 4096, 8),
        Case("recall", "", "attention", 64, 2, 64, 256),
        Case("recall", "", "M2", 64, 2, 64, 256),
        Case("images", "", "attention", 256, 4, 49, 512),
        Case("images", "", "M2", 272, 4, 49, 512),
    ]


class RecallPlan:
    """Batches of associative recall, drawn on the device."""

    def __init__(self, batch: int, length: int, steps: int, seed: int, device: torch.device) -> None:
        self.steps, self.sizes, self.length = steps, (steps, batch, length), length
        self.generator = torch.Generator(device).manual_seed(seed)
        self.tokens, self.labels = (torch.zeros(self.sizes, dtype=torch.long, device=device) for _ in range(2))

    def draw(self) -> None:
        """Draw the next steps, in place."""
        count = self.sizes[0] * self.sizes[1]
        options: dict[str, Any] = {"pairs": RECALL_PAIRS, "vocab_size": RECALL_VOCABULARY, "generator": self.generator}
        for kept, drawn in zip(
            (self.tokens, self.labels), associative_recall(count, self.length, **options), strict=True
        ):
            kept.copy_(drawn.view(self.sizes))

    def loss(self, run: Callable[..., Tensor], step: Tensor) -> Tensor:
        """Cross-entropy of the queries' values."""
        tokens, labels = (t.index_select(0, step).squeeze(0) for t in (self.tokens, self.labels))
        return nn.functional.cross_entropy(run(tokens).float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of the queries of all batches that are answered rightly, in percent."""
        right = sum(
            (model(t).argmax(-1) == y)[y != IGNORED].sum() for t, y in zip(self.tokens, self.labels, strict=True)
        )
        return 100 * float(right) / int((self.labels != IGNORED).sum())


_loaded: dict[Any, Any] = {}


def text_of(case: Case, path: Path, held: int, device: torch.device) -> Text:
    """The text, read once in a process."""
    key = path, case.length, held, str(device)
    if key not in _loaded:
        _loaded[key] = Text(read_bytes(path), case.length, held, device)
    return _loaded[key]


def images_of(folder: Path, count: int | None, device: torch.device) -> tuple[Images, Images]:
    """Training and test images, read once in a process."""
    key = folder, count, str(device)
    if key not in _loaded:
        _loaded[key] = load(folder, device, count)
    return _loaded[key]


Plan = TextPlan | RecallPlan | ImagePlan
