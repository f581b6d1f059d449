"""MLP-Mixer, vision transformer and GPT, built from a structure config; and M2, for which transformers is needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from structmat.models.attention import BlockSparseAttention
from structmat.models.gpt import GPT, convert_gpt2_state_dict
from structmat.models.mixer import MLPMixer
from structmat.models.scatterbrain import ScatterbrainAttention
from structmat.models.summary import ModelSummary, SummaryRow, model_summary
from structmat.models.vit import VisionTransformer

if TYPE_CHECKING:
    from structmat.models.m2 import (
        M2BertConfig,
        M2BertForMaskedLM,
        M2BertForSequenceClassification,
        M2BertModel,
        M2GPTConfig,
        M2GPTForCausalLM,
        M2GPTModel,
        M2ViTConfig,
        M2ViTForImageClassification,
        M2ViTModel,
        convert_m2_state_dict,
        export_m2_state_dict,
    )

__all__ = [
    "GPT",
    "BlockSparseAttention",
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSequenceClassification",
    "M2BertModel",
    "M2GPTConfig",
    "M2GPTForCausalLM",
    "M2GPTModel",
    "M2ViTConfig",
    "M2ViTForImageClassification",
    "M2ViTModel",
    "MLPMixer",
    "ModelSummary",
    "ScatterbrainAttention",
    "SummaryRow",
    "VisionTransformer",
    "convert_gpt2_state_dict",
    "convert_m2_state_dict",
    "export_m2_state_dict",
    "model_summary",
]


def __getattr__(name: str) -> Any:
    # transformers is optional, and slow to import: only who asks for an M2 model needs it.
    if name == "m2" or ("m2" in name.lower() and name in __all__):
        try:
            module = importlib.import_module("structmat.models.m2")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError(
                f"structmat.models.{name} needs transformers: install it with pip install transformers"
            ) from error
        return module if name == "m2" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
