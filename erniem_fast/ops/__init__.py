"""The four ops, each of which chooses an implementation by its flag at every call, and is a custom op to torch.compile.

Beside them: how inference on a GPU rounds the operands of products.
"""

from .add_norm import add_norm
from .attention import attention, attention_with_probabilities
from .bias_gelu import ACTIVATIONS, bias_gelu
from .choose import IMPLEMENTATIONS, fuses_bias
from .embeddings import embeddings
from .product import Product
from .quantise import dequantise, quantise

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Product",
    "add_norm",
    "attention",
    "attention_with_probabilities",
    "bias_gelu",
    "dequantise",
    "embeddings",
    "fuses_bias",
    "quantise",
]
