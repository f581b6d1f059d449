"""Configurations of the M2 models."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from structmat.models._build import patch_grid
from structmat.models.m2._config import M2Config

#: Hidden and intermediate sizes of the published M2-BERT models, by their names.
PRESETS = {"80M": (768, 3072), "110M": (960, 3840), "260M": (1536, 6144), "341M": (1792, 7168)}


class M2BertConfig(M2Config):
    """Configuration of M2-BERT; the defaults are those of the published model of 80 million parameters.

    Args:
        vocab_size: number of different tokens.
        max_position_embeddings: longest sequence: positions of the embedding and taps of the filters.
        type_vocab_size: number of token types.
        bidirectional: whether the long convolutions look ahead too.
        mixer_norm: whether a layer norm stands before every sequence mixer (the m2 repository's
            ``hyena_training_additions``).
        legacy_padding: whether padding tokens enter the convolutions as other tokens do, as in the released code.
        pooling: ``"cls"``, the first token, or ``"mean"``, of the tokens that the mask keeps.
        classifier_dropout: probability of dropout before the classifier; hidden_dropout_prob if None.
        initializer_range: as in :class:`M2Config`.
        pad_token_id: whose embedding starts at 0.
        tie_word_embeddings: whether the embedding is also the matrix of the output.
        **kwargs: for :class:`M2Config` and ``PretrainedConfig``.

    Raises:
        TypeError: as :class:`M2Config`.
        ValueError: as :class:`M2Config`, and if pooling is neither of its values.

    Example:
        >>> from structmat.models.m2 import M2BertConfig
        >>> config = M2BertConfig.preset("341M", max_position_embeddings=2048)
        >>> config.hidden_size, config.intermediate_size, config.mlp_structure["structure"]
        (1792, 7168, 'blockdiagonal')
    """

    model_type = "m2_bert"
    _sizes = (*M2Config._sizes, "vocab_size", "max_position_embeddings", "type_vocab_size")
    _flags = (*M2Config._flags, "bidirectional", "mixer_norm", "legacy_padding", "tie_word_embeddings")

    def __init__(
        self,
        vocab_size: int = 30528,
        max_position_embeddings: int = 128,
        type_vocab_size: int = 2,
        bidirectional: bool = True,
        mixer_norm: bool = False,
        legacy_padding: bool = False,
        pooling: str = "cls",
        classifier_dropout: float | None = None,
        initializer_range: float | None = 0.02,
        pad_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.bidirectional = bidirectional
        self.mixer_norm = mixer_norm
        self.legacy_padding = legacy_padding
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        # Set by hand: which of these PretrainedConfig takes depends on the version of transformers.
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            initializer_range=initializer_range,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self) -> None:
        super()._check()
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', got {self.pooling!r}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be None or in 0..{self.vocab_size - 1}, got {self.pad_token_id!r}")

    @property
    def sequence_length(self) -> int:
        return self.max_position_embeddings

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> Self:
        """The configuration of a published model.

        Args:
            name: ``"80M"``, ``"110M"``, ``"260M"`` or ``"341M"``.
            **kwargs: what is to differ.

        Raises:
            ValueError: if there is no such model.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
        hidden, intermediate = PRESETS[name]
        return cls(**{"hidden_size": hidden, "intermediate_size": intermediate, **kwargs})


class M2GPTConfig(M2Config):
    """Configuration of M2-GPT, a causal model without attention and without position embeddings.

    Args:
        vocab_size: number of different tokens.
        max_position_embeddings: longest sequence, and number of the filters' taps.
        use_cache: whether the model returns its state, from which generation goes on.
        bos_token_id: first token of a text.
        eos_token_id: last token of a text.
        pad_token_id: token that fills batches.
        tie_word_embeddings: whether the embedding is also the matrix of the output.
        hidden_dropout_prob: as in :class:`M2Config`.
        layer_norm_eps: as in :class:`M2Config`.
        **kwargs: for :class:`M2Config` and ``PretrainedConfig``.

    Raises:
        TypeError: as :class:`M2Config`.
        ValueError: as :class:`M2Config`.

    Example:
        >>> import structmat
        >>> from structmat.models.m2 import M2GPTConfig
        >>> config = M2GPTConfig(hidden_size=64, mlp_structure=structmat.MonarchConfig(nblocks=4))
        >>> config.mlp_structure["structure"], config.to_dict()["model_type"]
        ('monarch', 'm2_gpt')
    """

    model_type = "m2_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    _sizes = (*M2Config._sizes, "vocab_size", "max_position_embeddings")
    _flags = (*M2Config._flags, "use_cache", "tie_word_embeddings")

    def __init__(
        self,
        vocab_size: int = 50257,
        max_position_embeddings: int = 1024,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        hidden_dropout_prob: float = 0.0,
        layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            hidden_dropout_prob=hidden_dropout_prob,
            layer_norm_eps=layer_norm_eps,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def sequence_length(self) -> int:
        return self.max_position_embeddings


class M2ViTConfig(M2Config):
    """Configuration of M2-ViT, which mixes the patches of an image by bidirectional long convolutions.

    Args:
        image_size: number, or (height, width).
        patch_size: number, or (height, width); divides the image.
        num_channels: of the images.
        hidden_dropout_prob: as in :class:`M2Config`.
        layer_norm_eps: as in :class:`M2Config`.
        **kwargs: for :class:`M2Config` and ``PretrainedConfig``; ``num_labels`` is the number of classes.

    Raises:
        TypeError: as :class:`M2Config`.
        ValueError: as :class:`M2Config`, and if the patches do not divide the image.

    Example:
        >>> from structmat.models.m2 import M2ViTConfig
        >>> M2ViTConfig(image_size=28, patch_size=4, num_channels=1).sequence_length
        49
    """

    model_type = "m2_vit"
    _sizes = (*M2Config._sizes, "num_channels")

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_channels: int = 3,
        hidden_dropout_prob: float = 0.0,
        layer_norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        # Lists are what JSON makes of tuples.
        self.image_size = list(image_size) if isinstance(image_size, tuple) else image_size
        self.patch_size = list(patch_size) if isinstance(patch_size, tuple) else patch_size
        self.num_channels = num_channels
        super().__init__(hidden_dropout_prob=hidden_dropout_prob, layer_norm_eps=layer_norm_eps, **kwargs)

    def _check(self) -> None:
        super()._check()
        _ = self.sequence_length

    @property
    def sequence_length(self) -> int:
        _, _, (rows, columns) = patch_grid(self.image_size, self.patch_size)
        return rows * columns
