"""Universal information extraction with UIE-M: schemas in, spans out; its training data and its metrics."""

from .annotations import read_doccano, read_label_studio
from .answer_metrics import answer_metrics
from .answers import extract_answer
from .examples import AnnotatedText, Answer, Entity, Example, Relation, make_examples, read_examples, write_examples
from .extractor import Extractor, extract
from .features import ExtractionCollator, make_features
from .metrics import result_metrics, span_metrics

__all__ = [
    "AnnotatedText",
    "Answer",
    "Entity",
    "Example",
    "ExtractionCollator",
    "Extractor",
    "Relation",
    "answer_metrics",
    "extract",
    "extract_answer",
    "make_examples",
    "make_features",
    "read_doccano",
    "read_examples",
    "read_label_studio",
    "result_metrics",
    "span_metrics",
    "write_examples",
]
