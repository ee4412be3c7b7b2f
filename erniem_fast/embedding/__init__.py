"""Texts to vectors and pairs to scores, batched by tokens: in a call, from files, and on a cluster."""

from .embedder import Embedder
from .m3 import embed_m3
from .scores import score
from .vectors import embed

__all__ = ["Embedder", "embed", "embed_m3", "score"]
