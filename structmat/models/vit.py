"""Vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structmat._checks import check_int
from structmat.models._build import Device, Structure, check_dropout, check_images, embed_patches, finish, patch_grid
from structmat.models.attention import attention_core
from structmat.models.blocks import TransformerBlock


class VisionTransformer(nn.Module):
    """Vision transformer (ViT) for the classification of images.

    Patches are embedded by a convolution, get learned positions, pass ``depth`` transformer blocks and are classified
    by their class token, or by their mean. The linear layers of a block are ``blocks.N.attention.qkv``,
    ``.attention.out``, ``.mlp.fc1`` and ``.mlp.fc2``.

    Args:
        image_size: number, or (height, width).
        patch_size: number, or (height, width); divides the image.
        num_classes: size of the output.
        channels: of the images.
        dim: channels of a token.
        depth: number of blocks.
        heads: of the attention; divides dim.
        hidden: hidden units of the MLPs; four times dim if None.
        class_token: whether a token of its own stands before the patches; without it the patches are averaged.
        dropout: probability, after attention and in the MLPs.
        attention_mask: None for full attention, or a boolean grid (g, g) of blocks of tokens that see each other, g
            dividing the number of tokens; see :class:`BlockSparseAttention`. The class token is the first of the
            tokens: ``class_token=False`` leaves a number that divides more often.
        structure: as for :class:`MLPMixer`.
        device: where the parameters are made. Structured layers are made directly: no dense weight of theirs exists.
        dtype: their dtype.

    Raises:
        structmat.BudgetError: if a budget of the structure is too small for a layer.
        TypeError: if structure is not a config or a mapping to configs, or the mask is not boolean.
        ValueError: if the patch does not divide the image, heads does not divide dim, the mask does not fit, a
            structure does not exist for a layer's size, or a pattern matches no layer.

    Shape:
        (batch, channels, height, width) to (batch, num_classes).

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words".

    Example:
        >>> import torch, structmat
        >>> from structmat.models import VisionTransformer
        >>> structure = {"*.mlp.*": structmat.LowRankConfig(ratio=0.25)}
        >>> vit = VisionTransformer((32, 48), 8, 10, dim=64, depth=2, heads=4, structure=structure)
        >>> vit(torch.ones(5, 3, 32, 48)).shape
        torch.Size([5, 10])
        >>> type(vit.blocks[0].mlp.fc1).__name__, type(vit.blocks[0].attention.qkv).__name__
        ('LowRankLinear', 'Linear')
    """

    class_token: nn.Parameter | None

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        *,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        class_token: bool = True,
        dropout: float = 0.0,
        attention_mask: Tensor | None = None,
        structure: Structure | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.image_size, patch, (rows, columns) = patch_grid(image_size, patch_size)
        self.channels = check_int("channels", channels)
        tokens = rows * columns + bool(class_token)
        hidden = 4 * check_int("dim", dim) if hidden is None else hidden
        core = attention_core(attention_mask, tokens, causal=False, device=device)
        with torch.device("meta"):
            self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
            self.register_parameter("class_token", nn.Parameter(torch.empty(dim)) if class_token else None)
            self.positions = nn.Parameter(torch.empty(tokens, dim))
            self.dropout = nn.Dropout(check_dropout(dropout))
            self.blocks = nn.Sequential(
                *(TransformerBlock(dim, heads, hidden, core, dropout) for _ in range(check_int("depth", depth)))
            )
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, check_int("num_classes", num_classes))
        finish(self, structure, device, dtype)

    def reset_parameters(self) -> None:
        """Draw new positions and a new class token; no other parameter changes."""
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (batch, channels, height, width) to logits of shape (batch, num_classes)."""
        check_images(x, self.channels, self.image_size)
        x = embed_patches(self.patches, x)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), 1)
        x = self.norm(self.blocks(self.dropout(x + self.positions)))
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])
