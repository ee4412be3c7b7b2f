"""XLM-RoBERTa: positions count the tokens that are not padding."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as modeling

from .packed import PackedClassifier, PackedEncoder, PackedLayer, PackedModel
from .positions import CountedPositions


class XLMRobertaLayer(PackedLayer, modeling.XLMRobertaLayer):
    pass


class XLMRobertaEncoder(PackedEncoder, modeling.XLMRobertaEncoder):
    layer_kind = XLMRobertaLayer


class XLMRobertaModel(CountedPositions, PackedModel, modeling.XLMRobertaModel):
    encoder_kind = XLMRobertaEncoder


class XLMRobertaForSequenceClassification(PackedClassifier, modeling.XLMRobertaForSequenceClassification):
    pass
