"""MLP-Mixer, vision transformer and GPT, built from a structure config."""

from structmat.models.attention import BlockSparseAttention
from structmat.models.gpt import GPT, convert_gpt2_state_dict
from structmat.models.mixer import MLPMixer
from structmat.models.scatterbrain import ScatterbrainAttention
from structmat.models.summary import ModelSummary, SummaryRow, model_summary
from structmat.models.vit import VisionTransformer

__all__ = [
    "GPT",
    "BlockSparseAttention",
    "MLPMixer",
    "ModelSummary",
    "ScatterbrainAttention",
    "SummaryRow",
    "VisionTransformer",
    "convert_gpt2_state_dict",
    "model_summary",
]
