"""The four ops: each chooses an implementation by its flag at every call, and is a custom op to torch.compile."""

from .add_layernorm import add_layernorm
from .attention import attention, attention_with_probabilities
from .bias_gelu_dropout import ACTIVATIONS, bias_gelu_dropout
from .embeddings import embeddings

__all__ = [
    "ACTIVATIONS",
    "add_layernorm",
    "attention",
    "attention_with_probabilities",
    "bias_gelu_dropout",
    "embeddings",
]
