"""Make schemes and embeddings by name; each family of schemes needs other parts of the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from countermark.checkpoints import load_state
from countermark.embedding import Embedding
from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images, Labels, Predictor, make_module_predictor
from countermark.schemes import find_scheme_class
from countermark.schemes.base import Scheme
from countermark.schemes.triggers import TriggerScheme
from countermark.schemes.weights import WeightScheme
from countermark.training.data import Dataset
from countermark.training.siblings import TrainedSiblings


def make_scheme(
    name: str, fields: Mapping[str, Any], data: Dataset, batches: int, *, stored: bool = False
) -> Scheme:
    """Make a scheme; number of classes, pixel scale and schedule follow from the data set.

    Args:
        name: name of the scheme.
        fields: fields that the user sets.
        data: the data set that the host learns.
        batches: number of batches of the whole training.
        stored: read the fields of an experiment, which keep the meaning they had when the
            experiment was first computed.

    Raises:
        ConfigError: there is no such scheme, or a field is wrong.
    """
    kind = find_scheme_class(name)
    if issubclass(kind, TriggerScheme):
        mean, deviation = data.scale
        of_data = {"classes": data.classes, "mean": mean, "deviation": deviation}
        # The fields that a user sets come last: they replace the derived ones.
        fields = of_data | kind.schedule_fields(batches) | dict(fields)
    return kind.from_stored_fields(fields) if stored else kind.from_fields(fields)


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for fields that are wrong for every data set."""
    kind = find_scheme_class(name)
    # Trigger schemes require the number of classes, which only the data tells; 2 is the least.
    known = {"classes": 2} if issubclass(kind, TriggerScheme) else {}
    kind.from_fields(known | dict(fields))


def make_embedding(
    scheme: Scheme, model: nn.Module, data: Dataset, *, owner: str, material: KeyMaterial,
    siblings: TrainedSiblings,
) -> Embedding:  # fmt: skip
    """Make the embedding that marks a model while it is trained on `data`.

    Args:
        scheme: a scheme of weights or triggers.
        model: the host.
        data: the data set that the host learns; its training images are the covers of triggers.
        owner: name of the owner.
        material: secret and nonce of the key.
        siblings: files of unmarked relatives of the host.

    Raises:
        ConfigError: scheme and model do not fit, or the scheme marks outputs.
    """
    if isinstance(scheme, WeightScheme):
        return scheme.embed(
            model, owner=owner, material=material,
            unmarked=siblings.shown, siblings=siblings.held_out,
        )  # fmt: skip
    if isinstance(scheme, TriggerScheme):
        return scheme.embed(
            model, owner=owner, material=material,
            covers=data.train_images, labels=data.train_labels,
            siblings=[
                _make_sibling_predictor(model, path, scheme)
                for path in siblings.shown + siblings.held_out
            ],
        )  # fmt: skip
    raise ConfigError(
        f"{scheme.name} marks what a network puts out: expected a scheme that marks a classifier's "
        "weights or answers"
    )


def _make_sibling_predictor(host: nn.Module, path: Path, scheme: TriggerScheme) -> Predictor:
    """Return a predictor for the weight file of a sibling of `host`."""

    def predict(images: Images) -> Labels:
        """Load the sibling and return its classes (n,)."""
        # Built anew for each call, so that memory holds one sibling and not all of them.
        sibling = copy.deepcopy(host)
        sibling.load_state_dict(load_state(path))
        return make_module_predictor(sibling, scheme.mean, scheme.deviation)(images)

    return predict
