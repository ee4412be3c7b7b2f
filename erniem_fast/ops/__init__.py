"""The four ops. Each chooses an implementation by its flag at every call; to torch.compile it is a custom op."""

from .add_norm import add_norm
from .attention import attention, attention_with_probabilities
from .bias_gelu import ACTIVATIONS, bias_gelu
from .choose import IMPLEMENTATIONS, fuses_bias
from .embeddings import embeddings
from .product import Product

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Product",
    "add_norm",
    "attention",
    "attention_with_probabilities",
    "bias_gelu",
    "embeddings",
    "fuses_bias",
]
