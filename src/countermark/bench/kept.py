"""How much of a model's answers a change of its weights keeps: accuracy, or embeddings of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countermark.bench.data import load_data
from countermark.bench.embed import loaded_host
from countermark.bench.train import accuracy
from countermark.errors import ConfigError, DataError, MissingExtraError

_MOST_TEXTS, _MOST_BYTES = 200, 1 << 20
_TOKENS = 128  # of each text


@dataclass(frozen=True)
class Pictures:
    """Test accuracy of a weight file as the weights of a model.

    Attributes:
        model, arguments: how it is built.
        data: what it is tested on.
    """

    model: str
    arguments: Mapping[str, Any]
    data: str

    def of(self, path: Path) -> Tensor:
        """The accuracy () of one file, 0 to 1."""
        data = load_data(self.data)
        return torch.tensor(accuracy(loaded_host(self.model, self.arguments, path, data), data))

    def compared(self, before: Tensor, after: Tensor) -> dict[str, float]:
        """Both accuracies."""
        return {"accuracy_before": before.item(), "accuracy_after": after.item()}


@dataclass(frozen=True)
class Texts:
    """Embeddings of texts by a language model in a folder: its last states, averaged over tokens.

    Attributes:
        prompts: a file with one text a line; at most 200 are read.
    """

    prompts: Path

    def of(self, folder: Path) -> Tensor:
        """Embeddings (n, width) of length 1."""
        texts = self._texts()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingExtraError("comparing embeddings of texts", "hf") from None
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
        rows = [self._embedded(model, tokenizer, text) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows).float(), dim=1)

    @staticmethod
    def _embedded(model: Any, tokenizer: Any, text: str) -> Tensor:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)
        with torch.no_grad():
            states: Tensor = model(**tokens).last_hidden_state
        return states[0].mean(dim=0)  # (width,)

    def compared(self, before: Tensor, after: Tensor) -> dict[str, float]:
        """How near each text stays to itself, and how much any similarity of two texts changes."""
        change = (after @ after.T - before @ before.T).abs()
        return {
            "texts": float(len(before)),
            "least_cosine": (before * after).sum(dim=1).min().item(),
            "largest_change_of_similarity": change.max().item(),
        }

    def _texts(self) -> list[str]:
        try:
            with self.prompts.open(encoding="utf-8") as file:
                lines = file.read(_MOST_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.prompts} cannot be read as text ({error})") from None
        texts = [line for line in lines if line.strip()][:_MOST_TEXTS]
        if not texts:
            raise DataError(f"{self.prompts} holds no text: expected one a line")
        return texts
