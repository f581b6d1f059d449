"""M2-ViT: images classified without attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from structmat._checks import check_int
from structmat.models._build import check_images, embed_patches, patch_grid
from structmat.models.m2._base import M2Block, M2PreTrainedModel, label_loss
from structmat.models.m2.configuration import M2ViTConfig


class M2ViTModel(M2PreTrainedModel):
    """Patches of images, mixed by bidirectional long convolutions along their raster order.

    Patches are embedded by a convolution, get learned positions and pass pre-norm blocks and a last layer norm.

    Args:
        config: sizes.

    Shape:
        pixel_values (batch, channels, height, width) to last_hidden_state (batch, patches, hidden_size).

    Source: Fu et al. 2023, "Monarch Mixer", section 5.2; Dosovitskiy et al. 2021, "An image is worth 16x16 words".

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2ViTConfig, M2ViTModel
        >>> config = M2ViTConfig(image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2,
        ...                      intermediate_size=64)
        >>> M2ViTModel(config)(torch.ones(5, 1, 28, 28)).last_hidden_state.shape
        torch.Size([5, 16, 32])
    """

    config_class = M2ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: M2ViTConfig) -> None:
        super().__init__(config)
        image, patch, (rows, columns) = patch_grid(config.image_size, config.patch_size)
        self.image_size = image
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)
        self.positions = nn.Embedding(rows * columns, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(M2Block(config, causal=False) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode images of the size that the model was made for.

        Args:
            pixel_values: (batch, channels, height, width).
            output_hidden_states: whether to return the embedded patches and the outputs of all blocks.
            return_dict: whether to return an output object, in place of a tuple.

        Raises:
            ValueError: if the images have another shape.
        """
        check_images(pixel_values, self.config.num_channels, self.image_size)
        x = self.dropout(embed_patches(self.patches, pixel_values) + self.positions.weight)
        keep = self._keep(output_hidden_states)
        x, inputs = self._run(self.layers, x, None, keep)
        x = self.norm(x)
        states = self._states(inputs, x, keep)
        if not self._as_dict(return_dict):
            return tuple(v for v in (x, states) if v is not None)
        return BaseModelOutput(last_hidden_state=x, hidden_states=states)


class M2ViTForImageClassification(M2PreTrainedModel):
    """M2-ViT with a linear classifier of the mean of the patches.

    Args:
        config: sizes; ``num_labels`` is the number of classes.

    Shape:
        pixel_values (batch, channels, height, width) to logits (batch, num_labels).

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2ViTConfig, M2ViTForImageClassification
        >>> config = M2ViTConfig(image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2,
        ...                      intermediate_size=64, num_labels=10)
        >>> M2ViTForImageClassification(config)(torch.ones(5, 1, 28, 28)).logits.shape
        torch.Size([5, 10])
    """

    config_class = M2ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: M2ViTConfig) -> None:
        super().__init__(config)
        self.model = M2ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, check_int("num_labels", config.num_labels))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classify images; arguments as of :meth:`M2ViTModel.forward`, and labels.

        labels are classes (batch,); the mean cross-entropy becomes ``loss``.
        """
        out = self.model(pixel_values, output_hidden_states, True)
        logits = self.classifier(out.last_hidden_state.mean(1))
        loss = None if labels is None else label_loss(logits, labels, self.config)
        if not self._as_dict(return_dict):
            return tuple(v for v in (loss, logits, out.hidden_states) if v is not None)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
