"""Embeddings: context managers that mark a model during its training, one a scheme family."""

from countermark.embedding.base import Embedding
from countermark.embedding.outputs import Barrier, OutputEmbedding
from countermark.embedding.triggers import TriggerEmbedding
from countermark.embedding.weights import WeightEmbedding

__all__ = [
    "Barrier",
    "Embedding",
    "KeyPlace",
    "OutputEmbedding",
    "TriggerEmbedding",
    "UnfinishedKey",
    "WeightEmbedding",
    "make_unfinished_key",
]
