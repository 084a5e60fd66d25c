"""Embeddings: schemes at work while somebody's loop trains, one class for each family."""

from countermark.embedding.base import Embedding
from countermark.embedding.triggers import TriggerEmbedding
from countermark.embedding.weights import WeightEmbedding

__all__ = ["Embedding", "TriggerEmbedding", "WeightEmbedding"]
