"""M2 (Monarch Mixer): models without attention, as transformers' models; importing this imports transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from structmat.models.m2._base import M2Block, M2PreTrainedModel
from structmat.models.m2._config import M2Config
from structmat.models.m2.bert import M2BertForMaskedLM, M2BertForSequenceClassification, M2BertLayer, M2BertModel
from structmat.models.m2.configuration import M2BertConfig, M2GPTConfig, M2ViTConfig
from structmat.models.m2.convert import convert_m2_state_dict, export_m2_state_dict
from structmat.models.m2.gpt import M2Cache, M2GPTForCausalLM, M2GPTModel
from structmat.models.m2.mixer import M2SequenceMixer
from structmat.models.m2.mlp import M2MLP
from structmat.models.m2.vit import M2ViTForImageClassification, M2ViTModel

__all__ = [
    "M2MLP",
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSequenceClassification",
    "M2BertLayer",
    "M2BertModel",
    "M2Block",
    "M2Cache",
    "M2Config",
    "M2GPTConfig",
    "M2GPTForCausalLM",
    "M2GPTModel",
    "M2PreTrainedModel",
    "M2SequenceMixer",
    "M2ViTConfig",
    "M2ViTForImageClassification",
    "M2ViTModel",
    "convert_m2_state_dict",
    "export_m2_state_dict",
]

for _config, _models in (
    (
        M2BertConfig,
        {
            AutoModel: M2BertModel,
            AutoModelForMaskedLM: M2BertForMaskedLM,
            AutoModelForSequenceClassification: M2BertForSequenceClassification,
        },
    ),
    (M2GPTConfig, {AutoModel: M2GPTModel, AutoModelForCausalLM: M2GPTForCausalLM}),
    (M2ViTConfig, {AutoModel: M2ViTModel, AutoModelForImageClassification: M2ViTForImageClassification}),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _model in _models.items():
        _auto.register(_config, _model, exist_ok=True)

# The Trainer smooths labels and text generation pipelines run for the models in this table: elsewhere labels would not
# be shifted against the logits.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[M2GPTConfig.model_type] = M2GPTForCausalLM.__name__
