"""countermark proves that a neural network is yours.

A scheme is a published method to mark a network. Embedding a scheme during training gives a secret
key. Whoever holds the key can later ask whether a suspect, a network that somebody else serves or
sells, carries the mark:

    embedding = scheme.embed(model, owner=…)   context manager around the training loop
    key = embedding.key                        the owner's secret, saved as a folder
    verdict = verify(suspect, key)             owned, not_proven or no_verdict
    outcome = attack.run(model, data)          a changed copy of the model, and its cost

The main classes, in the order in which an owner meets them:

    Scheme     a published method; a frozen dataclass whose fields are the whole configuration
    Key        the owner's secret: scheme fields, tensors, and the commitment C0 to both
    Embedding  a scheme at work while somebody's loop trains a model
    Verdict    the answer for one suspect, with the null hypothesis that it was judged by
    Attack     a change that a thief may make to a stolen model; never sees a key

Imports run downwards only: cli -> web -> training -> verification -> recipients -> stamping ->
attacks -> schemes -> embedding -> report -> claims -> predictors -> images ->
alignment -> results -> checkpoints -> keys -> _internal -> errors. Reading a mark in weights or in
answers needs numpy and no torch. The names below are imported when they are first used, so that
`import countermark` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Type checkers and editors see the real imports, which a running program makes only when a name is
# used.
if TYPE_CHECKING:
    from countermark.attacks.fine_tune import FineTune
    from countermark.attacks.overwrite import Overwrite
    from countermark.attacks.prune import Prune
    from countermark.attacks.prune_unused import PruneUnused
    from countermark.attacks.retrain import Retrain
    from countermark.embedding import Embedding
    from countermark.errors import CountermarkError
    from countermark.keys.key import Key
    from countermark.keys.key_place import KeyPlace
    from countermark.results.reading import Reading
    from countermark.results.verdict import Verdict
    from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
    from countermark.schemes.deepstego.scheme import DeepStego
    from countermark.schemes.hash_filter.scheme import HashFilter
    from countermark.schemes.independent_network.scheme import IndependentNetwork
    from countermark.schemes.stamp.scheme import Stamp
    from countermark.schemes.uchida.scheme import Uchida
    from countermark.verification.verify import verify

# The module under `countermark` that defines each public name.
_PLACES = {
    "CountermarkError": "errors",
    "DeepStego": "schemes.deepstego.scheme",
    "DeepWatermarking": "schemes.deep_watermarking.scheme",
    "Embedding": "embedding",
    "FineTune": "attacks.fine_tune",
    "HashFilter": "schemes.hash_filter.scheme",
    "IndependentNetwork": "schemes.independent_network.scheme",
    "Key": "keys.key",
    "KeyPlace": "keys.key_place",
    "Overwrite": "attacks.overwrite",
    "Prune": "attacks.prune",
    "PruneUnused": "attacks.prune_unused",
    "Reading": "results.reading",
    "Retrain": "attacks.retrain",
    "Stamp": "schemes.stamp.scheme",
    "Uchida": "schemes.uchida.scheme",
    "Verdict": "results.verdict",
    "verify": "verification.verify",
}

__all__ = [
    "CountermarkError",
    "DeepStego",
    "DeepWatermarking",
    "Embedding",
    "FineTune",
    "HashFilter",
    "IndependentNetwork",
    "Key",
    "KeyPlace",
    "Overwrite",
    "Prune",
    "PruneUnused",
    "Reading",
    "Retrain",
    "Stamp",
    "Uchida",
    "Verdict",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562).

    Raises:
        AttributeError: the package has no public name like this.
    """
    if name not in _PLACES:
        raise AttributeError(f"module 'countermark' has no attribute {name!r}")
    return getattr(importlib.import_module(f"countermark.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, whether they are imported yet or not."""
    return sorted(__all__)
