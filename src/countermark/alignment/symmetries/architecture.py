"""Read facts about a transformer that no shape tells: its heads, and whether its MLPs use ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark._internal.files import parse_json, read_regular

_LARGEST = 1 << 20  # bytes of a configuration, which is hostile input as well
# Each fact has several names in the libraries' configurations; the first that is present counts.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_GROUPS = ("num_key_value_heads",)
_WIDTH = ("head_dim", "d_kv")
_ACTIVATION = ("hidden_act", "activation_function", "activation", "feed_forward_proj")


@dataclass(frozen=True)
class Architecture:
    """The attention heads and the activation of a transformer.

    Attributes:
        heads: number of query heads; 0 if unknown.
        groups: number of key and value heads; 0 for as many as query heads.
        width: values of a head; 0 if the heads divide the width of the attention evenly.
        rectified: the activation of the MLPs is ReLU.
    """

    heads: int = 0
    groups: int = 0
    width: int = 0
    rectified: bool = False

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> Architecture:
        """Read a configuration with the usual field names; missing fields keep their defaults."""
        # Configurations of models for text and images keep the language model's fields one level
        # below.
        inner = configuration.get("text_config")
        said = inner if isinstance(inner, Mapping) else configuration

        def find_count(names: tuple[str, ...]) -> int:
            """Return the first positive integer among fields, or 0."""
            return next((said[n] for n in names if type(said.get(n)) is int and said[n] > 0), 0)

        rectified = any(said.get(name) == "relu" for name in _ACTIVATION)
        return cls(find_count(_HEADS), find_count(_GROUPS), find_count(_WIDTH), rectified)

    @classmethod
    def from_model(cls, model: object) -> Architecture | None:
        """Read the configuration of a live model; return None if it has no configuration."""
        configuration = getattr(model, "config", None)
        if configuration is None:
            return None
        # Configurations of transformers offer `to_dict`; others are read by their attributes.
        told = getattr(configuration, "to_dict", None)
        said = told() if callable(told) else getattr(configuration, "__dict__", {})
        return cls.from_configuration(said) if isinstance(said, Mapping) else None

    @classmethod
    def load_beside(cls, weights: Path) -> Architecture | None:
        """Read `config.json` in a checkpoint's folder; return None if it is missing or invalid.

        Args:
            weights: a weight file or the folder of one.
        """
        folder = weights if weights.is_dir() else weights.parent
        try:
            said = parse_json(read_regular(folder / "config.json", _LARGEST))
        except (OSError, ValueError):
            return None
        return cls.from_configuration(said) if isinstance(said, Mapping) else None
