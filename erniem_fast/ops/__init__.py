"""The four ops. Every call runs the implementation that the op's flag asks for; torch.compile sees a custom op.

Beside them stands the rounding to 8 bits, for products in inference on a GPU.
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
