"""Embeddings: schemes at work while somebody's loop trains, one class for each family."""

from countermark.embedding.base import Embedding
from countermark.embedding.outputs import Barrier, OutputEmbedding
from countermark.embedding.triggers import TriggerEmbedding
from countermark.embedding.weights import WeightEmbedding

__all__ = ["Barrier", "Embedding", "OutputEmbedding", "TriggerEmbedding", "WeightEmbedding"]
