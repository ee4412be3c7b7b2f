"""Universal information extraction with UIE-M, and answers to questions: schemas in, spans out."""

from .extractor import Extractor, extract

__all__ = ["Extractor", "extract"]
