"""What the configurations of the M2 models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from structmat._checks import check_int
from structmat.config import BlockDiagonalConfig, Config, config_from_dict

Structure = Config | Mapping[str, Any] | None


class M2Config(PretrainedConfig):
    """What the configurations of M2-BERT, M2-GPT and M2-ViT share; use those.

    Args:
        hidden_size: channels of a token, d.
        num_hidden_layers: number of layers.
        intermediate_size: hidden units I of the gated MLP, whose first layer has 2 I outputs.
        mlp_structure: a structmat config (or its dictionary) for the two layers of the MLP; None makes them dense.
        projection_structure: the same for the projections before and after the sequence mixer.
        short_filter_size: taps of the short causal convolution of the projections.
        residual_long_conv: whether a second long convolution, of the mixer's input, is added to its output.
        filter_features: features of a position that the filters' network reads, odd, from 3.
        filter_width: its hidden width.
        filter_depth: number of its sine layers.
        filter_frequency: initial frequency of its sines.
        hidden_dropout_prob: probability of dropout after the embedding and in the MLPs.
        layer_norm_eps: of the layer norms.
        initializer_range: standard deviation of dense weights, whose biases are then 0; None gives ``nn.Linear``'s own
            initialisation. Structured layers have ``nn.Linear``'s variance, embeddings a deviation of 0.02 if None.
        **kwargs: for ``PretrainedConfig``.

    Raises:
        TypeError: if a size is not an integer, a flag not a bool, or a structure no config.
        ValueError: if a size, a probability or a structure is out of range.
    """

    #: Names of sizes that must be positive integers.
    _sizes: ClassVar[tuple[str, ...]] = (
        *("hidden_size", "num_hidden_layers", "intermediate_size", "short_filter_size"),
        *("filter_width", "filter_depth"),
    )
    _flags: ClassVar[tuple[str, ...]] = ("residual_long_conv",)
    _probabilities: ClassVar[tuple[str, ...]] = ("hidden_dropout_prob",)

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        mlp_structure: Structure = BlockDiagonalConfig(nblocks=4),  # noqa: B008 (frozen)
        projection_structure: Structure = None,
        short_filter_size: int = 3,
        residual_long_conv: bool = True,
        filter_features: int = 5,
        filter_width: int = 128,
        filter_depth: int = 3,
        filter_frequency: float = 10.0,
        hidden_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.mlp_structure = _structure_dict("mlp_structure", mlp_structure)
        self.projection_structure = _structure_dict("projection_structure", projection_structure)
        self.short_filter_size = short_filter_size
        self.residual_long_conv = residual_long_conv
        self.filter_features = filter_features
        self.filter_width = filter_width
        self.filter_depth = filter_depth
        self.filter_frequency = filter_frequency
        self.hidden_dropout_prob = hidden_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        # Also where transformers overrides what a file says: dictionaries only can be written to the next one.
        super().__setattr__(name, _structure_dict(name, value) if name.endswith("_structure") else value)

    def _check(self) -> None:
        for name in self._sizes:
            check_int(name, getattr(self, name))
        for name in self._flags:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in self._probabilities:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
        if check_int("filter_features", self.filter_features, 3) % 2 == 0:
            raise ValueError(f"filter_features must be odd (time, cosines and sines), got {self.filter_features}")
        for name in ("layer_norm_eps", "filter_frequency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.initializer_range is not None and not self.initializer_range > 0:
            raise ValueError(f"initializer_range must be positive or None, got {self.initializer_range!r}")
        sizes = ((2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size))
        for m, n in sizes:
            _check_structure("mlp_structure", self.mlp_structure, m, n)
        for m in (self.hidden_size, 3 * self.hidden_size):
            _check_structure("projection_structure", self.projection_structure, m, self.hidden_size)

    @property
    def sequence_length(self) -> int:
        """The longest sequence, which is the number of the filters' taps."""
        raise NotImplementedError


def check_options(config: type[M2Config], options: Mapping[str, Any]) -> None:
    """Raise at a name that no configuration has: ``PretrainedConfig`` would take it as an attribute, without effect."""
    default = config()
    for name in options:
        if not hasattr(default, name):
            raise TypeError(f"{config.__name__} has no option {name!r}")


def _structure_dict(name: str, structure: Structure) -> dict[str, Any] | None:
    """The JSON form of a structure."""
    if structure is None:
        return None
    if isinstance(structure, Config):
        return structure.to_dict()
    if not isinstance(structure, Mapping):
        raise TypeError(
            f"{name} must be a structmat config, its dictionary or None, got {type(structure).__name__}; "
            "for example structmat.MonarchConfig(nblocks=4)"
        )
    return config_from_dict(dict(structure)).to_dict()


def _check_structure(name: str, structure: dict[str, Any] | None, m: int, n: int) -> None:
    if structure is None:
        return
    try:
        config_from_dict(structure).resolve(m, n)
    except ValueError as error:
        raise ValueError(f"{name} does not exist for a layer from {n} to {m} features: {error}") from error
