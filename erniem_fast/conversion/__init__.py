"""Checkpoints of other libraries and models: PaddleNLP's and Baidu's ERNIE-M, and XLM-RoBERTa.

The classes of `modeling` read checkpoints through `paddle`, so nothing here imports them before it is called.
"""

from .paddle import save_as_paddle
from .pickles import RefusedPickleError
from .xlm_roberta import from_xlm_roberta, to_xlm_roberta

__all__ = ["RefusedPickleError", "from_xlm_roberta", "save_as_paddle", "to_xlm_roberta"]
