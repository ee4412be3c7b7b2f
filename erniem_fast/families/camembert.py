"""CamemBERT: positions count the tokens that are not padding."""

from transformers.models.camembert import modeling_camembert as modeling

from .packed import PackedClassifier, PackedEncoder, PackedLayer, PackedModel
from .positions import CountedPositions


class CamembertLayer(PackedLayer, modeling.CamembertLayer):
    pass


class CamembertEncoder(PackedEncoder, modeling.CamembertEncoder):
    layer_kind = CamembertLayer


class CamembertModel(CountedPositions, PackedModel, modeling.CamembertModel):
    encoder_kind = CamembertEncoder


class CamembertForSequenceClassification(PackedClassifier, modeling.CamembertForSequenceClassification):
    pass
