"""Weight files as suspects that answer images: the model is built and the weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from countermark.errors import ConfigError, make_printable
from countermark.keys.key import Key
from countermark.predictors.base import PredictorWithSubject, make_module_predictor
from countermark.results.subject import Subject
from countermark.training.embed_classifier import load_into
from countermark.training.models import build
from countermark.verification.disclosure import TriggerDisclosure


def load_file_predictor(
    path: Path, key: Key | TriggerDisclosure, model: str | None, arguments: Mapping[str, Any]
) -> PredictorWithSubject:
    """Load a weight file as a predictor.

    Args:
        path: the suspect's file.
        key: a key of a trigger scheme, or a disclosure of its triggers. Either says how the host's
            images are standardised; a key may also name the model, a disclosure never does.
        model: the model that the weights belong to, if it is not the one that the key names.
        arguments: arguments of `model`.

    Raises:
        SuspectError: the file cannot be read.
        ConfigError: no model is named, the file does not fit the model, or the key names code of
            its own that the caller has not confirmed by `model`.
    """
    name = model or key.model
    if name is None:
        raise ConfigError(
            "a key of triggers asks a live model, and the key does not say which: give --model"
        )
    # A key may come from somebody else: code that it names must not run unless the user repeats it.
    if model is None and ":" in name:
        raise ConfigError(
            f"the key names code of its own as its host, {make_printable(name, 200)}: if you trust it, "
            "repeat it as --model"
        )
    # The key's arguments belong to the key's model; a model that the user names has its own.
    built = build(name, dict(arguments) or ({} if model else dict(key.model_arguments)))
    load_into(built, path)
    predict = make_module_predictor(built, key.fields["mean"], key.fields["deviation"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    subject = Subject(name=str(path), file_sha256=digest, model=name)
    return PredictorWithSubject(predict, lambda: subject)
