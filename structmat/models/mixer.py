"""MLP-Mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structmat._checks import check_int
from structmat.models._build import Device, Structure, check_images, embed_patches, finish, patch_grid
from structmat.models.blocks import MixerBlock


class MLPMixer(nn.Module):
    """MLP-Mixer for the classification of images.

    Patches are embedded by a convolution, pass ``depth`` blocks of one MLP over tokens and one over channels, are
    averaged and classified. The linear layers of a block are ``blocks.N.tokens.fc1``, ``.tokens.fc2``,
    ``.channels.fc1`` and ``.channels.fc2``.

    Args:
        image_size: number, or (height, width).
        patch_size: number, or (height, width); divides the image.
        num_classes: size of the output.
        channels: of the images.
        dim: channels of a token.
        depth: number of blocks.
        token_hidden: hidden units of the MLPs over tokens; half of dim if None.
        channel_hidden: hidden units of the MLPs over channels; four times dim if None.
        dropout: probability, in the MLPs.
        structure: None for a dense model, one config for every linear layer in the blocks, or a mapping of patterns of
            dotted names to configs, as in :func:`structmat.surgery.replace_`, of which the first match counts; what no
            pattern matches stays dense. A mapping reaches ``head`` too.
        device: where the parameters are made. Structured layers are made directly: no dense weight of theirs exists.
        dtype: their dtype.

    Raises:
        structmat.BudgetError: if a budget of the structure is too small for a layer.
        TypeError: if structure is not a config or a mapping to configs.
        ValueError: if the patch does not divide the image, a structure does not exist for a layer's size, or a pattern
            matches no layer.

    Shape:
        (batch, channels, height, width) to (batch, num_classes).

    Source: Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP architecture for vision".

    Example:
        >>> import torch, structmat
        >>> from structmat.models import MLPMixer
        >>> dense = MLPMixer(28, 7, 10, channels=1, dim=64, depth=2)
        >>> mixer = MLPMixer(28, 7, 10, channels=1, dim=64, depth=2, structure=structmat.MonarchConfig(nblocks=4))
        >>> mixer(torch.ones(5, 1, 28, 28)).shape
        torch.Size([5, 10])
        >>> [sum(p.numel() for p in model.parameters()) for model in (dense, mixer)]
        [72810, 26474]
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        *,
        channels: int = 3,
        dim: int = 512,
        depth: int = 8,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        dropout: float = 0.0,
        structure: Structure | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.image_size, patch, (rows, columns) = patch_grid(image_size, patch_size)
        self.channels = check_int("channels", channels)
        check_int("dim", dim)
        hidden = (
            max(dim // 2, 1) if token_hidden is None else token_hidden,
            4 * dim if channel_hidden is None else channel_hidden,
        )
        with torch.device("meta"):
            self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
            self.blocks = nn.Sequential(
                *(MixerBlock(rows * columns, dim, *hidden, dropout) for _ in range(check_int("depth", depth)))
            )
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, check_int("num_classes", num_classes))
        finish(self, structure, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (batch, channels, height, width) to logits of shape (batch, num_classes)."""
        check_images(x, self.channels, self.image_size)
        return self.head(self.norm(self.blocks(embed_patches(self.patches, x))).mean(1))
