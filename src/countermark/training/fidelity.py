"""How much a change of weights changes a model's outputs: accuracy, or embeddings of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countermark.errors import ConfigError, DataError, MissingExtraError
from countermark.training.data import load_data
from countermark.training.embed_classifier import load_host
from countermark.training.loop import accuracy

# Bounds keep the comparison to minutes on a CPU and a wrong file out of memory.
_MOST_TEXTS, _MOST_BYTES = 200, 1 << 20
_TOKENS = 128  # tokens that are read of each text


@dataclass(frozen=True)
class ClassifierFidelity:
    """Comparison of classifiers by test accuracy.

    Attributes:
        model, arguments: name and arguments of the model that the weight files belong to.
        data: data set whose test images are classified.
    """

    model: str
    arguments: Mapping[str, Any]
    data: str

    def measure_outputs(self, path: Path) -> Tensor:
        """Return the accuracy of one weight file, 0 to 1, as a tensor of shape ()."""
        data = load_data(self.data)
        return torch.tensor(accuracy(load_host(self.model, self.arguments, path, data), data))

    def compare_outputs(self, before: Tensor, after: Tensor) -> dict[str, float]:
        """Return both accuracies by name."""
        return {"accuracy_before": before.item(), "accuracy_after": after.item()}


@dataclass(frozen=True)
class TextFidelity:
    """Comparison of language models by embeddings of texts: the last states, averaged over tokens.

    Attributes:
        prompts: a file with one text a line; at most 200 texts are read.
    """

    prompts: Path

    def measure_outputs(self, folder: Path) -> Tensor:
        """Embed all texts by the model of a folder.

        Returns: embeddings (n, width) of length 1.

        Raises:
            DataError: the file cannot be read or holds no text.
            MissingExtraError: transformers is missing.
            ConfigError: transformers cannot load the folder.
        """
        texts = self._read_texts()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingExtraError("comparing embeddings of texts", "hf") from None
        # Only local files: a folder whose name looks like a hub id must not start a download.
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{folder} is no model that transformers can load ({said}): leave --prompts out"
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        rows = [self._embed_text(model, tokenizer, text) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows).float(), dim=1)

    @staticmethod
    def _embed_text(model: Any, tokenizer: Any, text: str) -> Tensor:
        """Embed one text: the mean (width,) of the last states of its tokens."""
        # One text at a time needs no padding, which would shift the mean.
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)
        with torch.no_grad():
            states: Tensor = model(**tokens).last_hidden_state
        return states[0].mean(dim=0)  # (width,)

    def compare_outputs(self, before: Tensor, after: Tensor) -> dict[str, float]:
        """Compare embeddings (n, width) of the same texts by two models.

        Returns: the number of texts, the smallest cosine of a text's two embeddings, and the
            largest change of the similarity of two texts.
        """
        # Rows have length 1, so a product of two rows is their cosine.
        change = (after @ after.T - before @ before.T).abs()
        return {
            "texts": float(len(before)),
            "least_cosine": (before * after).sum(dim=1).min().item(),
            "largest_change_of_similarity": change.max().item(),
        }

    def _read_texts(self) -> list[str]:
        """Read the texts; raise DataError if there are none."""
        try:
            with self.prompts.open(encoding="utf-8") as file:
                lines = file.read(_MOST_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.prompts} cannot be read as text ({error})") from None
        texts = [line for line in lines if line.strip()][:_MOST_TEXTS]
        if not texts:
            raise DataError(f"{self.prompts} holds no text: expected one a line")
        return texts
