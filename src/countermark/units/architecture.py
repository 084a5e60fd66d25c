"""What no shape says of a transformer: its heads, and whether its MLPs rectify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.files import parse_json, read_regular

_LARGEST = 1 << 20  # bytes of a configuration
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_GROUPS = ("num_key_value_heads",)
_WIDTH = ("head_dim", "d_kv")
_ACTIVATION = ("hidden_act", "activation_function", "activation", "feed_forward_proj")


@dataclass(frozen=True)
class Architecture:
    """Heads of a transformer's attention.

    Attributes:
        heads: of queries; 0 where that is not known.
        groups: of keys and values; 0 for as many.
        width: values of a head; 0 where they share the width of the attention.
        rectified: the MLPs' activation is ReLU.
    """

    heads: int = 0
    groups: int = 0
    width: int = 0
    rectified: bool = False

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> Architecture:
        """What a configuration in the usual words says; fields that it has not are as above."""
        inner = configuration.get("text_config")
        said = inner if isinstance(inner, Mapping) else configuration

        def number(names: tuple[str, ...]) -> int:
            return next((said[n] for n in names if type(said.get(n)) is int and said[n] > 0), 0)

        rectified = any(said.get(name) == "relu" for name in _ACTIVATION)
        return cls(number(_HEADS), number(_GROUPS), number(_WIDTH), rectified)

    @classmethod
    def of_model(cls, model: object) -> Architecture | None:
        """That of a live model with a configuration; None of one without."""
        configuration = getattr(model, "config", None)
        if configuration is None:
            return None
        told = getattr(configuration, "to_dict", None)
        said = told() if callable(told) else getattr(configuration, "__dict__", {})
        return cls.of(said) if isinstance(said, Mapping) else None

    @classmethod
    def beside(cls, weights: Path) -> Architecture | None:
        """What `config.json` says in a checkpoint's folder; None where there is none to read."""
        folder = weights if weights.is_dir() else weights.parent
        try:
            said = parse_json(read_regular(folder / "config.json", _LARGEST))
        except (OSError, ValueError):
            return None
        return cls.of(said) if isinstance(said, Mapping) else None
