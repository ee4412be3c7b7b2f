"""ERNIE-M for current transformers: the same classes and checkpoints, on a packed encoder and fast kernels."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration import ErnieMConfig
from .embedding import embed, score
from .extraction import Extractor, extract, extract_answer
from .extraction.pipeline import InformationExtractionPipeline
from .flags import check_names, use_kernels
from .graphs import use_graphs
from .modeling import (
    ErnieMForInformationExtraction,
    ErnieMForMaskedLM,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMPreTrainedModel,
)
from .optimize import optimize, restore
from .optimizer import create_optimizer
from .pretraining import ErnieMForPreTraining
from .quantization import ErnieMInt8Config
from .tokenization import ErnieMTokenizer
from .verification.models import verify

__all__ = [
    "ErnieMConfig",
    "ErnieMForInformationExtraction",
    "ErnieMForMaskedLM",
    "ErnieMForMultipleChoice",
    "ErnieMForQuestionAnswering",
    "ErnieMForSequenceClassification",
    "ErnieMForTokenClassification",
    "ErnieMInt8Config",
    "ErnieMModel",
    "ErnieMPreTrainedModel",
    "ErnieMTokenizer",
    "Extractor",
    "create_optimizer",
    "embed",
    "extract",
    "extract_answer",
    "optimize",
    "restore",
    "score",
    "use_graphs",
    "use_kernels",
    "verify",
]

__version__ = "0.1.0"

check_names()

# These make transformers' Auto classes and pipelines load `ernie_m` checkpoints once this package is imported.
AutoConfig.register(ErnieMConfig.model_type, ErnieMConfig)
AutoTokenizer.register(ErnieMConfig, slow_tokenizer_class=ErnieMTokenizer)
AutoModel.register(ErnieMConfig, ErnieMModel)
AutoModelForMaskedLM.register(ErnieMConfig, ErnieMForMaskedLM)
AutoModelForMultipleChoice.register(ErnieMConfig, ErnieMForMultipleChoice)
AutoModelForPreTraining.register(ErnieMConfig, ErnieMForPreTraining)
AutoModelForQuestionAnswering.register(ErnieMConfig, ErnieMForQuestionAnswering)
AutoModelForSequenceClassification.register(ErnieMConfig, ErnieMForSequenceClassification)
AutoModelForTokenClassification.register(ErnieMConfig, ErnieMForTokenClassification)
PIPELINE_REGISTRY.register_pipeline(
    "information-extraction", InformationExtractionPipeline, pt_model=ErnieMForInformationExtraction
)
