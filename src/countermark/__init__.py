"""countermark proves that a neural network is yours.

Five nouns, in the order in which an owner meets them:

    Scheme     a published method; a frozen dataclass, its fields are the whole configuration
    Key        the owner's secret; scheme fields, commitment C0, tensors on disk
    Embedding  a scheme at work while somebody's loop trains
    Verdict    the answer to "is the mark of this key in that model?", and the null behind it
    Attack     what a thief may do; never sees a key

    scheme.embed(model, owner=…)  ->  Embedding  ->  Key
    verify(suspect, key)          ->  Verdict    (owned, not_proven, no_verdict)
    attack.run(model, data)       ->  a changed copy, and what it cost

Imports run downwards only: cli -> bench -> attacks, examine -> openings -> schemes -> embedding ->
verdict -> nulls, key, weights, remote -> message, merkle, stats, answers -> xof, files, errors,
progress. Reading runs on numpy, without torch; names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from countermark.attacks.fine_tune import FineTune
    from countermark.attacks.overwrite import Overwrite
    from countermark.attacks.prune import Prune
    from countermark.attacks.prune_unused import PruneUnused
    from countermark.attacks.retrain import Retrain
    from countermark.embedding import Embedding, KeyPlace
    from countermark.errors import CountermarkError
    from countermark.evidence import Evidence
    from countermark.examine import verify
    from countermark.key import Key
    from countermark.schemes.deep_watermarking import DeepWatermarking
    from countermark.schemes.deepstego import DeepStego
    from countermark.schemes.hash_filter import HashFilter
    from countermark.schemes.independent_network import IndependentNetwork
    from countermark.schemes.stamp import Stamp
    from countermark.schemes.uchida import Uchida
    from countermark.verdict import Verdict

_PLACES = {
    "CountermarkError": "errors",
    "DeepStego": "schemes.deepstego",
    "DeepWatermarking": "schemes.deep_watermarking",
    "Embedding": "embedding",
    "Evidence": "evidence",
    "FineTune": "attacks.fine_tune",
    "HashFilter": "schemes.hash_filter",
    "IndependentNetwork": "schemes.independent_network",
    "Key": "key",
    "KeyPlace": "embedding",
    "Overwrite": "attacks.overwrite",
    "Prune": "attacks.prune",
    "PruneUnused": "attacks.prune_unused",
    "Retrain": "attacks.retrain",
    "Stamp": "schemes.stamp",
    "Uchida": "schemes.uchida",
    "Verdict": "verdict",
    "verify": "examine",
}

__all__ = [
    "CountermarkError",
    "DeepStego",
    "DeepWatermarking",
    "Embedding",
    "Evidence",
    "FineTune",
    "HashFilter",
    "IndependentNetwork",
    "Key",
    "KeyPlace",
    "Overwrite",
    "Prune",
    "PruneUnused",
    "Retrain",
    "Stamp",
    "Uchida",
    "Verdict",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'countermark' has no attribute {name!r}")
    return getattr(importlib.import_module(f"countermark.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
