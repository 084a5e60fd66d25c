"""From the name of a scheme and data to an embedding: here the families part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from countermark.bench.data import Dataset
from countermark.bench.siblings import Siblings
from countermark.checkpoints import load_state
from countermark.embedding import Embedding
from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.predictors.base import Images, Labels, Predictor, make_module_predictor
from countermark.schemes import find_scheme_class
from countermark.schemes.base import Scheme
from countermark.schemes.outputs import OutputScheme
from countermark.schemes.triggers import TriggerScheme
from countermark.schemes.weights import WeightScheme

if TYPE_CHECKING:
    from countermark.bench.embed import Order


def scheme_for(
    name: str, fields: Mapping[str, Any], data: Dataset, batches: int, *, stored: bool = False
) -> Scheme:
    """The scheme of that name; what it has to know of the data and the course is taken from them.

    Args:
        name: of the scheme.
        fields: those that are given.
        data: what the host learns.
        batches: how many of them, all epochs together.
        stored: the fields are those of an experiment, which means by them what an earlier version
            did.

    Raises:
        ConfigError: there is no such scheme, or a field is wrong.
    """
    kind = find_scheme_class(name)
    if issubclass(kind, TriggerScheme):
        mean, deviation = data.scale
        of_data = {"classes": data.classes, "mean": mean, "deviation": deviation}
        fields = of_data | kind.schedule_fields(batches) | dict(fields)
    return kind.from_stored_fields(fields) if stored else kind.from_fields(fields)


def embedder(name: str) -> tuple[Callable[[Order, str | None], dict[str, Any]], str]:
    """What carries out an order with a scheme of that name, and the usual model; "" for none.

    Raises:
        ConfigError: there is no such scheme.
    """
    from countermark.bench import embed as classifiers  # it imports this module

    if name != classifiers.UNMARKED and issubclass(find_scheme_class(name), OutputScheme):
        from countermark.bench.imaging.embed import embed_outputs

        return embed_outputs, "unet"
    return classifiers.embed, ""


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for fields that no data can make right."""
    kind = find_scheme_class(name)
    known = {"classes": 2} if issubclass(kind, TriggerScheme) else {}
    kind.from_fields(known | dict(fields))


def marking(
    scheme: Scheme, model: nn.Module, data: Dataset, *, owner: str, material: KeyMaterial,
    siblings: Siblings,
) -> Embedding:  # fmt: skip
    """Start to mark a model that is trained on these data.

    Raises:
        ConfigError: scheme and model do not fit.
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
            siblings=[_live(model, path, scheme) for path in siblings.shown + siblings.held_out],
        )  # fmt: skip
    raise ConfigError(
        f"{scheme.name} marks what a network puts out: expected a scheme that marks a classifier's "
        "weights or answers"
    )


def _live(host: nn.Module, path: Path, scheme: TriggerScheme) -> Predictor:
    """A sibling's weight file as a suspect that is asked; it is built when it is."""

    def predict(images: Images) -> Labels:
        sibling = copy.deepcopy(host)
        sibling.load_state_dict(load_state(path))
        return make_module_predictor(sibling, scheme.mean, scheme.deviation)(images)

    return predict
