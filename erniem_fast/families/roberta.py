"""RoBERTa: positions count the tokens that are not padding."""

from transformers.models.roberta import modeling_roberta as modeling

from .packed import PackedClassifier, PackedEncoder, PackedLayer, PackedModel
from .positions import CountedPositions


class RobertaLayer(PackedLayer, modeling.RobertaLayer):
    pass


class RobertaEncoder(PackedEncoder, modeling.RobertaEncoder):
    layer_kind = RobertaLayer


class RobertaModel(CountedPositions, PackedModel, modeling.RobertaModel):
    encoder_kind = RobertaEncoder


class RobertaForSequenceClassification(PackedClassifier, modeling.RobertaForSequenceClassification):
    pass
