"""Pre-training by the objectives of ERNIE-M: samples, streams of batches, and a model that takes them mixed."""

from .files import TextFiles, TsvFiles
from .masking import Masking
from .model import ErnieMForPreTraining, PreTrainingOutput
from .objectives import BTMLM, CAMLM, MMLM, TLM, Objective
from .samples import OBJECTIVES, Pair, Sample, Sentence, pack
from .stream import PretrainingStream, Task

__all__ = [
    "BTMLM",
    "CAMLM",
    "MMLM",
    "OBJECTIVES",
    "TLM",
    "ErnieMForPreTraining",
    "Masking",
    "Objective",
    "Pair",
    "PreTrainingOutput",
    "PretrainingStream",
    "Sample",
    "Sentence",
    "Task",
    "TextFiles",
    "TsvFiles",
    "pack",
]
