"""The models of the training benchmarks, dense or structured, with their parameters counted."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

import torch
from torch import nn

from harness.structures import Shapes, configs, parameters
from structmat.models import GPT, MLPMixer, VisionTransformer


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's size; which of it a kind uses is in :meth:`make`."""

    kind: str  # "mixer", "vit" or "gpt"
    dim: int
    depth: int
    batch: int
    image: int = 28
    patch: int = 4
    heads: int = 4
    token_hidden: int = 128
    context: int = 256

    @property
    def layers(self) -> str:
        """The layers that become structured: of a Mixer those over channels, which are nearly all there is.

        Its matrices over tokens, 49 x 128 or so, are too small for blocks of 16, and stay dense.
        """
        return "blocks.*.channels.*" if self.kind == "mixer" else "blocks.*"

    def make(self, structure: Any, device: torch.device | str) -> nn.Module:
        """The model with this structure."""
        options: dict[str, Any] = {"dim": self.dim, "depth": self.depth, "structure": structure, "device": device}
        if self.kind == "mixer":
            return MLPMixer(self.image, self.patch, 10, channels=1, token_hidden=self.token_hidden, **options)
        if self.kind == "vit":
            options |= {"channels": 1, "heads": self.heads, "class_token": False}
            return VisionTransformer(self.image, self.patch, 10, **options)
        if self.kind == "gpt":
            return GPT(256, self.context, heads=self.heads, **options)
        raise ValueError(f"kind must be mixer, vit or gpt, got {self.kind!r}")

    def shapes(self) -> Shapes:
        """(out, in) of the layers that become structured."""
        linear = ((n, m) for n, m in self.make(None, "meta").named_modules() if isinstance(m, nn.Linear))
        return {n: (m.out_features, m.in_features) for n, m in linear if fnmatch.fnmatchcase(n, self.layers)}


def build(
    size: Size, structure: str, ratio: float, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with weights from a seed, and what it has: parameters, and the structure of a block's layers."""
    shapes = size.shapes()
    found = configs(structure, ratio, shapes)
    torch.manual_seed(seed)
    model = size.make(found, device)
    weights = parameters(found, shapes)
    facts: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "layer_params": weights,
        "share": round(weights / parameters(None, shapes), 4),
    }
    first = {name: config.to_dict() for name, config in (found or {}).items() if name.startswith("blocks.0.")}
    facts["layers"] = {n: {k: v for k, v in c.items() if v is not None} for n, c in first.items()}
    return model, facts
