"""What the models' constructors share: checks of sizes, and the step from the meta device to memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor
from structmat.config import Config
from structmat.surgery import replace_

Structure = Config | Mapping[str, Config]
Device = torch.device | str | None
#: The linear layers that a config alone makes structured.
BLOCKS = "blocks.*"


def finish(model: nn.Module, structure: Structure | None, device: Device, dtype: torch.dtype | None) -> None:
    """Give a model that was made on the meta device its structured layers, then memory and initial values.

    Structured layers are made where they are to be, so that no dense weight of theirs ever exists. A module with
    parameters of its own resets those, and no others, in ``reset_parameters``.
    """
    place = torch.get_default_device() if device is None else torch.device(device)
    if dtype is not None:
        model.to(dtype)
    if structure is not None:
        configs: Any = structure if isinstance(structure, Mapping) else {BLOCKS: structure}
        unused = replace_(model, configs, device=place).unused_patterns
        if unused:
            names = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            raise ValueError(
                f"patterns of structure that match no layer: {', '.join(unused)}; layers still dense: {names or 'none'}"
            )
    if place.type == "meta":
        return
    for module in model.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=place, recurse=False)
            module.reset_parameters()  # pyright: ignore[reportCallIssue]


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of a number or a pair of numbers."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or (height, width), got {value!r}")
    return check_int(name, pair[0]), check_int(name, pair[1])


def patch_grid(image_size: Any, patch_size: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The image, the patch, and how many patches there are down and across.

    Raises:
        ValueError: if the patch does not divide the image.
    """
    image, patch = check_pair("image_size", image_size), check_pair("patch_size", patch_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(
            f"patch_size must divide image_size, got patches of {patch[0]} x {patch[1]} for images of "
            f"{image[0]} x {image[1]}; pad or resize the images, or choose other patches"
        )
    return image, patch, (image[0] // patch[0], image[1] // patch[1])


def check_images(x: Any, channels: int, image: tuple[int, int]) -> None:
    """Raise unless x is a batch of images of the size that the model was made for."""
    check_tensor("x", x)
    if x.ndim != 4 or x.shape[1:] != (channels, *image):
        raise ValueError(f"x must have shape (batch, {channels}, {image[0]}, {image[1]}), got {tuple(x.shape)}")


def check_dropout(dropout: Any) -> float:
    """Return a probability, or raise."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    return dropout


def embed_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Images (batch, channels, height, width) to patches (batch, patches, dim), row by row."""
    return conv(x).flatten(2).mT
