"""The four ops: each chooses an implementation by its flag at every call, and is a custom op to torch.compile."""

from torch import Tensor

from . import add_layernorm as _add_layernorm
from . import attention as _attention
from . import bias_gelu_dropout as _bias_gelu_dropout
from . import embeddings as _embeddings
from .implementation import IMPLEMENTATIONS, choose


def fuses_bias(op: str, x: Tensor) -> bool:
    """Whether the op, for inputs like `x`, wants to add the bias of the matrix product before it."""
    return IMPLEMENTATIONS[op][choose(op, x.device, x.dtype)].fuses_bias


ACTIVATIONS = _bias_gelu_dropout.ACTIVATIONS
add_layernorm = _add_layernorm.add_layernorm
attention = _attention.attention
attention_with_probabilities = _attention.attention_with_probabilities
bias_gelu_dropout = _bias_gelu_dropout.bias_gelu_dropout
embeddings = _embeddings.embeddings
